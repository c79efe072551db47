"""The identity of an artifact: what decides whether its stage runs again.

It is the recipe's tables that the stage reads, the digests of the files that it reads, of its inputs and from outside,
and the digest of its code. An input that comes out as it was, byte for byte, changes nothing.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from stages.lib.artifact.code import code_digest
from stages.lib.artifact.digests import Stamp, digest_of, sha256_of, stamp_of
from stages.lib.artifact.manifest import (
    IDENTITY,
    MANIFEST,
    OUTSIDE,
    faults,
    files_read,
    read_manifest,
    stage_of,
    write_json,
)
from stages.lib.errors import UserError


def take_identity(
    stage: str,
    tables: Mapping[str, Any],
    inputs: Mapping[str, tuple[Path, Sequence[str]]],
    sources: Mapping[str, Path],
) -> tuple[dict[str, Any], dict[Path, tuple[Stamp, str]]]:
    """Return what decides whether `stage` runs, and each file that it is about to read, with stamp and sha256.

    Raises `UserError` for an input that is not finished or lost or changed what is read of it.
    """
    read: dict[Path, tuple[Stamp, str]] = {}
    digests: dict[str, dict[str, str]] = {}
    for name, (folder, patterns) in sorted(inputs.items()):
        files = files_read(read_manifest(folder, name), patterns)
        if not files:
            raise UserError(f"{folder}: holds no {' or '.join(patterns)}, which {stage} reads. Run: make {name}")
        digests[name] = {file: stated["sha256"] for file, stated in files.items()}
        read |= {folder / file: (stamp_of(folder / file), digest) for file, digest in digests[name].items()}
        read_manifest(folder, name, *patterns)  # the bytes, after the stamps
    digests["sources"] = {}
    for name, path in sorted(sources.items()):
        if path.is_dir():
            continue
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; {stage} reads it as {name!r}")
        stamp = stamp_of(path)
        digests["sources"][name] = digest_of(path)
        read[path] = (stamp, digests["sources"][name])
    identity = {
        "stage": stage,
        "recipe": json.loads(json.dumps(dict(tables))),
        "sources": digests.pop("sources"),
        "inputs": digests,
        "code": code_digest(stage),
    }
    return identity, read


def outside_paths(paths: Iterable[Path]) -> bytes:
    """Return the content of the file `outside`: absolute paths, those of links and what they lead to, ended by NUL."""
    both = {str(each) for path in paths for each in (path.absolute(), path.resolve())}
    return b"".join(os.fsencode(path) + b"\0" for path in sorted(both))


def is_current(out: Path, identity: Mapping[str, Any]) -> bool:
    """Say whether the finished artifact `out` states exactly this identity and still has its files, byte for byte."""
    if stage_of(out / MANIFEST) is None:
        return False
    manifest = json.loads((out / MANIFEST).read_text())
    if any(manifest.get(key) != value for key, value in identity.items()):
        return False
    wrong = next(faults(out, manifest["files"], digest_of), None)
    if wrong or not (out / OUTSIDE).is_file():
        click.echo(f"{identity['stage']}: {wrong or f'{out / OUTSIDE}: is gone'}. It is made again", err=True)
        return False
    return True


def refuse_replaced(read: Mapping[Path, tuple[Stamp, str]], folder: Path, stage: str) -> None:
    """Raise `UserError` when a file that was read is not what it was at the start; the work so far is then no use."""
    for path, (stamp, digest) in read.items():
        if not path.is_file() or (stamp_of(path) != stamp and sha256_of(path) != digest):
            write_json(folder / IDENTITY, {"stage": stage})  # so that nobody carries on from these checkpoints
            raise UserError(
                f"{path}: was replaced while {stage} read it, so nothing was finished; expected it to stay as it was "
                f"at the start. Is another make at work there? When it has ended, run: make {stage}"
            )


def say_what_is_lost(checkpoints: Path, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Say which training steps can't be carried on from, and what changed since they were taken."""
    steps = [int(name) for path in checkpoints.glob("checkpoint-*") if (name := path.name[11:]).isdecimal()]
    if not steps:
        return
    was, now = dict(leaves(before)), dict(leaves(identity))
    changed = []
    for key in sorted(key for key in was | now if was.get(key) != now.get(key)):
        match key:
            case ("recipe", table, *names):
                changed.append(f"[{table}] {'.'.join(names)} = {now.get(key)!r}, before {was.get(key)!r}")
            case ("inputs", name, *files):
                changed.append(f"{'/'.join(files)} of {name}")
            case ("sources", name):
                changed.append(name)
            case ("code",):
                changed.append(f"the code of {identity['stage']}")
    what = "; ".join(changed) if "code" in before else "what they were made from is not known"
    click.echo(f"{identity['stage']}: starts anew, {max(steps)} steps are lost. Changed: {what}", err=True)


def leaves(value: Any, *key: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield whatever is no dict in nested dicts, with the keys that lead there."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from leaves(inside, *key, name)
    else:
        yield key, value
