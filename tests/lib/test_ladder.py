"""What is given up for lack of GPU memory, in which order, and that the batch stays what it was."""

import json
import os
import sys

import pytest

from stages.lib import ladder
from stages.lib.errors import UserError
from stages.lib.ladder import Rung


def down(rung: Rung, min_completion_tokens: int | None = None) -> list[Rung]:
    """Return every rung under `rung`."""
    below = ladder.lower(rung, min_completion_tokens)
    return [] if below is None else [below, *down(below, min_completion_tokens)]


def test_vllms_share_goes_first_then_the_micro_batch_and_the_length_only_where_it_may():
    top = Rung(4, 0.4, 256)
    assert down(top) == [
        Rung(4, 0.3, 256),
        Rung(4, 0.225, 256),
        Rung(4, 0.2, 256),
        Rung(2, 0.2, 256),
        Rung(1, 0.2, 256),
    ]
    assert down(top, 100)[5:] == [Rung(1, 0.2, 128), Rung(1, 0.2, 100)]


def test_without_vllm_only_the_micro_batch_halves():
    assert down(Rung(8)) == [Rung(4), Rung(2), Rung(1)]
    assert down(Rung(12)) == [Rung(6), Rung(3)]  # 1 would not divide the batch as 3 does


class Restarted(Exception):
    """Stands for the new process."""


@pytest.fixture
def restarts(monkeypatch):
    """Record the command lines of new processes instead of starting them."""
    commands = []

    def execv(program, command):
        commands.append((program, command))
        raise Restarted

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "stages.grpo", "--out", "x"])
    return commands


def test_a_step_down_is_written_before_the_process_starts_anew_and_read_by_it(tmp_path, restarts, capsys):
    top = Rung(8, 0.2, 256)
    assert ladder.read(tmp_path, top) == (top, [])
    with pytest.raises(Restarted):
        ladder.step_down(tmp_path / "checkpoints", top, None, 7, RuntimeError("CUDA out of memory.\nmore"))
    assert restarts == [(sys.executable, [sys.executable, "-m", "stages.grpo", "--out", "x"])]
    rung, steps = ladder.read(tmp_path / "checkpoints", top)
    assert rung == Rung(4, 0.2, 256)
    assert [(step["at_step"], step["reason"]) for step in steps] == [(7, "CUDA out of memory.")]
    assert "micro_batch_size 8 -> 4" in capsys.readouterr().err
    with pytest.raises(Restarted):
        ladder.step_down(tmp_path / "checkpoints", rung, None, 9, RuntimeError("CUDA out of memory"))
    rung, steps = ladder.read(tmp_path / "checkpoints", top)
    assert (rung, len(steps)) == (Rung(2, 0.2, 256), 2)
    assert json.loads((tmp_path / "checkpoints" / ladder.FILE).read_text()) == steps


def test_at_the_bottom_the_run_ends_with_advice(tmp_path, restarts):
    with pytest.raises(UserError, match="nothing left to give up.*load_in_4bit") as refused:
        ladder.step_down(tmp_path, Rung(1, 0.2, 256), None, 3, RuntimeError("CUDA out of memory"))
    assert "at step 3" in refused.value.message
    assert restarts == []


class OutOfMemoryError(RuntimeError):
    """Torch's, by its name."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutOfMemoryError("Tried to allocate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"), True),
        (ValueError("Free memory on device (10/80 GiB) on startup is less than desired GPU memory utilization"), True),
        (RuntimeError("expected scalar type Half but found Float"), False),
        (ValueError("memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(tmp_path, restarts, error, expected):
    with pytest.raises(Restarted if expected else type(error)):
        with ladder.stepping_down(tmp_path, Rung(2), None):
            raise error


def test_an_out_of_memory_that_another_error_wraps_is_found(tmp_path, restarts):
    with pytest.raises(Restarted):
        with ladder.stepping_down(tmp_path, Rung(2), None):
            try:
                raise OutOfMemoryError("Tried to allocate")
            except OutOfMemoryError as error:
                raise RuntimeError("Engine core failed") from error


def test_what_is_no_lack_of_memory_writes_nothing(tmp_path):
    with pytest.raises(KeyError), ladder.stepping_down(tmp_path, Rung(2), None):
        raise KeyError("out of memory")
    assert list(tmp_path.iterdir()) == []
