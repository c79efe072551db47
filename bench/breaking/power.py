"""Power cuts: `make all` on a disk of its own, of which what was not synced is lost, and on from what is left.

The disk is an ext4 image on a loop device. A cut is a copy of the image while the processes stand still: it holds what
the file system had handed to the device, and nothing of what it still held in memory. It is mounted instead of the
first, as after a power cut, and its journal replayed. `commit=300` and `noauto_da_alloc` keep back whatever no one
synced for as long as ext4 can. Needs root, loop devices and mkfs.ext4.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from bench.breaking.checkout import (
    RECIPE,
    end_all,
    held,
    make_checkout,
    stage_process,
    stage_seconds,
    start,
    wait_for_stage,
)
from bench.breaking.kills import START_SECONDS, differences, to_the_end

IMAGE_BYTES = 1 << 30
UMOUNT_SECONDS = 60.0  # for what another program of the machine looks at
MODES = ("data=ordered", "data=writeback")


def mounted(image: Path, at: Path, mode: str) -> None:
    """Mount an image, its journal replayed."""
    subprocess.run(["mount", "-o", f"loop,commit=300,noauto_da_alloc,{mode}", image, at], check=True)


def unmounted(at: Path) -> None:
    """Unmount what is mounted at a folder."""
    until = time.monotonic() + UMOUNT_SECONDS
    while subprocess.run(["umount", at], check=False, stderr=subprocess.DEVNULL).returncode:
        if time.monotonic() > until:
            raise TimeoutError(f"{at}: can't be unmounted")
        time.sleep(0.5)


def cut(checkout: Path, mark: str, image: Path, stage: tuple[str, float], mode: str) -> str:
    """Run make, cut the power so many seconds after a stage began, and mount what is left.

    Return the stage in which that was, "" if make had ended before.
    """
    process = start(checkout, mark)
    if wait_for_stage(process, mark, stage[0]):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(stage[1])
    if process.poll() is not None:
        return ""
    running = stage_process(mark)
    os.killpg(process.pid, signal.SIGSTOP)
    after = image.with_suffix(".cut")
    subprocess.run(["cp", "--sparse=always", image, after], check=True)
    os.killpg(process.pid, signal.SIGKILL)
    end_all(mark, 10.0)
    process.wait()
    unmounted(checkout / "artifacts")
    after.replace(image)
    mounted(image, checkout / "artifacts", mode)
    return running[1] if running else "between stages"


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Cut the power `count` times; return the lines of the report."""
    chance, mark = random.Random(seed), f"power-{os.getpid()}"
    checkout = make_checkout(folder / "power")
    artifacts, image = checkout / "artifacts", folder / "disk.img"
    began = time.monotonic()
    wrong = [each for each in [to_the_end(checkout, mark)] if each]
    expected, took = held(artifacts / RECIPE), stage_seconds(artifacts / RECIPE)
    stages, rounds, cuts, same = Counter(), 0, 0, 0
    shutil.rmtree(artifacts / RECIPE)
    while cuts < count and not wrong:
        mode = MODES[rounds % len(MODES)]
        rounds += 1
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        mounted(image, artifacts, mode)
        try:
            for name in [name for name in took for _ in range(chance.randint(1, 3))]:
                moment = name, chance.uniform(0, took[name] + START_SECONDS)
                if where := cut(checkout, mark, image, moment, mode):
                    cuts += 1
                    stages[where] += 1
            wrong += [f"round {rounds}: {fault}" for fault in [to_the_end(checkout, mark)] if fault]
            differing = differences(expected, held(artifacts / RECIPE))
            wrong += [f"round {rounds}: other bytes or files: {differing}"] if differing else []
            same += not differing
        finally:
            unmounted(artifacts)
        print(f"round {rounds}: {cuts} cuts, {time.monotonic() - began:.0f} s {wrong}", flush=True)
    where = ", ".join(f"{name} {number}" for name, number in sorted(stages.items()))
    return [
        f"{cuts} power cuts of `make all` in {rounds} rounds, {time.monotonic() - began:.0f} s, seed {seed}, on ext4 "
        f"with {' and '.join(MODES)} in turn, commit=300, noauto_da_alloc ({where}): in {same} of {rounds} rounds the "
        f"{len(expected)} files had the bytes of a run without cuts.",
        "",
        f"Wrong: {'; '.join(wrong) if wrong else 'nothing'}.",
    ]
