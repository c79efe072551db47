"""The artifact of a stage: a folder that is finished exactly when it holds `manifest.json`.

A stage writes into `<out>.unfinished`. When its work is done it writes the manifest there, last and by rename, and the
folder takes the place of the one before it. So a folder without the suffix is always whole. A process killed at any
moment leaves the old result or the new one, and at most an `.unfinished` folder that the next run goes on from.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from stages.lib.artifact.environment import environment_now
from stages.lib.artifact.identity import (
    is_current,
    outside_paths,
    refuse_other_identity,
    refusing_replaced,
    say_what_is_lost,
    take_identity,
)
from stages.lib.artifact.manifest import (
    CHECKPOINTS,
    IDENTITY,
    LOGS,
    MANIFEST,
    OUTSIDE,
    TEMPORARY,
    describe_files,
    is_emptied,
    manifest_in,
    object_in,
    stage_of,
    sync,
    sync_files,
    write_json,
    write_whole,
)
from stages.lib.errors import UserError

# Before the recipe and the code are read. It becomes the manifest's mtime: make starts the stage after a later change.
STARTED = time.time()
# In the environment of a rank, one of several processes that train for a stage: the folder that it writes in.
RANK_FOLDER = "TEMPER_RANK_FOLDER"


@dataclass
class Run:
    """A stage at work: write files under `folder`, put figures into `metrics`, seconds into `seconds`."""

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)  # of llama.cpp, by GGUF file: measured, in no identity
    world_size: int = 1  # how many processes trained
    inputs: dict[str, Path] = field(default_factory=dict)  # the finished folders that the stage reads, by stage

    @property
    def checkpoints(self) -> Path:
        """The folder for training checkpoints: kept when the stage is killed, deleted when it is finished."""
        return self.folder / CHECKPOINTS


@contextlib.contextmanager
def write_artifact(
    out: Path,
    stage: str,
    tables: Mapping[str, Any],
    inputs: Mapping[str, tuple[Path, Sequence[str]]],
    *,
    sources: Mapping[str, Path] | None = None,
    room_bytes: int = 0,
) -> Iterator[Run]:
    """Open the artifact `out` of `stage` for writing; leave the process with exit code 0 if it is up to date.

    `tables` are the recipe's tables that the stage reads; `inputs` the finished folders, by stage, each with the names
    of the files that it reads (* stands for any text); `sources` the raw files from outside, by name. These three and
    the code decide whether there is work to do. A folder among the sources counts for make alone, which looks whether
    its files came or went. `room_bytes` is the most that the stage writes. The body runs once, with a `Run`; if it
    returns, the artifact is finished, and if it raises, the artifact of before is still there.

    Raises `UserError` when an input is not finished, or was replaced while the body ran, when `out` holds a file that
    this stage did not write, when another process is writing it, or when the disk has too little room.
    """
    if RANK_FOLDER in os.environ:  # a rank: the process that started it holds the artifact
        yield run_of_rank(stage, tables, inputs, sources or {})
        return
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: expected the name of a folder for {stage} to write, such as artifacts/{stage}")
    identity, to_read = take_identity(stage, tables, inputs, sources or {})
    outside = outside_paths((sources or {}).values())
    folder = out.with_name(out.name + ".unfinished")
    if not is_emptied(out / MANIFEST):
        refuse_foreign(out, stage)
    with lock_artifact(folder, stage):
        if is_emptied(out / MANIFEST):
            set_aside(out, stage)
        if stage_of(folder / MANIFEST) == stage:  # killed before the last rename
            put_in_place(folder, out, stage)
        if out.exists():
            remove_replaced(out, stage)  # killed while it deleted that
        if is_current(out, identity):
            click.echo(f"{stage}: up to date, {out} already holds this recipe, these inputs and this code")
            if (out / OUTSIDE).read_bytes() != outside:
                write_whole(out / OUTSIDE, outside)
            os.utime(out / MANIFEST, (STARTED, STARTED))
            raise SystemExit(0)
        check_room(out, stage, room_bytes)
        checkpoints = take_over(folder, stage, identity)
        environment, start = environment_now(), time.time()
        run = Run(folder, inputs={name: path for name, (path, _) in inputs.items()})
        if checkpoints:
            click.echo(f"{stage}: carrying on from {folder / CHECKPOINTS}")
        with refusing_replaced(to_read, folder, stage):
            yield run
        result = {"metrics": run.metrics, "files": describe_files(folder)}
        environment |= {"world_size": run.world_size} | ({"threads": run.threads} if run.threads else {})
        manifest = {**identity, **result, "environment": environment, "wall": wall(start, run.seconds)}
        write_whole(folder / OUTSIDE, outside)
        sync_files(folder)
        write_json(folder / MANIFEST, manifest)
        os.utime(folder / MANIFEST, (STARTED, STARTED))
        put_in_place(folder, out, stage)
    click.echo(f"{stage}: finished {out} in {manifest['wall']['seconds']:.0f} s")


def run_of_rank(
    stage: str,
    tables: Mapping[str, Any],
    inputs: Mapping[str, tuple[Path, Sequence[str]]],
    sources: Mapping[str, Path],
) -> Run:
    """Return the stage at work that this rank is part of.

    Raises `UserError` on another machine than node 0, when its checkout or a file from outside is not that of node 0.
    """
    folder = Path(os.environ[RANK_FOLDER])
    if os.environ.get("RANK") != os.environ.get("LOCAL_RANK"):
        refuse_other_identity(folder, take_identity(stage, tables, inputs, sources)[0])
    return Run(folder)


def wall(started: float, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return when a stage started, in UTC, how many seconds it took, and how many each of its parts did."""
    utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
    parts = {name: round(value, 3) for name, value in seconds.items()}
    return {"started": utc, "seconds": round(time.time() - started, 1), **parts}


