"""Rows of Parquet files, whose pages may hold far more than the file has bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.bounded import TooMuch, call_bounded
from stages.lib.data.batch import BATCH_ROWS, Batch, Wanted, require_columns, top_column, value_of, values_of
from stages.lib.errors import UserError

MAX_BATCH_BYTES = 1 << 27  # of `BATCH_ROWS` rows, as Arrow holds them
MAX_MEGABYTES = 800  # of address space to decode them; pyarrow itself takes about a third
BASE_SECONDS, BYTES_A_SECOND = 6, 10_000_000  # to read a file in: a slow machine decodes some ten times as fast


def read_parquet(path: Path, wanted: Wanted) -> Iterator[Batch]:
    """Yield the wanted columns of a Parquet file, once another process could read them within bounds."""
    from pyarrow import ArrowException

    seconds = BASE_SECONDS + path.stat().st_size // BYTES_A_SECOND
    try:
        call_bounded(try_parquet, str(path), wanted.names, wanted.whole, seconds=seconds, megabytes=MAX_MEGABYTES)
    except TooMuch as error:
        raise UserError(
            f"{path}: {path.stat().st_size:,} bytes of Parquet that take {error} to read; expected rows of which "
            f"{BATCH_ROWS:,} fit in {MAX_BATCH_BYTES >> 20} MB. Write it again with shorter rows, or as JSON Lines"
        ) from error
    file, columns_read = opened_parquet(path, wanted)
    row, found = 0, file.schema_arrow.names
    with file:
        try:
            for part in file.iter_batches(batch_size=BATCH_ROWS, columns=columns_read):
                whole = {name: values_of(part.column(name)) for name in part.schema.names}
                columns = {
                    name: whole[name] if name in whole else [value_of({top: each}, name) for each in whole[top]]
                    for name in wanted.names
                    for top in [top_column(name, found)]
                }
                each_row = zip(*whole.values(), strict=True) if wanted.whole else ()
                rows = [dict(zip(whole, values, strict=True)) for values in each_row]
                numbers = list(range(row + 1, row + part.num_rows + 1))
                row += part.num_rows
                yield Batch(str(path), "row", numbers, columns, rows or None)
        except (OSError, UnicodeDecodeError, ArrowException) as error:
            raise unreadable(path, row, error) from error


def try_parquet(name: str, names: list[str], whole: bool) -> int:
    """Return the rows of a Parquet file, when all of them could be read. Raises `UserError` for a batch too large."""
    from pyarrow import ArrowException

    path, rows = Path(name), 0
    file, columns = opened_parquet(path, Wanted(names, whole))
    try:
        for part in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            if part.nbytes > MAX_BATCH_BYTES:
                raise UserError(
                    f"{path}: its rows {rows + 1:,} to {rows + part.num_rows:,} take {part.nbytes >> 20:,} MB of "
                    f"memory; expected {MAX_BATCH_BYTES >> 20} MB at most for {BATCH_ROWS:,} rows. Leave out what is "
                    f"longer than a model reads"
                )
            rows += part.num_rows
    except (OSError, ArrowException) as error:
        if isinstance(error, MemoryError):
            raise
        raise unreadable(path, rows, error) from error
    return rows


def opened_parquet(path: Path, wanted: Wanted) -> tuple[Any, list[str]]:
    """Return a Parquet file, opened, and the names of the columns to read.

    A column is read a page at a time, not a group of rows. Raises `UserError` when it is none or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        found = file.schema_arrow.names
    except (OSError, pyarrow.ArrowException) as error:  # OSError: also Thrift's own errors
        if isinstance(error, MemoryError):
            raise
        raise UserError(f"{path}: not a Parquet file ({first_line(error)}). Fetch or make it again") from error
    require_columns(str(path), wanted.names, found)
    return file, found if wanted.whole else list(dict.fromkeys(top_column(name, found) for name in wanted.names))


def unreadable(path: Path, row: int, error: Exception) -> UserError:
    """Return the message on what stands after `row` rows."""
    return UserError(
        f"{path}, after row {row}: the next rows can't be read ({first_line(error)}). Fetch or make it again"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error, at most 200 characters of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
