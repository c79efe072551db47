"""A stage on a disk of its own that fills in mid-stage: a tmpfs in a mount namespace, for which no root is needed."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import micro
from tests.support.once import once_a_run, run_folder

ROOT = Path(__file__).parents[2]
INPUTS = micro.INPUTS | {
    "merge": ["base-model", "prepare-data", "grpo"],
    "gguf": ["base-model", "prepare-data", "grpo", "merge"],
    "ollama-modelfile": ["merge", "gguf"],
}
# Says that a disk has all the room that is asked for before a stage begins: another program fills it afterwards.
ROOMY = (
    "import collections, runpy, shutil, sys; usage = collections.namedtuple('usage', 'total used free'); "
    "shutil.disk_usage = lambda path: usage(10**15, 0, 10**15); "
    "stage = sys.argv.pop(1); runpy.run_module(stage, run_name='__main__', alter_sys=True)"
)
# The stage twice: on the small disk, and when there is room. What it made is copied off that disk before it goes.
SCRIPT = """
disk=$1 size=$2 inodes=$3; shift 3
mount -t tmpfs -o "size=$size,nr_inodes=$inodes" tmpfs "$disk" || exit 99
"$@" > "$disk-first" 2>&1; echo $? > "$disk-code"
mount -o remount,size=1g,nr_inodes=100000 "$disk" || exit 99
"$@" > "$disk-second" 2>&1; code=$?
cp -a "$disk" "$disk-result"
exit $code
"""


@dataclass
class Filled:
    """How a stage ended on a small disk, and when it was run again on it with room."""

    code: int
    said: str
    code_again: int
    said_again: str
    result: Path  # the folder that was the disk, after both


@once_a_run
def all_stages() -> Path:
    """Return a folder with micro.toml and a finished artifact of every stage of `make all`, made once."""
    folder = run_folder() / "all"
    folder.mkdir(exist_ok=True)
    micro.write_recipe(
        folder, model={"rehearsal": False}, merge={"prompts": 6}, gguf={"types": ["f16", "q8_0"], "prompts": 6}
    )
    for stage in INPUTS:
        done = subprocess.run([*command(stage, folder), str(folder / stage)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


def command(stage: str, finished: Path, *first: str) -> list[str]:
    """Return the command of `stage` on the artifacts in `finished`, up to the value of its last option, `--out`."""
    given = [word for name in INPUTS[stage] for word in (f"--{name}", str(finished / name))]
    run = first or ("-m",)
    named = [f"stages.{stage.replace('-', '_')}", "--recipe", str(finished / "micro.toml")]
    return [sys.executable, *run, *named, *given, "--out"]


def run_on_small_disk(stage: str, finished: Path, folder: Path, size: int, inodes: int = 100_000) -> Filled:
    """Run `stage` with its `--out` on a disk of `size` bytes and so many inodes, then again when there is room."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    shell = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SCRIPT, "-", str(disk), str(size)]
    words = [*command(stage, finished, "-c", ROOMY), str(disk / stage)]
    done = subprocess.run([*shell, str(inodes), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 99, done.stderr
    first, second = (Path(f"{disk}-{name}").read_text() for name in ("first", "second"))
    return Filled(int(Path(f"{disk}-code").read_text()), first, done.returncode, second, Path(f"{disk}-result"))
