"""Checkpoints: which are whole, from which one a run goes on, and what is said when the disk is full."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from stages.lib.artifact.manifest import describe_files, sync, sync_files, write_json
from stages.lib.errors import UserError
from stages.lib.train.ladder import says

COMPLETE = "complete"  # in a checkpoint: size and sha256 of all its other files, written when these are on the disk
# On a full disk: the words of Python and safetensors, and those of torch.save, which name no cause.
NOT_WRITTEN = ("No space left on device", "PytorchStreamWriter failed writing", "inline_container.cc")


def mark_complete(folder: Path, step: int) -> None:
    """Write `complete` into the checkpoint of `step` under `folder`, when its files are on the disk.

    The files beside the checkpoint, such as the completions so far, are on the disk before that as well.
    """
    checkpoint = folder / f"checkpoint-{step}"
    sync_files(checkpoint)
    for path in folder.iterdir():
        if path.is_file():
            sync(path)
    sync(folder)
    write_json(checkpoint / COMPLETE, describe_files(checkpoint))


def is_whole(checkpoint: Path) -> bool:
    """Say whether a checkpoint has the files that its `complete` states; after a power cut it may not."""
    try:
        stated = json.loads((checkpoint / COMPLETE).read_text())
    except ValueError:
        return False
    found = describe_files(checkpoint)
    return {name: found[name] for name in found if name != COMPLETE} == stated


def last_checkpoint(folder: Path, steps: int) -> str | None:
    """Return the newest whole checkpoint under `folder` for a run of `steps`, or None.

    Deletes a checkpoint without `complete`, which a crash left, and that of the last step, from which transformers'
    Trainer would take one step more. One that is complete and yet not whole is renamed to `torn-STEP`, with a message.
    """
    usable = {}
    for path in folder.glob("checkpoint-*"):
        name = path.name.removeprefix("checkpoint-")
        if not name.isdecimal():
            continue  # somebody's own
        if (path / COMPLETE).is_file() and int(name) < steps:
            usable[int(name)] = path
        else:
            shutil.rmtree(path)
    for step in sorted(usable, reverse=True):
        if is_whole(usable[step]):
            return str(usable[step])
        aside = folder / f"torn-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        usable[step].rename(aside)
        click.echo(f"{usable[step]}: is not whole, as after a power cut; it is now {aside}, and is not used", err=True)
    return None


@contextlib.contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raise `UserError` when the body can't write a file under `folder` because its disk is full."""
    try:
        yield
    except Exception as error:  # OSError, safetensors' own, and RuntimeError of torch
        if not says(error, NOT_WRITTEN):
            raise
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{folder}: a file can't be written; the disk has {free / 1e9:.2f} GB free ({str(error).splitlines()[0]}). "
            f"Free some and run the same command again: it goes on from the last checkpoint"
        ) from error
