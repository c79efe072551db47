"""A part of what bench/breaks.py does to Temper by hand: broken files and hostile names, each to what reads it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.slow]  # the artifacts that are broken are made by all stages

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("part", "count", "said"), [("files", 40, "45 files, seed 1: "), ("names", 25, "25 hostile ")])
def test_whatever_is_given_to_temper_ends_in_a_result_or_in_one_message(tmp_path, part, count, said):
    results = tmp_path / "breaks.md"
    command = [sys.executable, "-m", "bench.breaks", part, "--seed", "1", "--count", str(count), "--results", results]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = results.read_text()
    assert said in text
    assert text.endswith("Wrong: nothing.\n")
