"""A checkout of its own with a short recipe, `make all` in it, and what its artifacts hold."""

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.support import micro

ROOT = Path(__file__).parents[2]
RECIPE = "breaks"
MARK = "TEMPER_BREAKS"  # in the environment of all that is started, so that what is left running is found


def make_checkout(folder: Path) -> Path:
    """Write the files of the last commit to `folder`, with this checkout's environment and the recipe; return it."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    write_recipe(folder)
    return folder


def write_recipe(folder: Path, name: str = RECIPE, **changes: dict[str, object]) -> Path:
    """Write the micro recipe, and its reward file, among the recipes of a checkout."""
    small = {"model": {"rehearsal": False}, "merge": {"prompts": 6}, "gguf": {"types": ["f16", "q8_0"], "prompts": 6}}
    made = micro.write_recipe(folder / "recipes", **{**small, **changes})
    return made.rename(made.with_name(f"{name}.toml"))


def command(*arguments: str, recipe: str = RECIPE) -> list[str]:
    """Return `make` with `arguments`, which takes the environment as it is: it is not this checkout's to change."""
    return ["make", "--old-file", ".venv/installed", *arguments, f"RECIPE={recipe}", "RUNTIME=local"]


def environment(mark: str) -> dict[str, str]:
    """Return the environment of what is started: one thread, no network, and `mark` to be known by."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", MARK: mark}


def start(folder: Path, mark: str, *, recipe: str = RECIPE) -> subprocess.Popen:
    """Start `make all`, in a session of its own, its output to a file beside the checkout."""
    with folder.with_name(f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            command("all", recipe=recipe), cwd=folder, env=environment(mark), stdout=log, stderr=log,
            start_new_session=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def marked(mark: str) -> dict[int, str]:
    """Return the running processes that were started with `mark`: their command lines by number."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                variables = (place / "environ").read_bytes().split(b"\0")
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended
                continue
            if wanted in variables and line:
                found[int(place.name)] = line
    return found


def stage_process(mark: str) -> tuple[int, str] | None:
    """Return the process that runs a stage now, the first of them, and the stage's name; None between two stages."""
    for number, line in sorted(marked(mark).items()):
        if " -m stages." in line and "multiprocessing" not in line and not line.startswith("make"):
            return number, line.partition(" -m stages.")[2].split()[0].replace("_", "-")
    return None


def wait_for_stage(process: subprocess.Popen, mark: str, stage: str) -> bool:
    """Return whether `stage` runs, as soon as it does; False when make has ended before."""
    while process.poll() is None:
        running = stage_process(mark)
        if running and running[1] == stage:
            return True
        time.sleep(0.1)
    return False


def stage_seconds(artifacts: Path) -> dict[str, float]:
    """Return how long each finished stage took, by name, in the order of their work."""
    walls = [(json.loads(path.read_text())["wall"], path.parent.name) for path in artifacts.glob("*/manifest.json")]
    return {name: wall["seconds"] for wall, name in sorted(walls, key=lambda each: each[0]["started"])}


def end_all(mark: str, seconds: float) -> dict[int, str]:
    """Return what still runs of `mark` after at most `seconds`, and kill it."""
    until = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    for number in left:
        os.kill(number, signal.SIGKILL)
    return left


def held(artifacts: Path) -> dict[str, str]:
    """Return the sha256 of every file of the artifacts, by name; of a manifest, of what it states but for times."""
    found = {}
    for path in sorted(path for path in artifacts.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(artifacts).as_posix()
        if path.suffix == ".lock" or path.name == "report.html" or "/logs/" in name:
            continue
        content = path.read_bytes()
        if path.name == "manifest.json":
            stated = {key: value for key, value in json.loads(content).items() if key != "wall"}
            content = json.dumps(stated, sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found
