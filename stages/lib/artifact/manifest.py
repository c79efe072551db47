"""The manifest of an artifact: read, checked, digested, written."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError

MANIFEST = "manifest.json"
IDENTITY = "identity.json"  # in an unfinished folder: what it will become; its presence says that a stage made it
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # curves for TensorBoard: every run writes other bytes, so no manifest states them
TEMPORARY = ".tmp"
UNDIGESTED = ("environment", "wall")  # where and how long: a record, of which no later stage's result depends


def read_manifest(folder: Path, stage: str) -> dict[str, Any]:
    """Return the manifest of the finished artifact `folder`, its files checked for presence and size.

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
    for name, described in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != described["bytes"]:
            found = "is gone" if size is None else f"has {size} bytes"
            raise UserError(
                f"{file}: {found}; expected {described['bytes']} bytes, as {stage} wrote it. "
                f"Delete {folder} and run: make {stage}"
            )
    return manifest


def stage_of(path: Path) -> str | None:
    """Return the stage that the manifest or identity file `path` names; None when it is not there or names none."""
    try:
        stated = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return stated.get("stage") if isinstance(stated, dict) else None


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of what a manifest vouches for: all of it but where and in what time it was made."""
    kept = {key: value for key, value in manifest.items() if key not in UNDIGESTED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content. Raises `UserError` if there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all, and on the disk before this returns."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return sha256 and size in bytes of every file under `folder` that is part of the result, by relative name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name != IDENTITY and not name.startswith((f"{CHECKPOINTS}/", f"{LOGS}/"))
    }


def is_current(out: Path, identity: Mapping[str, Any]) -> bool:
    """Say whether the finished artifact `out` states exactly this identity and still has its files."""
    if not (out / MANIFEST).is_file():
        return False
    manifest = json.loads((out / MANIFEST).read_text())
    if any(manifest.get(key) != value for key, value in identity.items()):
        return False
    return all(
        (out / name).is_file() and (out / name).stat().st_size == described["bytes"]
        for name, described in manifest["files"].items()
    )
