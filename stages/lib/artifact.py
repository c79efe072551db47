"""What a stage hands to the next: a folder that is finished exactly when it holds `manifest.json`.

A stage writes into `<out>.unfinished`, beside the folder it will become. When its work is done the manifest is
written there, last and by rename, and the folder takes the place of the one before it. So a folder without the
suffix is always whole, an older result stays usable until a newer one is, and a process killed at any moment leaves
either the old result or the new one, plus at most an `.unfinished` folder that the next run carries on from.
"""

import ast
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from stages.lib.errors import UserError

MANIFEST = "manifest.json"
IDENTITY = "identity.json"  # in an unfinished folder: what it will become; its presence says that a stage made it
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # curves for TensorBoard: every run writes other bytes, so no manifest states them
TEMPORARY = ".tmp"
UNDIGESTED = ("environment", "wall")  # where and how long: a record, of which no later stage's result depends
# Modules that decide whether a stage runs and on what, which the identity states by itself, but not what comes out.
FRAME = ("artifact", "errors", "options", "recipe")
RECORDED_PACKAGES = (
    "accelerate", "bitsandbytes", "click", "datasets", "llama-cpp-python", "math-verify", "numpy", "peft", "protobuf",
    "safetensors", "sentencepiece", "tokenizers", "torch", "transformers", "triton", "trl", "unsloth", "unsloth_zoo",
    "vllm", "xformers",
)  # fmt: skip


@dataclass
class Run:
    """A stage at work: write files under `folder`, put figures into `metrics`, seconds into `seconds`."""

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """A folder for training checkpoints: kept when the stage is killed, gone when it is finished."""
        return self.folder / CHECKPOINTS


@contextlib.contextmanager
def writing(
    out: Path,
    stage: str,
    tables: Mapping[str, Any],
    inputs: Mapping[str, Path],
    *,
    sources: Mapping[str, Path] | None = None,
    room_bytes: int = 0,
) -> Iterator[Run]:
    """Open the artifact `out` of `stage` for writing; leave the process with exit code 0 if it is up to date.

    `tables` are the recipe's tables that the stage reads, `inputs` the finished folders, by stage name, and `sources`
    raw files from outside, by name: all three, and the code of the stage, decide whether there is anything to do.
    `room_bytes` is what the stage will write at most. The body runs once, with a `Run`; if it returns, the artifact is
    finished, and if it raises, whatever was finished before is still there, untouched.

    Raises `UserError` when an input is not finished, when `out` holds something this stage did not write, when another
    process is writing it, or when the disk has too little room.
    """
    identity = {
        "stage": stage,
        "recipe": json.loads(json.dumps(dict(tables))),
        "inputs": {name: digest(read(folder, name)) for name, folder in sorted(inputs.items())},
        "sources": {name: sha256(path) for name, path in sorted((sources or {}).items())},
        "code": code_digest(stage),
    }
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: expected the name of a folder for {stage} to write, such as artifacts/{stage}")
    folder = out.with_name(out.name + ".unfinished")
    refuse_foreign(out, stage)
    with locked(folder, stage):
        if stage_of(folder / MANIFEST) == stage:  # killed after its last line: it only lacks its name
            put_in_place(folder, out, stage)
        if out.exists():
            remove_replaced(out, stage)  # killed while it did so
        if is_current(out, identity):
            click.echo(f"{stage}: up to date, {out} already holds this recipe, these inputs and this code")
            os.utime(out / MANIFEST)  # make decides by time
            raise SystemExit(0)
        check_room(out, stage, room_bytes)
        checkpoints = take_over(folder, stage, identity)
        started = time.time()
        run = Run(folder)
        if checkpoints:
            click.echo(f"{stage}: carrying on from {folder / CHECKPOINTS}")
        yield run
        manifest = {
            **identity,
            "metrics": run.metrics,
            "files": describe_files(folder),
            "environment": environment(),
            "wall": {
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "seconds": round(time.time() - started, 1),
                **{name: round(value, 3) for name, value in run.seconds.items()},
            },
        }
        write_json(folder / MANIFEST, manifest)
        put_in_place(folder, out, stage)
    click.echo(f"{stage}: finished {out} in {manifest['wall']['seconds']:.0f} s")


