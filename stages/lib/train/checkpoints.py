"""Checkpoints: which are whole, and from which one a run goes on."""

import os
import shutil
from pathlib import Path

import click

from stages.lib.artifact.manifest import describe_files, object_in, sync, sync_files, write_json
from stages.lib.train import ranks

COMPLETE = "complete"  # in a checkpoint: size and sha256 of all its other files, written when these are on the disk


def collect_random_states(checkpoint: Path) -> None:
    """Return when the random states of all ranks are in the checkpoint of rank 0; all ranks call this."""
    size = str(ranks.world_size())
    if os.environ.get("LOCAL_WORLD_SIZE", size) == size:  # on one machine, each has written its own there
        ranks.largest(0)
        return
    from accelerate.utils import gather_object

    own = checkpoint / f"rng_state_{ranks.rank()}.pth"
    states = gather_object([(own.name, own.read_bytes())])
    if ranks.is_first():
        for name, state in states:
            (checkpoint / name).write_bytes(state)
    elif os.environ["RANK"] != os.environ["LOCAL_RANK"]:
        shutil.rmtree(checkpoint, ignore_errors=True)  # the checkpoints are on node 0


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
    found = describe_files(checkpoint)
    return {name: found[name] for name in found if name != COMPLETE} == object_in(checkpoint / COMPLETE)


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
