"""Kills of `make all` at random moments: of the whole group or of the stage alone, by KILL or TERM, once or twice."""

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
    MARK,
    RECIPE,
    command,
    end_all,
    environment,
    held,
    make_checkout,
    stage_process,
    stage_seconds,
    start,
    wait_for_stage,
)

START_SECONDS = 4.0  # of a stage, before its own clock begins: Python and its imports
AGAIN_SECONDS = (0.1, 4.0)  # from the start of make to the second of two kills
END_SECONDS = 60.0  # for what was told to end: a step of the trainer, a checkpoint
RUN_SECONDS = 900.0
WAYS = [(number, who) for number in (signal.SIGKILL, signal.SIGTERM) for who in ("group", "stage")]


def kill_once(checkout: Path, mark: str, chance: random.Random, stage: str, seconds: float) -> tuple[str, str, str]:
    """Start make, and kill it `seconds` after `stage` began ("": after make did).

    Return how, in which stage, and "" or what went wrong; "" for how when make had ended before.
    """
    process = start(checkout, mark)
    number, who = chance.choice(WAYS)
    if not stage or wait_for_stage(process, mark, stage):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    if process.poll() is not None:
        return "", "", "" if process.returncode == 0 else f"make ended by itself with {process.returncode}"
    running = stage_process(mark)
    if who == "stage" and running:
        try:
            os.kill(running[0], number)
        except ProcessLookupError:
            who = "group"
    if who == "group" or not running:
        os.killpg(process.pid, number)
    left = end_all(mark, END_SECONDS)
    process.wait()
    wrong = f"still ran after {END_SECONDS:.0f} s: {left}" if left else ""
    return f"{signal.Signals(number).name} of the {who}", running[1] if running else "between stages", wrong


def to_the_end(checkout: Path, mark: str) -> str:
    """Run make to its end; return "" or what went wrong."""
    process = start(checkout, mark)
    try:
        code = process.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        end_all(mark, 0)
        return f"make all hung for {RUN_SECONDS:.0f} s"
    left = end_all(mark, 1.0)
    said = checkout.with_name(f"{checkout.name}.log").read_text(errors="replace")[-3000:] if code else ""
    return f"make all ended with {code}: {said}" if code else f"left running: {left}" if left else ""


def differences(expected: dict[str, str], found: dict[str, str]) -> str:
    """Return which files differ, are missing or are left over; "" for none."""
    return ", ".join(sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)))


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Kill make `count` times, over as many rounds as that takes; return the lines of the report."""
    chance, mark = random.Random(seed), f"kills-{os.getpid()}"
    checkout = make_checkout(folder / "kills")
    began = time.monotonic()
    wrong = [each for each in [to_the_end(checkout, mark)] if each]
    artifacts = checkout / "artifacts" / RECIPE
    expected, took, ways, stages = held(artifacts), stage_seconds(artifacts), Counter(), Counter()
    rounds, kills, same = 0, 0, 0
    while kills < count and not wrong:
        shutil.rmtree(artifacts)
        rounds += 1
        twice = False
        for stage in [name for name in took for _ in range(chance.randint(1, 4))]:
            seconds = chance.uniform(*AGAIN_SECONDS) if twice else chance.uniform(0, took[stage] + START_SECONDS)
            how, where, fault = kill_once(checkout, mark, chance, "" if twice else stage, seconds)
            wrong += [f"round {rounds}: {fault}"] if fault else []
            if how:
                kills += 1
                ways[f"{how}{', again at once' if twice else ''}"] += 1
                stages[where] += 1
            twice = bool(how) and chance.random() < 0.3
        wrong += [f"round {rounds}: {fault}" for fault in [to_the_end(checkout, mark)] if fault]
        differing = differences(expected, held(artifacts))
        wrong += [f"round {rounds}: other bytes or files: {differing}"] if differing else []
        same += not differing
        print(f"round {rounds}: {kills} kills, {time.monotonic() - began:.0f} s {wrong}", flush=True)
    verified = subprocess.run(command("verify"), cwd=checkout, env=environment(mark) | {MARK: ""}, check=False)
    return [
        f"{kills} kills of `make all` in {rounds} rounds, {time.monotonic() - began:.0f} s, seed {seed}: after each "
        f"round the {len(expected)} files of the artifacts had the bytes of a run without kills in {same} of {rounds} "
        f"rounds (of manifests all but the times, `wall`; not the curves and `report.html`, which hold times); "
        f"`make verify` ended with {verified.returncode}.",
        "",
        "| how | kills | | in | kills |",
        "|---|--:|---|---|--:|",
        *side_by_side(ways, stages),
        "",
        f"Wrong: {'; '.join(wrong) if wrong else 'nothing'}.",
    ]


def side_by_side(left: Counter, right: Counter) -> list[str]:
    """Return the rows of a table with two counts beside each other."""
    both = [[f"| {name} | {number} |" for name, number in sorted(each.items())] for each in (left, right)]
    height = max(map(len, both))
    for rows in both:
        rows += ["| | |"] * (height - len(rows))
    return [f"{first} {second}" for first, second in zip(*both, strict=True)]
