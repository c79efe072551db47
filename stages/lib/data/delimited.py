"""Rows of CSV and TSV files, as people's programs write them.

The separator is the one that Excel states in a first line `sep=;`, else the one at which the header has the columns
that the recipe names: comma, semicolon, tab or bar.
"""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

from stages.lib.data.batch import BATCH_ROWS, Batch, Wanted, require_columns
from stages.lib.data.opened import decoded, lines_of, opened
from stages.lib.errors import UserError

MAX_FIELD_CHARACTERS = 1 << 26  # more is a quote that was never closed
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t"}
NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


def read_delimited(path: Path, kind: str, wanted: Wanted) -> Iterator[Batch]:
    """Yield the wanted columns of a file with a header line; `kind` is ".csv" or ".tsv"."""
    rows = delimited_rows(path, kind, wanted.names)
    header = next(rows)[1]
    places = {name: header.index(name) for name in wanted.names}
    while part := list(itertools.islice(rows, BATCH_ROWS)):
        columns = {name: [fields[place] for _, fields in part] for name, place in places.items()}
        whole = [dict(zip(header, fields, strict=True)) for _, fields in part] if wanted.whole else None
        yield Batch(str(path), "line", [line for line, _ in part], columns, whole)


def delimited_rows(path: Path, kind: str, names: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the header, then each row: its first line, counted from 1, and its fields."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with opened(path) as file:
        first, skipped = stated_separator(file.peek(8)[:8])
        file.read(skipped)
        lines = (decoded(raw, path, line) for line, raw in enumerate(lines_of(file, path), 1 + (skipped > 0)))
        top = next(lines, "")
        separator = first or separator_of(top, SEPARATORS[kind], names)
        reader = csv.reader(itertools.chain([top], lines), delimiter=separator, strict=True)
        before = skipped > 0
        try:
            header = next(reader, [])
            require_header(path, header, names, separator)
            yield 0, header
            start = reader.line_num + before + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{path}, line {start}: {len(row)} fields; the header has {len(header)} ({', '.join(header)}). "
                        f"A field with {NAMES.get(separator, repr(separator))} or a line break in it belongs in double "
                        f'quotes ("...")'
                    )
                if row:
                    yield start, row
                start = reader.line_num + before + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num + before}: not CSV ({error})") from error


def stated_separator(head: bytes) -> tuple[str, int]:
    """Return the separator that a first line `sep=;` states and that line's bytes; ("", 0) without such a line."""
    if head[:4] != b"sep=" or head[5:6] not in (b"\r", b"\n"):
        return "", 0
    return chr(head[4]), 7 if head[5:7] == b"\r\n" else 6


def separator_of(top: str, separators: str, names: list[str]) -> str:
    """Return the first of `separators` at which the header line `top` has all columns; the first where none does."""
    for separator in separators:
        if set(names) <= set(next(csv.reader([top], delimiter=separator), [])):
            return separator
    return separators[0]


def require_header(path: Path, header: list[str], names: list[str], separator: str) -> None:
    """Raise `UserError` for a header that lacks a column or has it twice."""
    hint = ""
    if header and not set(names) & set(header):
        line = separator.join(names)
        hint = f"Name the right ones in [[data.sources]]; if the file has no header line, write one above: {line!r}"
    for name in names:
        if name not in header:
            require_columns(str(path), [name], [each for each in header if each != name.partition(".")[0]], hint)
        if header.count(name) > 1:
            raise UserError(f"{path}, line 1: found the column {name!r} {header.count(name)} times; expected 1")