def refuse_foreign(out: Path, stage: str) -> None:
    """Raise `UserError` when `out` holds a file that `stage` did not write, which would be lost."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder for {stage} to write. Name another --out")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    manifest = manifest_in(out / MANIFEST, stage)
    if manifest is not None:
        names -= {MANIFEST, OUTSIDE, OUTSIDE + TEMPORARY, *manifest["files"]}
        names -= {name for name in names if name.startswith(f"{LOGS}/")}
    foreign = sorted(names)
    if foreign:
        raise UserError(
            f"{out}: holds {foreign[0]!r}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}, which {stage} did "
            f"not write and will not delete. Move it away or name another --out"
        )


def check_room(out: Path, stage: str, room_bytes: int) -> None:
    """Raise `UserError` when the file system that will hold `out` has less than `room_bytes` free."""
    parent = next(path for path in (out, *out.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < room_bytes:
        raise UserError(
            f"{out}: the disk has {free / 1e9:.2f} GB free; {stage} needs {room_bytes / 1e9:.2f} GB. "
            f"Free some, or put artifacts/ on a larger disk. Nothing was changed"
        )


@contextlib.contextmanager
def lock_artifact(folder: Path, stage: str) -> Iterator[None]:
    """Hold the lock of an artifact while it is written; the system releases it, however the process ends."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(
            f"{folder.parent}: {stage} can't write there ({error.strerror}); expected a folder of yours on a disk that "
            f"can be written. Name another --out, or fix its owner or mount"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is running {stage} there; wait for it or end it") from error
        yield


def take_over(folder: Path, stage: str, identity: Mapping[str, Any]) -> bool:
    """Empty `folder` but for checkpoints of this very identity; return whether there are any."""
    marker = folder / IDENTITY
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if stage_of(marker) != stage and not names <= {IDENTITY + TEMPORARY}:
            raise UserError(f"{folder}: was not made by {stage}, which will not empty it. Move it away")
        before = object_in(marker)
        same = before == identity
        if not same:
            say_what_is_lost(folder / CHECKPOINTS, before, identity)
            write_json(marker, {"stage": stage})  # if this is killed now, the checkpoints must not count
        for path in list(folder.iterdir()):
            if path.name != IDENTITY and not (same and path.name == CHECKPOINTS):
                remove_folder(path)
    folder.mkdir(exist_ok=True)
    write_json(marker, identity)
    return (folder / CHECKPOINTS).is_dir()


def put_in_place(folder: Path, out: Path, stage: str) -> None:
    """Rename the whole artifact `folder` to `out`. After a crash in between, the next `write_artifact` goes on here."""
    refuse_foreign(out, stage)  # once more: hours may have passed
    before = remove_replaced(out, stage)
    remove_folder(folder / CHECKPOINTS)
    (folder / IDENTITY).unlink(missing_ok=True)
    sync(folder)  # or a power cut might bring these back beside the result, where they are nobody's
    if out.exists():
        out.rename(before)
    folder.rename(out)
    sync(out.parent)
    remove_folder(before)


def set_aside(out: Path, stage: str) -> None:
    """Rename the artifact `out`, whose manifest a power cut emptied: nothing says now which stage wrote its files."""
    aside = out.with_name(out.name + ".emptied")
    if aside.exists():
        raise UserError(f"{out}: its {MANIFEST} is empty, and {aside} is in the way of it. Move both away")
    out.rename(aside)
    click.echo(f"{stage}: {out}: its {MANIFEST} is empty, so it is made again. The old files are in {aside}", err=True)


def remove_replaced(out: Path, stage: str) -> Path:
    """Delete the artifact that `out` replaced, if it is still there; return its path."""
    before = out.with_name(out.name + ".replaced")
    refuse_foreign(before, stage)
    remove_folder(before)
    return before


def remove_folder(path: Path) -> None:
    """Delete a file or an artifact, if there is one; the manifest last: it says which stage wrote the rest."""
    if path.is_dir() and not path.is_symlink():
        for inside in sorted(path.iterdir(), key=lambda inside: inside.name == MANIFEST):
            shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
