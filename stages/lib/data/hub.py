"""Rows from the hub."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stages.lib import modelscope
from stages.lib.data.batch import BATCH_ROWS, Batch, Wanted, batch_of, require_columns
from stages.lib.data.place import files_in
from stages.lib.errors import UserError
from stages.lib.mirror import keep_to_mirror
from stages.lib.recipe.tables import Source


def read_hub(source: Source, wanted: Wanted) -> Iterator[Batch]:
    """Yield the wanted columns of a dataset on the hub, at the recipe's revision, while they arrive.

    Raises `UserError` for a dataset that the hub does not give, that lacks a column or that has no rows.
    """
    import datasets

    keep_to_mirror()
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


def files_of_modelscope(source: Source) -> list[Path]:
    """Return the files of a source's split, fetched from ModelScope: as in a local folder, its card or names say which.

    Raises `UserError` where they name none, and for what ModelScope does not give.
    """
    chosen: list[str] = []

    def card(paths: list[str], folder: Path) -> list[str]:
        return [path for path in paths if path == "README.md"]

    def choose(paths: list[str], folder: Path) -> list[str]:
        with tempfile.TemporaryDirectory() as temporary:  # the names without the bytes: what a local folder is read by
            for path in paths:
                (place := Path(temporary, path)).parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes((folder / path).read_bytes() if path == "README.md" else b"")
            try:
                found = files_in(Path(temporary), source)
            except UserError as error:
                named = error.message.replace(temporary, f"{source.name} on ModelScope")
                raise UserError(named.partition(". For one of these files write")[0]) from error
            chosen.extend(path.relative_to(temporary).as_posix() for path in found)
        return chosen

    modelscope.fetch("datasets", source.name, source.revision, card)
    folder = modelscope.fetch("datasets", source.name, source.revision, choose)
    return [folder / path for path in chosen]
