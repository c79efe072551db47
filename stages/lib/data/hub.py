"""Rows from the hub."""

import itertools
from collections.abc import Iterator

from stages.lib.data.batch import BATCH_ROWS, Batch, Wanted, batch_of, require_columns
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source


def read_hub(source: Source, wanted: Wanted) -> Iterator[Batch]:
    """Yield the wanted columns of a dataset on the hub, at the recipe's revision, while they arrive.

    Raises `UserError` for a dataset that the hub does not give, that lacks a column or that has no rows.
    """
    import datasets

    origin = f"{source.name} ({source.split})"
    row = 0
    try:
        stream = datasets.load_dataset(
            source.name, source.config or None, split=source.split, revision=source.revision, streaming=True
        )
        rows = iter(stream)
        while part := list(itertools.islice(rows, BATCH_ROWS)):
            if not row:
                require_columns(origin, wanted.names, list(part[0]))
            numbers = list(range(row + 1, row + len(part) + 1))
            row += len(part)
            yield batch_of(origin, "row", numbers, part, wanted)
    except (OSError, ValueError, RuntimeError) as error:
        # `datasets` raises these for no network and for no such dataset, configuration, split or revision.
        raise UserError(
            f"{source.name}: the hub did not give split {source.split!r} of configuration "
            f"{source.config or 'default'!r} at {source.revision}, after {row} rows: {str(error).strip()[:300]}. "
            f"With a local copy: make ... DATA=FOLDER"
        ) from error
    if not row:
        raise UserError(f"{origin}: holds no rows")
