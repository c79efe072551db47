"""Rows of JSON Lines files."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError


def first_rows(path: Path, count: int, knob: str) -> list[dict[str, Any]]:
    """Return the first `count` rows of a JSON-lines file. Raises `UserError`, naming `knob`, if it has fewer."""
    with path.open() as file:
        rows = [json.loads(line) for line in itertools.islice(file, count)]
    if len(rows) < count:
        raise UserError(f"{path}: has {len(rows)} problems; {knob} = {count}. Lower it, or prepare more")
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` to `path` as JSON lines, in UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
