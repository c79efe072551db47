"""A batch of rows, column by column."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError, nearest

BATCH_ROWS = 2000
BATCH_BYTES = 1 << 20  # of a text file


@dataclass(frozen=True)
class Batch:
    """Some rows of one file, column by column."""

    origin: str  # the file, or the hub name and split
    unit: str  # "line" or "row"
    numbers: list[int]  # each row's place in the file, from 1
    columns: dict[str, list[Any]]  # None where a row has no such value

    def where(self, index: int) -> str:
        """Return the place of the batch's row `index`, for a message."""
        return f"{self.origin}, {self.unit} {self.numbers[index]}"

    def parsed(self) -> "Batch":
        """Return itself: only JSONL is parsed after it is read."""
        return self


def columns_of(path: Path, unit: str, numbers: list[int], rows: list[Any], names: list[str], is_start: bool) -> Batch:
    """Return a batch of JSON values. Raises `UserError` for one that is no object or, at the start, lacks a column."""
    for number, row in zip(numbers, rows, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{path}, {unit} {number}: a JSON {type(row).__name__}; expected an object with columns")
    if is_start:
        require_columns(str(path), names, list(rows[0]))
    return Batch(str(path), unit, numbers, {name: [row.get(name) for row in rows] for name in names})


def require_columns(origin: str, names: list[str], found: list[str]) -> None:
    """Raise `UserError` for a column of `names` that is not among those `found`."""
    for name in names:
        if name not in found:
            raise UserError(
                f"{origin}: has no column {name!r}{nearest(name, found)}; found: {', '.join(found) or 'none'}. "
                f"Name the right one in [[data.sources]]"
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
