"""The manifest of an artifact: read, held against the files, written."""

import fnmatch
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.lib.artifact.digests import digest_of
from stages.lib.errors import UserError

MANIFEST = "manifest.json"
IDENTITY = "identity.json"  # in an unfinished folder: what it will become; its presence says that a stage made it
OUTSIDE = "outside"  # paths of what was read from outside, each ended by a NUL byte: make looks whether one changed
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # curves for TensorBoard: every run writes other bytes, so no manifest states them
TEMPORARY = ".tmp"


def read_manifest(folder: Path, stage: str, *reads: str) -> dict[str, Any]:
    """Return the manifest of the finished artifact `folder`, its files checked for presence and size.

    `reads` are patterns of the names of files that the caller goes on to read: the content of these is checked as well.
    Raises `UserError` when the folder is not finished, is another stage's, or lost or changed a file since.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = folder.with_name(folder.name + ".unfinished").is_dir()
        found = "it was started and not finished" if unfinished else "there is none"
        raise UserError(f"{folder}: {found}; expected the finished output of {stage} there. Run: make {stage}")
    owner = stage_of(path)
    if owner != stage:
        holds = f"holds the output of {owner!r}" if owner else f"its {MANIFEST} is not one that a stage wrote"
        remedy = f"run: make {stage}" if owner else f"delete {folder} and run: make {stage}"
        raise UserError(f"{folder}: {holds}; expected that of {stage!r}. Name another folder, or {remedy}")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path}: lists no files, so {stage} did not write it. Delete {folder} and run: make {stage}")
    wrong = next(faults(folder, manifest["files"]), None)
    wrong = wrong or next(faults(folder, files_read(manifest, reads), digest_of), None)
    if wrong:
        raise UserError(f"{wrong}, as {stage} wrote it. Delete {folder} and run: make {stage}")
    return manifest


def files_read(manifest: Mapping[str, Any], patterns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return those `files` of a manifest whose names match one of `patterns`, in which * stands for any text."""
    return {
        name: stated
        for name, stated in manifest["files"].items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def faults(
    folder: Path, files: Mapping[str, Mapping[str, Any]], digest: Callable[[Path], str] | None = None
) -> Iterator[str]:
    """Yield for each of the stated `files` that is not as stated: where, what was found, what was expected.

    Sizes are compared, and the content too where `digest`, which gives a file's sha256, is named.
    """
    for name, stated in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != stated["bytes"]:
            found = "is gone" if size is None else f"has {size} bytes"
            yield f"{file}: {found}; expected {stated['bytes']} bytes"
        elif digest and (found := digest(file)) != stated["sha256"]:
            yield f"{file}: has the sha256 {found}; expected {stated['sha256']}"


def stage_of(path: Path) -> str | None:
    """Return the stage that the manifest or identity file `path` names; None when it is not there or names none."""
    try:
        stated = json.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    return stated.get("stage") if isinstance(stated, dict) else None


def is_emptied(path: Path) -> bool:
    """Say whether the file `path` is there and holds nothing, or only NUL bytes: what a power cut leaves of a file."""
    return path.is_file() and not path.read_bytes().strip(b"\0")


def refuse_other_run(manifests: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]) -> None:
    """Raise `UserError` unless all artifacts come from one run: what one was made from is what is there now.

    `manifests` and `folders` are by stage. Of an input that is not among them, all who read a file read the same.
    """
    stated: dict[tuple[str, str], tuple[str | None, Path | str]] = {
        (name, file): (described["sha256"], folders[name])
        for name, manifest in manifests.items()
        for file, described in manifest["files"].items()
    }
    for stage, manifest in manifests.items():
        for name, files in manifest["inputs"].items():
            place = folders.get(name, f"the one that {folders[stage]} was made from")
            for file, claimed in files.items():
                digest, where = stated.setdefault((name, file), (None if name in manifests else claimed, place))
                if claimed != digest:
                    raise UserError(
                        f"{folders[stage]}: was made from another {name} ({file}) than {where}. Its figures and files "
                        f"would not be those of one model. Run: make {stage}"
                    )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return sha256 and size in bytes of every file under `folder` that is part of the result, by relative name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: {"sha256": digest_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name not in (IDENTITY, OUTSIDE) and not name.startswith((f"{CHECKPOINTS}/", f"{LOGS}/"))
    }


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all, and on the disk before this returns."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    write_whole(path, f"{text}\n".encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and on the disk before this returns."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync_files(folder: Path) -> None:
    """Return when all that `folder` holds is on the disk: first its files, then the folders that name them."""
    inside = sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for path in [*(path for path in inside if path.is_file()), *(path for path in inside if path.is_dir()), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # some file systems can't do it for a folder
            raise
    finally:
        os.close(opened)
