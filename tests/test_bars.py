"""Bars and messages: a pipe gets lines, a terminal gets one line that fits, and no message stands on a bar's line."""

import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from stages.lib import bars

ROOT = Path(__file__).parents[1]
# A run of 40 steps that says something amid it and then fails, as a stage does.
RUN = """
import sys
from stages.lib.bars import open_bar, say, show_beside
from stages.lib.errors import UserError
bar = open_bar(40, "step", "grpo")
try:
    for step in range(20):
        show_beside(bar, {"loss": "0.0123", "reward": "2.35", "tokens": "33.1", "valid": "71.2%"})
        bar.update()
        if step == 9:
            say("tracking: wandb failed")
    raise UserError("the disk is full")
except UserError as error:
    bar.close()
    error.show()
"""


def on_a_terminal(columns: int) -> list[str]:
    """Run RUN on a pseudo terminal so wide; return what each line of the screen held at its end."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    process = subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=follower, stderr=follower)
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait() == 0
    return [line.rstrip("\r").rpartition("\r")[2] for line in written.decode().split("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 60])
def test_on_a_terminal_a_bar_fits_and_no_message_stands_on_its_line(columns: int) -> None:
    lines = on_a_terminal(columns)
    assert "tracking: wandb failed" in lines
    assert "Error: the disk is full" in lines
    drawn = [line for line in lines if line.startswith("grpo:")]
    assert drawn
    assert max(map(len, drawn)) <= columns
    assert "20/40" in drawn[-1]


@pytest.mark.slow
def test_in_a_pipe_there_is_no_carriage_return_and_each_state_is_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1] == "Error: the disk is full"
    assert "tracking: wandb failed" in lines
    drawn = [line for line in lines if line.startswith("grpo:")]
    assert re.fullmatch(
        r"grpo:  50% 20/40 \[\d\d:\d\d<.*step/s, loss=0.0123, reward=2.35, tokens=33.1, valid=71.2%\]", drawn[-1]
    )
    assert max(map(len, drawn)) <= 100
    assert len(drawn) <= 3  # the first, the last, and none for each step


def test_a_state_that_is_written_twice_is_one_line() -> None:
    stream = io.StringIO()
    lines = bars.Lines(stream)
    for text in ("\rgrpo: 1/2  ", "\rgrpo: 1/2", "\r", "\n", "\rgrpo: 2/2"):
        lines.write(text)
    assert stream.getvalue() == "grpo: 1/2\ngrpo: 2/2\n"
