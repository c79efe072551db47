"""Rows of a recipe's sources, read a batch at a time: from the hub, or from JSON, CSV, TSV and Parquet files.

Only a JSON document, a list for example, is read whole. Every message on a bad file names the file, the line or row,
what was found and what was expected. No encoding is guessed.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.data.batch import BATCH_BYTES, Batch, Wanted, columns_of
from stages.lib.data.delimited import read_delimited
from stages.lib.data.documents import is_document, read_document
from stages.lib.data.hub import files_of_modelscope, read_hub
from stages.lib.data.opened import decoded, is_as_stored, opened, rest_of_line
from stages.lib.data.parquet import read_parquet
from stages.lib.data.place import kind_of_file
from stages.lib.data.reasoning_gym import read_gym
from stages.lib.data.shapes import as_list
from stages.lib.errors import UserError
from stages.lib.recipe.tables import GYM, Source


@dataclass(frozen=True)
class Lines:
    """Lines of a JSONL file, which `parsed` reads again and parses, maybe in another process."""

    path: Path
    first: int  # line number of the first
    start: int  # where they begin in the file, in bytes
    size: int  # bytes
    wanted: Wanted
    is_start: bool  # whether the file's first row is in here
    raw: bytes = b""  # the lines themselves, of a file that has to be unpacked

    @property
    def origin(self) -> str:
        """Return the file, as `Batch` names it."""
        return str(self.path)

    def parsed(self) -> Batch:
        """Return the rows, blank lines left out. Raises `UserError` for a line that is not one JSON object."""
        raw = self.raw
        if not raw:
            with self.path.open("rb") as file:
                file.seek(self.start)
                raw = file.read(self.size)
        lines = raw.split(b"\n")
        numbers = [number for number, text in enumerate(lines, self.first) if text and not text.isspace()]
        kept = lines if len(numbers) == len(lines) else [lines[number - self.first] for number in numbers]
        try:  # one call for all lines takes half the time
            rows = json.loads(f"[{b','.join(kept).decode('utf-8')}]")
        except (ValueError, RecursionError):
            rows = []
        if len(rows) != len(kept):
            rows = [parsed_line(self.path, number, text) for number, text in zip(numbers, kept, strict=True)]
        return columns_of(self.path, "line", numbers, rows, self.wanted, self.is_start)


def read_batches(source: Source, files: list[Path], whole: bool = False) -> Iterator[Batch | Lines]:
    """Yield the columns that a source names, of at most `max_rows` rows; with `whole`, the rows with all columns, too.

    Raises `UserError`, here or in `parsed`, for a file that is not what its name says, for a missing column, and for no
    rows at all.
    """
    names = (*as_list(source.question), source.answer, source.solution, *as_list(source.choices))
    wanted = Wanted([name for name in dict.fromkeys(names) if name], whole)
    if source.hub and not files:
        files = files_of_modelscope(source)
    of_files = itertools.chain.from_iterable(read_file(file, wanted, source.split) for file in files)
    read = of_files if files else (read_gym if source.name == GYM else read_hub)(source, wanted)
    if not source.max_rows:
        yield from read
        return
    left = source.max_rows
    for piece in read:
        batch = piece.parsed()
        columns = {name: values[:left] for name, values in batch.columns.items()}
        rows = None if batch.rows is None else batch.rows[:left]
        yield Batch(batch.origin, batch.unit, batch.numbers[:left], columns, rows)
        left -= len(batch.numbers)
        if left <= 0:
            return


def read_file(path: Path, wanted: Wanted, split: str) -> Iterator[Batch | Lines]:
    """Yield the wanted columns of one file. Raises `UserError` when it has no rows."""
    kind = kind_of_file(path)
    read: Iterator[Batch | Lines]
    if kind == ".parquet":
        read = read_parquet(path, wanted)
    elif kind in (".csv", ".tsv"):
        read = read_delimited(path, kind, wanted)
    elif is_document(path, kind):
        read = read_document(path, wanted, split)
    else:
        read = read_json_lines(path, wanted)
    empty = True
    for piece in read:
        empty = False
        yield piece
    if empty:
        raise UserError(f"{path}: holds no rows")


def read_json_lines(path: Path, wanted: Wanted) -> Iterator[Lines]:
    """Yield the lines of a file with one JSON object a line, about `BATCH_BYTES` at a time."""
    line, is_start, as_stored = 1, True, is_as_stored(path)
    with opened(path) as file:
        start = file.tell() if as_stored else 0
        while raw := file.read(BATCH_BYTES):
            raw += rest_of_line(file, path)
            if not raw.isspace():
                yield Lines(path, line, start, len(raw), wanted, is_start, b"" if as_stored else raw)
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
