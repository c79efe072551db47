"""The manifest of an artifact: read, compared with the files, written."""

import fnmatch
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.lib.artifact.digests import digest_of
from stages.lib.errors import UserError

MANIFEST = "manifest.json"
IDENTITY = "identity.json"  # in an unfinished folder: the result's identity, and that a stage made the folder
OUTSIDE = "outside"  # paths of the files read from outside, each ended by a NUL byte: make looks whether one changed
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # curves for TensorBoard, in no manifest: no two runs write the same bytes
TEMPORARY = ".tmp"
MAX_BYTES = 1 << 26  # of a manifest: one of a thousand files takes a fifth of a megabyte


def read_manifest(folder: Path, stage: str, *reads: str) -> dict[str, Any]:
    """Return the manifest of the finished artifact `folder`, when all its files are there with their sizes.

    `reads` are patterns of the files that the caller will read, whose content is checked as well. Raises `UserError`
    when the folder is not finished, is another stage's, or lost or changed a file since.
    """
    path = folder / MANIFEST
    if not path.is_file():
        is_unfinished = folder.with_name(folder.name + ".unfinished").is_dir()
        state = "it was started and not finished" if is_unfinished else "there is none"
        raise UserError(f"{folder}: {state}; expected the finished output of {stage} there. Run: make {stage}")
    if is_emptied(path):
        raise UserError(f"{folder}: its {MANIFEST} is empty, as after a power cut. Run: make {stage}")
    owner = stage_of(path)
    if owner != stage:
        holds = f"holds the output of {owner!r}" if owner else f"its {MANIFEST} is not one that a stage wrote"
        remedy = f"run: make {stage}" if owner else f"delete {folder} and run: make {stage}"
        raise UserError(f"{folder}: {holds}; expected that of {stage!r}. Name another folder, or {remedy}")
    manifest = manifest_in(path, stage)
    if manifest is None:
        raise UserError(f"{path}: is not as {stage} writes it. Delete {folder} and run: make {stage}")
    to_read = files_read(manifest, reads)
    for wrong in itertools.chain(faults(folder, manifest["files"]), faults(folder, to_read, digest_of)):
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
    """Yield where, what was found and what was expected, for each file that is not as `files` states.

    Sizes are compared; with `digest`, a function that gives a file's sha256, the content too.
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
    """Return the stage that a manifest or identity file names; None when it is not there or names none."""
    stage = object_in(path).get("stage")
    return stage if isinstance(stage, str) else None


def manifest_in(path: Path, stage: str) -> dict[str, Any] | None:
    """Return the manifest `path` if it states `stage` and has the form of one; None if not.

    Its files are named from its folder, each with size in bytes and sha256, and none lies outside.
    """
    stated = object_in(path)
    files, inputs = stated.get("files"), stated.get("inputs")
    if stated.get("stage") != stage or not isinstance(files, dict) or not isinstance(inputs, dict):
        return None
    if not all(isinstance(stated.get(key), dict) for key in ("recipe", "sources", "metrics", "environment", "wall")):
        return None
    for name, entry in files.items():
        is_inside = not name.startswith("/") and "\0" not in name and not {"", ".", ".."} & {*name.split("/")}
        form = (type(entry.get("bytes")), type(entry.get("sha256"))) if isinstance(entry, dict) else ()
        if not is_inside or form != (int, str):
            return None
    read = [digest for each in inputs.values() for digest in (each.values() if isinstance(each, dict) else [None])]
    return stated if all(isinstance(digest, str) for digest in read) else None


def object_in(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`; {} when it is not there, holds none or is larger than `MAX_BYTES`."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    try:
        stated = json.loads(raw) if len(raw) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        return {}
    return stated if isinstance(stated, dict) else {}


def is_emptied(path: Path) -> bool:
    """Say whether the file `path` is empty or holds only NUL bytes, as after a power cut."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not file.read(MAX_BYTES).strip(b"\0")


def refuse_other_run(manifests: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]) -> None:
    """Raise `UserError` unless all artifacts come from one run: each was made from the files that are there now.

    `manifests` and `folders` are by stage. Of an input that is not among them, all have read the same files.
    """
    digests: dict[tuple[str, str], tuple[str | None, Path | str]] = {
        (name, file): (entry["sha256"], folders[name])
        for name, manifest in manifests.items()
        for file, entry in manifest["files"].items()
    }
    for stage, manifest in manifests.items():
        for name, files in manifest["inputs"].items():
            place = folders.get(name, f"the one that {folders[stage]} was made from")
            for file, source in files.items():
                digest, where = digests.setdefault((name, file), (None if name in manifests else source, place))
                if source != digest:
                    raise UserError(
                        f"{folders[stage]}: was made from another {name} ({file}) than {where}, so figures and files "
                        f"would be of different models. Run: make {stage}"
                    )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return sha256 and size in bytes of every file under `folder` that belongs to the result, by relative name."""
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
    inside = sorted(folder.rglob("*"), key=lambda path: (path.is_dir(), -len(path.parts)))
    for path in (*(path for path in inside if path.exists()), folder):
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
