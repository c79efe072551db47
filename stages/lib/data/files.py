"""Rows of a recipe's sources, read a batch at a time: from the hub, or from JSONL, JSON, CSV and Parquet files.

Only a JSON list is read whole. Every message on a bad file names the file, the line or row, what was found and what was
expected. Nothing is guessed: no encoding, no separator, no column.
"""

import csv
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.data.batch import BATCH_BYTES, BATCH_ROWS, Batch, columns_of, require_columns, values_of
from stages.lib.data.hub import read_hub
from stages.lib.data.reasoning_gym import read_gym
from stages.lib.errors import UserError
from stages.lib.recipe.tables import DATA_SUFFIXES, GYM, Source, is_hub_name

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_FIELD_CHARACTERS = 1 << 26  # of CSV; more is a quote that was never closed
MAX_LIST_BYTES = 1_000_000_000  # of a JSON list


@dataclass(frozen=True)
class Lines:
    """Lines of a JSONL file, which `parsed` reads again and parses, maybe in another process."""

    path: Path
    first: int  # line number of the first
    start: int  # where they begin in the file, in bytes
    size: int  # bytes
    names: list[str]
    is_start: bool  # whether the file's first row is in here

    @property
    def origin(self) -> str:
        """Return the file, as `Batch` names it."""
        return str(self.path)

    def parsed(self) -> Batch:
        """Return the rows, blank lines left out. Raises `UserError` for a line that is not one JSON object."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            lines = file.read(self.size).split(b"\n")
        numbers = [number for number, text in enumerate(lines, self.first) if text and not text.isspace()]
        kept = lines if len(numbers) == len(lines) else [lines[number - self.first] for number in numbers]
        try:  # one call for all lines takes half the time
            rows = json.loads(f"[{b','.join(kept).decode('utf-8')}]")
        except (ValueError, RecursionError):
            rows = []
        if len(rows) != len(kept):
            rows = [parsed_line(self.path, number, text) for number, text in zip(numbers, kept, strict=True)]
        return columns_of(self.path, "line", numbers, rows, self.names, self.is_start)


def files_of_source(source: Source, base_model: Path | None, data: Path | None) -> list[Path]:
    """Return the files of a source in the order they are read; none for one that is fetched or made.

    `base_model` is the artifact for a source named "base-model". `data` is a file or folder, the local copy of the
    datasets that the recipe names on the hub. Raises `UserError` for a file that does not exist, and for a dataset to
    fetch without a revision.
    """
    if source.name == GYM:
        return []
    if source.name == "base-model":
        if base_model is None:
            raise UserError(f"the recipe takes {source.split!r} problems from base-model; give --base-model FOLDER")
        return files_in(base_model / "problems", source)
    if is_hub_name(source.name):
        if data is None:
            if not source.revision:
                raise UserError(
                    f"[[data.sources]] name = {source.name!r} is fetched from the hub, and the recipe states no "
                    f"revision; expected a commit (40 hex digits). make doctor RECIPE=... shows the newest. Or give a "
                    f"local copy: make ... DATA=FOLDER"
                )
            return []
        owner, name = source.name.split("/")
        inside = [folder for folder in (data / owner / name, data / name) if folder.is_dir()]
        return files_in(inside[0] if inside else data, source)
    return files_in(Path(source.name), source)


def files_in(path: Path, source: Source) -> list[Path]:
    """Return the files that hold the source's split in `path`: a file itself, or a folder laid out as on the hub."""
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            known = ", ".join(DATA_SUFFIXES)
            raise UserError(f"{path}: can't be read as a dataset; expected a name that ends in {known}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder; expected {source.name!r} there")
    shard = re.compile(re.escape(source.split) + r"-(\d{5})-of-(\d{5})")
    places = [path / source.config] if source.config else []
    for place in (*places, path / "data", path):
        candidates = sorted(file for file in place.glob("*") if file.suffix in DATA_SUFFIXES and file.is_file())
        wholes = [file for file in candidates if file.stem == source.split]
        shards = [file for file in candidates if shard.fullmatch(file.stem)]
        if len(wholes) > 1 or (wholes and shards):
            names = ", ".join(file.name for file in (wholes + shards)[:4])
            raise UserError(f"{place}: the split {source.split!r} is there more than once ({names}); name one file")
        if shards:
            numbers = [shard.fullmatch(file.stem).groups() for file in shards]
            count = int(numbers[0][1])
            if [int(number) for number, _ in numbers] != list(range(count)):
                raise UserError(f"{place}: has {len(shards)} of the {count} files of the split {source.split!r}")
        if wholes or shards:
            return wholes or shards
    all_files = sorted(file.relative_to(path).as_posix() for file in itertools.islice(path.rglob("*.*"), 1000))
    sample = ", ".join(all_files[:8]) + (", ..." if len(all_files) > 8 else "")
    raise UserError(
        f"{path}: no file of the split {source.split!r}; expected {source.split}.jsonl, .json, .csv or .parquet, or "
        f"{source.config or 'data'}/{source.split}-00000-of-00001.parquet; found {sample or 'nothing'}"
    )


