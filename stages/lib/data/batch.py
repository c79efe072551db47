"""A batch of rows, column by column."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.errors import UserError, nearest

BATCH_ROWS = 2000
BATCH_BYTES = 1 << 20  # of a text file
MAX_SHOWN = 400  # characters of a header that is none, and columns that a slip may have meant


class Wanted(NamedTuple):
    """What is read of each row: the columns `names`, a field within a struct by a dotted name, and with `whole` all."""

    names: list[str]
    whole: bool = False


@dataclass(frozen=True)
class Batch:
    """Some rows of one file, column by column."""

    origin: str  # the file, or the hub name and split
    unit: str  # "line" or "row"
    numbers: list[int]  # each row's place in the file, from 1
    columns: dict[str, list[Any]]  # None where a row has no such value
    rows: list[dict[str, Any]] | None = None  # whole, where a reward may ask for any column

    def where(self, index: int) -> str:
        """Return the place of the batch's row `index`, for a message."""
        return f"{self.origin}, {self.unit} {self.numbers[index]}"

    def parsed(self) -> "Batch":
        """Return itself: only JSONL is parsed after it is read."""
        return self


def columns_of(path: Path, unit: str, numbers: list[int], rows: list[Any], wanted: Wanted, is_start: bool) -> Batch:
    """Return a batch of JSON values. Raises `UserError` for one that is no object or, at the start, lacks a column."""
    for number, row in zip(numbers, rows, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{path}, {unit} {number}: a JSON {type(row).__name__}; expected an object with columns")
    if is_start:
        require_columns(str(path), wanted.names, list(rows[0]))
    return batch_of(str(path), unit, numbers, rows, wanted)


def batch_of(origin: str, unit: str, numbers: list[int], rows: list[dict[str, Any]], wanted: Wanted) -> Batch:
    """Return a batch of rows that are dicts."""
    columns = {
        name: [value_of(row, name) for row in rows] if "." in name else [row.get(name) for row in rows]
        for name in wanted.names
    }
    return Batch(origin, unit, numbers, columns, rows if wanted.whole else None)


def value_of(row: Any, name: str) -> Any:
    """Return a row's value in the column `name`, or in the field that a dotted name leads to; None without one."""
    if isinstance(row, dict) and name not in row and "." in name:
        first, _, rest = name.partition(".")
        return value_of(row.get(first), rest)
    return row.get(name) if isinstance(row, dict) else None


def top_column(name: str, found: Sequence[str]) -> str:
    """Return the column that holds `name`: itself, or what stands before its first dot."""
    return name if name in found else name.partition(".")[0]


def require_columns(origin: str, names: list[str], found: list[str], hint: str = "") -> None:
    """Raise `UserError` for a column of `names` that is not among those `found`."""
    for name in names:
        if top_column(name, found) not in found:
            shown = ", ".join(found) or "none"
            shown = shown if len(shown) <= MAX_SHOWN and shown.isprintable() else f"{ascii(shown)[:MAX_SHOWN]}..."
            raise UserError(
                f"{origin}: has no column {name!r}{nearest(name, found[:MAX_SHOWN])}; found: {shown}. "
                f"{hint or 'Name the right one in [[data.sources]]'}"
            )


def values_of(column: Any) -> list[Any]:
    """Return an Arrow array's values; floats of less than 64 bits as the shortest text for them.

    As a Python float, the float32 nearest to 0.1 would be 0.10000000149011612, an answer that nobody gives.
    """
    import numpy as np
    import pyarrow

    values = column.to_pylist()
    if pyarrow.types.is_floating(column.type) and column.type.bit_width < 64:
        number = column.type.to_pandas_dtype()
        return [None if value is None else np.format_float_positional(number(value), trim="-") for value in values]
    return values
