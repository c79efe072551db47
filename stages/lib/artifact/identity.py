"""The identity of an artifact, which decides whether its stage runs again.

It states the recipe's tables that the stage reads, the digests of the files that it reads, of its inputs and from
outside, and the digest of its code. An input that comes out as it was, byte for byte, changes nothing.
"""

import contextlib
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
    manifest_in,
    object_in,
    read_manifest,
    write_json,
)
from stages.lib.errors import UserError


def take_identity(
    stage: str,
    tables: Mapping[str, Any],
    inputs: Mapping[str, tuple[Path, Sequence[str]]],
    sources: Mapping[str, Path],
) -> tuple[dict[str, Any], dict[Path, tuple[Stamp, str]]]:
    """Return the identity of `stage`, and each file that it will read, with stamp and sha256.

    Raises `UserError` for an input that is not finished, and for a file to read that is lost or changed.
    """
    to_read: dict[Path, tuple[Stamp, str]] = {}
    digests: dict[str, dict[str, str]] = {}
    for name, (folder, patterns) in sorted(inputs.items()):
        files = files_read(read_manifest(folder, name), patterns)
        if not files:
            raise UserError(f"{folder}: holds no {' or '.join(patterns)}, which {stage} reads. Run: make {name}")
        digests[name] = {file: entry["sha256"] for file, entry in files.items()}
        to_read |= {folder / file: (stamp_of(folder / file), digest) for file, digest in digests[name].items()}
        read_manifest(folder, name, *patterns)  # the bytes, after the stamps
    outside: dict[str, str] = {}
    for name, path in sorted(sources.items()):
        if path.is_dir():
            continue
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; {stage} reads it as {name!r}")
        to_read[path] = (stamp_of(path), digest_of(path))
        outside[name] = to_read[path][1]
    recipe = json.loads(json.dumps(dict(tables)))
    identity = {"stage": stage, "recipe": recipe, "sources": outside, "inputs": digests, "code": code_digest(stage)}
    return identity, to_read


def outside_paths(paths: Iterable[Path]) -> bytes:
    """Return the content of the file `outside`: absolute paths, of links and of their targets, each ended by NUL."""
    both = {str(each) for path in paths for each in (path.absolute(), path.resolve())}
    return b"".join(os.fsencode(path) + b"\0" for path in sorted(both))


def is_current(out: Path, identity: Mapping[str, Any]) -> bool:
    """Say whether the finished artifact `out` states exactly this identity and still has its files, byte for byte."""
    manifest = manifest_in(out / MANIFEST, identity["stage"])
    if manifest is None:
        return False
    before = {key: manifest.get(key) for key in identity}
    if before != identity:
        click.echo(f"{identity['stage']}: is made again. Changed: {what_changed(before, identity)}", err=True)
        return False
    wrong = next(faults(out, manifest["files"], digest_of), None)
    if wrong or not (out / OUTSIDE).is_file():
        click.echo(f"{identity['stage']}: {wrong or f'{out / OUTSIDE}: is gone'}. It is made again", err=True)
        return False
    return True


def refuse_replaced(read: Mapping[Path, tuple[Stamp, str]], folder: Path, stage: str) -> None:
    """Raise `UserError` when a file that was read is not as it was at the start: the work so far is then useless."""
    for path, (stamp, digest) in read.items():
        if not path.is_file() or (stamp_of(path) != stamp and sha256_of(path) != digest):
            write_json(folder / IDENTITY, {"stage": stage})  # so that no run goes on from these checkpoints
            raise UserError(
                f"{path}: was replaced while {stage} read it, so nothing was finished; expected the file of the start. "
                f"If another make is at work there, wait for it. Then run: make {stage}"
            )


@contextlib.contextmanager
def refusing_replaced(read: Mapping[Path, tuple[Stamp, str]], folder: Path, stage: str) -> Iterator[None]:
    """Raise `UserError` as `refuse_replaced` does, when the body has ended or failed: that is then the reason."""
    try:
        yield
    except Exception:  # whatever an exchanged input led to; it goes on where none was exchanged
        refuse_replaced(read, folder, stage)
        raise
    refuse_replaced(read, folder, stage)


def refuse_other_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise `UserError` when a machine would train on something else than node 0, whose identity is in `folder`."""
    expected = object_in(folder / IDENTITY)
    if expected != identity:
        raise UserError(
            f"this machine would train on something else than node 0; different here: "
            f"{what_changed(expected, identity)}. Copy checkout and files from node 0, and run the same command again"
        )


def say_what_is_lost(checkpoints: Path, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Say how many training steps are lost, and which changes since then are the reason."""
    steps = [int(name) for path in checkpoints.glob("checkpoint-*") if (name := path.name[11:]).isdecimal()]
    if not steps:
        return
    what = what_changed(before, identity) if "code" in before else "what they were made from is not known"
    click.echo(f"{identity['stage']}: starts anew, {max(steps)} steps are lost. Changed: {what}", err=True)


def what_changed(before: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Return what differs between two identities of a stage, in words: keys of the recipe, files, the code."""
    was, now = dict(leaves(before)), dict(leaves(identity))
    changes = []
    for key in sorted(key for key in was | now if was.get(key) != now.get(key)):
        match key:
            case ("recipe", table, *names):
                changes.append(f"[{table}] {'.'.join(names)} = {now.get(key)!r}, before {was.get(key)!r}")
            case ("inputs", name, *files):
                changes.append(f"{'/'.join(files)} of {name}")
            case ("sources", name):
                changes.append(name)
            case ("code",):
                changes.append(f"the code of {identity['stage']}")
    return "; ".join(changes)


def leaves(value: Any, *key: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value of nested dicts that is no dict, with the keys that lead there."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from leaves(inside, *key, name)
    else:
        yield key, value