def read_batches(source: Source, files: list[Path]) -> Iterator[Batch | Lines]:
    """Yield the columns that the source names, of at most `max_rows` rows.

    Raises `UserError`, here or in `parsed`, for a file that is not what its name says, for a missing column, and for no
    rows at all.
    """
    names = list(dict.fromkeys(name for name in (source.question, source.answer, source.solution) if name))
    of_files = itertools.chain.from_iterable(read_file(file, names) for file in files)
    read = of_files if files else (read_gym if source.name == GYM else read_hub)(source, names)
    if not source.max_rows:
        yield from read
        return
    left = source.max_rows
    for piece in read:
        batch = piece.parsed()
        columns = {name: values[:left] for name, values in batch.columns.items()}
        yield Batch(batch.origin, batch.unit, batch.numbers[:left], columns)
        left -= len(batch.numbers)
        if left <= 0:
            return


def read_file(path: Path, names: list[str]) -> Iterator[Batch | Lines]:
    """Yield the named columns of one file. Raises `UserError` when it has no rows."""
    read: Iterator[Batch | Lines]
    if path.suffix == ".parquet":
        read = read_parquet(path, names)
    elif path.suffix == ".csv":
        read = read_csv(path, names)
    elif path.suffix == ".json" and first_character(path) == b"[":
        read = read_json_list(path, names)
    else:
        read = read_json_lines(path, names)
    empty = True
    for piece in read:
        empty = False
        yield piece
    if empty:
        raise UserError(f"{path}: holds no rows")


def first_character(path: Path) -> bytes:
    """Return the first byte of a text file that is not white space."""
    with path.open("rb") as file:
        while piece := file.read(BATCH_BYTES):
            if text := piece.removeprefix(BYTE_ORDER_MARK).lstrip():
                return text[:1]
    return b""


def decoded(raw: bytes, path: Path, line: int) -> str:
    """Return `raw`, which begins at `line`, as text. Raises `UserError` that names the byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {column}). Convert a file of "
            f"another encoding: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8{path.suffix}"
        ) from error


def read_json_lines(path: Path, names: list[str]) -> Iterator[Lines]:
    """Yield the lines of a file with one JSON object a line, about `BATCH_BYTES` at a time."""
    line, start, is_start = 1, 0, True
    with path.open("rb") as file:
        while raw := file.read(BATCH_BYTES):
            raw += file.readline()
            if start == 0 and raw.startswith(BYTE_ORDER_MARK):
                start = len(BYTE_ORDER_MARK)
                raw = raw[start:]
            if raw and not raw.isspace():
                yield Lines(path, line, start, len(raw), names, is_start)
                is_start = False
            line += raw.count(b"\n")
            start += len(raw)


def parsed_line(path: Path, line: int, raw: bytes) -> Any:
    """Return the JSON value of one line. Raises `UserError` for a line that is none."""
    text = decoded(raw, path, line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = f"not JSON ({error}); expected one object a line, found {text.strip()[:60]!r}"
        raise UserError(f"{path}, line {line}: {found}") from error


def read_json_list(path: Path, names: list[str]) -> Iterator[Batch]:
    """Yield the named columns of one JSON list of objects, which is read whole."""
    size = path.stat().st_size
    if size > MAX_LIST_BYTES:
        raise UserError(
            f"{path}: a JSON list of {size:,} bytes, all of which would be in memory at once; expected at most "
            f"{MAX_LIST_BYTES:,}, or JSON Lines, one object a line. Run: "
            f"jq -c '.[]' {shlex.quote(str(path))} > {shlex.quote(str(path.with_suffix('.jsonl')))}"
        )
    try:
        rows = json.loads(decoded(path.read_bytes().removeprefix(BYTE_ORDER_MARK), path, 1))
    except json.JSONDecodeError as error:
        shown = error.doc[error.pos :].strip()[:60] or "the end of the file"
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); expected a list of objects, "
            f"found {shown!r}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{path}: not to be read as JSON ({error}); expected a list of objects") from error
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        yield columns_of(path, "row", list(range(start + 1, start + len(part) + 1)), part, names, start == 0)


def read_csv(path: Path, names: list[str]) -> Iterator[Batch]:
    """Yield the named columns of a comma-separated file with a header line."""
    rows = csv_rows(path, names)
    while part := list(itertools.islice(rows, BATCH_ROWS)):
        columns = {name: [fields[place] for _, fields in part] for place, name in enumerate(names)}
        yield Batch(str(path), "line", [line for line, _ in part], columns)


def csv_rows(path: Path, names: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's first line, counted from 1, and its fields in the columns `names`."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with path.open("rb") as file:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        reader = csv.reader((decoded(raw, path, line) for line, raw in enumerate(file, 1)), strict=True)
        try:
            header = next(reader, [])
            require_columns(str(path), names, header)
            for name in names:
                if header.count(name) > 1:
                    raise UserError(f"{path}, line 1: found the column {name!r} {header.count(name)} times; expected 1")
            places = [header.index(name) for name in names]
            start = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{path}, line {start}: {len(row)} fields; the header has {len(header)} ({', '.join(header)}). "
                        f'A field with a comma or a line break in it belongs in double quotes ("...")'
                    )
                if row:
                    yield start, [row[place] for place in places]
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def read_parquet(path: Path, names: list[str]) -> Iterator[Batch]:
    """Yield the named columns of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    row = 0
    with file:
        require_columns(str(path), names, file.schema_arrow.names)
        try:
            for part in file.iter_batches(batch_size=BATCH_ROWS, columns=names):
                columns = {name: values_of(part.column(name)) for name in names}
                numbers = list(range(row + 1, row + part.num_rows + 1))
                row += part.num_rows
                yield Batch(str(path), "row", numbers, columns)
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{path}, after row {row}: the next rows can't be read ({error}). Fetch or make it again"
            ) from error
