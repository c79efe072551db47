"""Fuzzing for a time: tests/test_fuzz.py again and again, each time from another seed, until so much time is spent."""

import os
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = 2000  # of each reader in one run
TEST = re.compile(r"^tests/test_fuzz\.py::(\w+):$(.*?)(?=^tests/|\Z)", re.MULTILINE | re.DOTALL)
PASSED = re.compile(r"(\d+) passing, (\d+) failing")


def spent() -> float:
    """Return the processor seconds of the processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Fuzz for `count` seconds of processor time; return the lines of the report."""
    examples, wrong, runs, before = Counter(), [], 0, spent()
    while spent() - before < count:
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp",
            str(folder / "tests"), "tests/test_fuzz.py", "--hypothesis-show-statistics",
            f"--hypothesis-seed={seed + runs}",
        ]  # fmt: skip
        variables = os.environ | {"TEMPER_FUZZ": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        for name, said in TEST.findall(done.stdout):
            examples[name] += sum(int(good) + int(bad) for good, bad in PASSED.findall(said))
        if done.returncode:
            failed = re.findall(r"^FAILED (.*)", done.stdout, re.MULTILINE)
            wrong.append(f"seed {seed + runs}: {'; '.join(failed) or f'pytest ended with {done.returncode}'}")
            print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
        runs += 1
        print(f"run {runs}: {spent() - before:.0f} s, {sum(examples.values()):,} examples {wrong}", flush=True)
    rows = [f"| {name.removeprefix('test_').replace('_', ' ')} | {number:,} |" for name, number in examples.items()]
    return [
        f"{sum(examples.values()):,} examples in {runs} runs of tests/test_fuzz.py, seeds {seed} to {seed + runs - 1}, "
        f"{spent() - before:.0f} s of processor time.",
        "",
        "| reader | examples |",
        "|---|--:|",
        *rows,
        "",
        f"Wrong: {'; '.join(wrong) if wrong else 'nothing'}.",
    ]