def read(folder: Path, stage: str) -> dict[str, Any]:
    """Return the manifest of the finished artifact `folder`, its files checked for presence and size.

    Raises `UserError` when the folder is not finished, is another stage's, or lost or changed a file since.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = folder.with_name(folder.name + ".unfinished").is_dir()
        found = "it was started and not finished" if unfinished else "there is none"
        raise UserError(f"{folder}: {found}; expected the finished output of {stage} there. Run: make {stage}")
    found = stage_of(path)
    if found != stage:
        holds = f"holds the output of {found!r}" if found else f"its {MANIFEST} is not one that a stage wrote"
        remedy = f"run: make {stage}" if found else f"delete {folder} and run: make {stage}"
        raise UserError(f"{folder}: {holds}; expected that of {stage!r}. Name another folder, or {remedy}")
    manifest = json.loads(path.read_text())
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


def digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of what a manifest vouches for: all of it but where and in what time it was made."""
    kept = {key: value for key, value in manifest.items() if key not in UNDIGESTED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the sha256 of a file's content. Raises `UserError` if there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(stage: str) -> str:
    """Return a sha256 over the stage's own file and every `stages.lib` module it reaches, less those of FRAME.

    Comments, docstrings and layout are left out, so that mending a sentence never retrains a model.
    """
    folder = Path(__file__).parent
    todo = [folder.parent / f"{stage.replace('-', '_')}.py"]
    seen: dict[str, str] = {}
    while todo:
        path = todo.pop()
        if path.name in seen or path.stem in FRAME or not path.is_file():
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "stages.lib":
                todo += [folder / f"{name.name}.py" for name in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages.lib."):
                todo.append(folder / f"{node.module.rsplit('.', 1)[1]}.py")
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                    body[0].value.value = ""
        seen[path.name] = ast.unparse(tree)
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """Return where a stage ran: package versions, git revision, image id, GPU and driver, processor count."""
    versions = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    root = Path(__file__).parents[2]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git": output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "image": os.environ.get("TEMPER_IMAGE_ID"),
        "gpu": output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
    }


def output_of(*command: str) -> str | None:
    """Return what a command printed, or None when it is not installed or failed."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all, and on the disk before this returns."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return sha256 and size in bytes of every file under `folder` that is part of the result, by relative name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name != IDENTITY and not name.startswith((f"{CHECKPOINTS}/", f"{LOGS}/"))
    }


def refuse_foreign(out: Path, stage: str) -> None:
    """Raise `UserError` when `out` holds anything that `stage` did not write: it would be lost."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder for {stage} to write. Name another --out")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if stage_of(out / MANIFEST) == stage:
        found -= {MANIFEST, *json.loads((out / MANIFEST).read_text()).get("files", {})}
        found = {name for name in found if not name.startswith(f"{LOGS}/")}
    foreign = sorted(found)
    if foreign:
        raise UserError(
            f"{out}: holds {foreign[0]!r}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}, which {stage} did "
            f"not write and will not delete. Move it away or name another --out"
        )


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


def check_room(out: Path, stage: str, room_bytes: int) -> None:
    """Raise `UserError` when the file system that will hold `out` has less than `room_bytes` free."""
    parent = next(path for path in (out, *out.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < room_bytes:
        raise UserError(
            f"{out}: the disk has {free / 1e9:.2f} GB free; {stage} needs {room_bytes / 1e9:.2f} GB. "
            f"Free some, or put artifacts/ on a larger disk; nothing was changed"
        )


@contextlib.contextmanager
def locked(folder: Path, stage: str) -> Iterator[None]:
    """Hold the lock of an artifact that is being written; the system releases it however the process ends."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("w")
    except OSError as error:
        raise UserError(
            f"{folder.parent}: {stage} can't write there ({error.strerror}); expected a folder of yours on a disk that "
            f"can be written. Name another --out, or mend its owner or mount"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is running {stage} there; wait for it or end it") from error
        yield


def take_over(folder: Path, stage: str, identity: Mapping[str, Any]) -> bool:
    """Make `folder` ready to be written; return whether it holds checkpoints of this very identity, which are kept."""
    marker = folder / IDENTITY
    if folder.exists():
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if stage_of(marker) != stage and not found <= {IDENTITY + TEMPORARY}:
            raise UserError(f"{folder}: was not made by {stage} and will not be emptied. Move it away")
        same = marker.is_file() and json.loads(marker.read_text()) == identity
        if not same:
            write_json(marker, {"stage": stage})  # killed while it is emptied, it must not look like what it was
        for path in list(folder.iterdir()):
            if path.name == IDENTITY or (same and path.name == CHECKPOINTS):
                continue
            remove(path)
    folder.mkdir(exist_ok=True)
    write_json(marker, identity)
    return (folder / CHECKPOINTS).is_dir()


def put_in_place(folder: Path, out: Path, stage: str) -> None:
    """Let the whole artifact `folder` become `out`. A crash in between is mended by the next call of `writing`."""
    refuse_foreign(out, stage)  # once more: hours may lie between
    before = remove_replaced(out, stage)
    remove(folder / CHECKPOINTS)
    (folder / IDENTITY).unlink(missing_ok=True)
    if out.exists():
        os.rename(out, before)
    os.rename(folder, out)
    remove(before)


def remove_replaced(out: Path, stage: str) -> Path:
    """Delete the artifact that `out` took the place of, if it is still there; return its path."""
    before = out.with_name(out.name + ".replaced")
    refuse_foreign(before, stage)
    remove(before)
    return before


def remove(path: Path) -> None:
    """Delete a file or an artifact, if there is one; its manifest goes last, and says until then whose the rest is."""
    if path.is_dir() and not path.is_symlink():
        for inside in sorted(path.iterdir(), key=lambda inside: inside.name == MANIFEST):
            shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
