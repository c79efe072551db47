"""JSON Lines files: their rows, read and written."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError


def rows_of(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Return the first `most` rows of a JSON-lines file, or all."""
    with path.open() as file:
        return [json.loads(line) for line in itertools.islice(file, most)]


def first_rows(path: Path, count: int, knob: str) -> list[dict[str, Any]]:
    """Return the first `count` rows of a JSON-lines file. Raises `UserError`, naming `knob`, if it has fewer."""
    rows = rows_of(path, count)
    if len(rows) < count:
        raise UserError(f"{path}: has {len(rows)} problems; {knob} = {count}. Lower it, or prepare more")
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` to `path` as JSON lines, in UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
