"""Power cuts: `make all` on a disk of its own, of which what was not synced is lost, and on from what is left.

The disk is an ext4 image on a loop device. A cut is a copy of the image while the processes stand still: it holds what
the file system had handed to the device, and nothing of what it still held in memory. It is mounted instead of the
first, as after a power cut, and its journal replayed. `commit=300` and `noauto_da_alloc` keep back whatever no one
synced for as long as ext4 can. Needs root, loop devices and mkfs.ext4.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from bench.breaking.checkout import RECIPE, end_all, held, make_checkout, stage_process, start
from bench.breaking.kills import differences, to_the_end

IMAGE_BYTES = 1 << 30
SECONDS = (0.5, 11.0)
MODES = ("data=ordered", "data=writeback")


def mounted(image: Path, at: Path, mode: str) -> None:
    """Mount an image, its journal replayed."""
    subprocess.run(["mount", "-o", f"loop,commit=300,noauto_da_alloc,{mode}", image, at], check=True)


def cut(checkout: Path, mark: str, image: Path, chance: random.Random, mode: str) -> str:
    """Run make, cut the power at a random moment, and mount what is left; return the stage, "" if make had ended."""
    process = start(checkout, mark)
    try:
        process.wait(chance.uniform(*SECONDS))
        return ""
    except subprocess.TimeoutExpired:
        running = stage_process(mark)
    os.killpg(process.pid, signal.SIGSTOP)
    after = image.with_suffix(".cut")
    subprocess.run(["cp", "--sparse=always", image, after], check=True)
    os.killpg(process.pid, signal.SIGKILL)
    end_all(mark, 10.0)
    process.wait()
    subprocess.run(["umount", checkout / "artifacts"], check=True)
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
    expected, stages, rounds, cuts, same = held(artifacts / RECIPE), Counter(), 0, 0, 0
    shutil.rmtree(artifacts / RECIPE)
    while cuts < count and not wrong:
        mode = MODES[rounds % len(MODES)]
        rounds += 1
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        mounted(image, artifacts, mode)
        try:
            for _ in range(chance.randrange(12, 26)):
                if not (stage := cut(checkout, mark, image, chance, mode)):
                    break
                cuts += 1
                stages[stage] += 1
            wrong += [f"round {rounds}: {fault}" for fault in [to_the_end(checkout, mark)] if fault]
            differing = differences(expected, held(artifacts / RECIPE))
            wrong += [f"round {rounds}: other bytes or files: {differing}"] if differing else []
            same += not differing
        finally:
            subprocess.run(["umount", artifacts], check=True)
        print(f"round {rounds}: {cuts} cuts, {time.monotonic() - began:.0f} s {wrong}", flush=True)
    where = ", ".join(f"{name} {number}" for name, number in sorted(stages.items()))
    return [
        f"{cuts} power cuts of `make all` in {rounds} rounds, {time.monotonic() - began:.0f} s, seed {seed}, on ext4 "
        f"with {' and '.join(MODES)} in turn, commit=300, noauto_da_alloc ({where}): in {same} of {rounds} rounds the "
        f"{len(expected)} files had the bytes of a run without cuts.",
        "",
        f"Wrong: {'; '.join(wrong) if wrong else 'nothing'}.",
    ]
