"""Rows from the hub."""

from collections.abc import Iterator
from typing import Any

from stages.lib.data.batch import BATCH_ROWS, Batch, require_columns
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source


def read_hub(source: Source, wanted: list[str]) -> Iterator[Batch]:
    """Yield the named columns of a dataset on the hub, at the revision the recipe pins, as they arrive."""
    import datasets

    origin = f"{source.name} ({source.split})"
    numbers: list[int] = []
    rows: list[dict[str, Any]] = []
    row = 0
    try:
        stream = datasets.load_dataset(
            source.name, source.config or None, split=source.split, revision=source.revision, streaming=True
        )
        for row, values in enumerate(stream, 1):
            if row == 1:
                require_columns(origin, wanted, list(values))
            numbers.append(row)
            rows.append(values)
            if len(rows) == BATCH_ROWS:
                yield Batch(origin, "row", numbers, {name: [value.get(name) for value in rows] for name in wanted})
                numbers, rows = [], []
    except (OSError, ValueError, RuntimeError) as error:
        # What `datasets` raises for no network, no such dataset, configuration, split or revision.
        raise UserError(
            f"{source.name}: the hub did not give split {source.split!r} of configuration "
            f"{source.config or 'default'!r} at {source.revision}, after {row} rows: {str(error).strip()[:300]}. "
            f"With a local copy: make ... DATA=FOLDER"
        ) from error
    if not row:
        raise UserError(f"{origin}: holds no rows")
    if rows:
        yield Batch(origin, "row", numbers, {name: [value.get(name) for value in rows] for name in wanted})
