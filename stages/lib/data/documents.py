"""Rows of one JSON document, which is read whole: a list, an object with one, or columns as pandas writes them."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.data.batch import BATCH_ROWS, Batch, Wanted, columns_of, top_column
from stages.lib.data.opened import MAX_WHOLE_BYTES, decoded, lines_of, opened, rest_of_line
from stages.lib.errors import UserError


def is_document(path: Path, kind: str) -> bool:
    """Return whether a JSON file holds one list or, as `.json`, one object, and not an object a line."""
    with opened(path) as file:
        while (ahead := file.peek(1)) and ahead.isspace():
            file.read(len(ahead))
        line = file.readline(1 << 12)
        while line and line.isspace():  # at most what the stream holds ready
            line = file.readline(1 << 12)
        if line.lstrip().startswith(b"["):
            return True
        line += b"" if line.endswith(b"\n") else rest_of_line(file, path)
        if kind != ".json" or not line:
            return False
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return not line.rstrip().endswith(b"}")  # a line that ends its object is a bad line, else a document begins
        return not any(rest and not rest.isspace() for rest in lines_of(file, path))


def read_document(path: Path, wanted: Wanted, split: str) -> Iterator[Batch]:
    """Yield the wanted columns of one JSON document. `split` names the list in an object that holds several."""
    value = parsed_document(path)
    if not isinstance(value, list | dict):
        raise UserError(f"{path}: one JSON {type(value).__name__}; expected a list of objects")
    rows = value if isinstance(value, list) else rows_of_object(path, value, wanted, split)
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        yield columns_of(path, "row", list(range(start + 1, start + len(part) + 1)), part, wanted, start == 0)


def parsed_document(path: Path) -> Any:
    """Return the file's JSON value. Raises `UserError` for a file that is too large or no JSON."""
    with opened(path) as file:
        size = path.stat().st_size  # before it is read: what is packed grows
        raw = file.read(MAX_WHOLE_BYTES + 1) if size <= MAX_WHOLE_BYTES else b""
    if (size := max(size, len(raw))) > MAX_WHOLE_BYTES:
        raise UserError(
            f"{path}: a JSON list of {size:,} bytes, all of which would be in memory at once; expected at most "
            f"{MAX_WHOLE_BYTES:,}, or JSON Lines, one object a line. Run: "
            f"jq -c '.[]' {shlex.quote(str(path))} > {shlex.quote(str(path.with_suffix('.jsonl')))}"
        )
    try:
        return json.loads(decoded(raw, path, 1))
    except json.JSONDecodeError as error:
        shown = error.doc[error.pos :].strip()[:60] or "the end of the file"
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); expected a list of objects, "
            f"found {shown!r}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{path}: not to be read as JSON ({error}); expected a list of objects") from error


def rows_of_object(path: Path, value: dict[str, Any], wanted: Wanted, split: str) -> list[Any]:
    """Return the rows in an object: its list of objects, its columns as pandas writes them, or itself, one row."""
    tops = [top_column(name, list(value)) for name in wanted.names]
    if all(name in value for name in tops):
        columns = {name: value[name] for name in (value if wanted.whole else tops)}
        keys = value[tops[0]].keys() if isinstance(value[tops[0]], dict) else ()
        if keys and all(isinstance(each, dict) and each.keys() == keys for each in columns.values()):
            return [{name: each[key] for name, each in columns.items()} for key in keys]
        if all(isinstance(each, list) and len(each) == len(value[tops[0]]) for each in columns.values()):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [value]
    lists = {
        name: each for name, each in value.items() if isinstance(each, list) and each and isinstance(each[0], dict)
    }
    if split in lists:
        return lists[split]
    if len(lists) == 1:
        return next(iter(lists.values()))
    found = ", ".join(lists) or f"an object with {', '.join(list(value)[:8]) or 'nothing in it'}"
    raise UserError(
        f"{path}: one JSON object; expected a list of rows, or an object that holds one; found {found}. Where several "
        f"lists are found, split = NAME in [[data.sources]] takes one"
    )
