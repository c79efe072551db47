"""What is given up for lack of GPU memory, in which order, and that the batch stays what it was."""

import json
import os
import sys
from dataclasses import replace

import pytest

from stages import grpo
from stages.lib.errors import UserError
from stages.lib.train import ladder
from stages.lib.train.ladder import Rung
from tests.support.arguments import RECIPES


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


TOO_SMALL = [
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine",
    "To serve at least one request with the model's max seq len (640), (1.2 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (0.4 GiB). Try increasing",
]


@pytest.mark.parametrize("message", TOO_SMALL)
def test_a_share_that_is_too_small_for_vllm_goes_back_and_stays_and_the_micro_batch_halves(tmp_path, restarts, message):
    rung = top = Rung(4, 0.6, 768)
    errors = [RuntimeError("CUDA out of memory")] * 2 + [ValueError(message)] + [RuntimeError("CUDA out of memory")]
    for step, error in enumerate(errors):
        with pytest.raises(Restarted), ladder.stepping_down(tmp_path, rung, None):
            raise error
        rung, steps = ladder.read(tmp_path, top)
        assert len(steps) == step + 1
    assert [(each["to"]["memory_share"], each["to"]["micro_batch_size"]) for each in steps] == [
        (0.45, 4), (0.338, 4), (0.45, 2), (0.45, 1),
    ]  # fmt: skip
    assert ladder.lower(rung) is None


@pytest.mark.parametrize("message", TOO_SMALL)
def test_a_recipes_own_share_that_is_too_small_ends_the_run_with_advice(tmp_path, restarts, message):
    with (
        pytest.raises(UserError, match=r"memory_share = 0\.3 of this GPU is too small.*Raise it"),
        ladder.stepping_down(tmp_path, Rung(4, 0.3, 768), None),
    ):
        raise ValueError(message)
    assert not (tmp_path / ladder.FILE).exists()


def test_with_standby_the_share_is_left_alone():
    recipe = RECIPES["qwen2.5-3b-gsm8k"]
    standby = replace(recipe, vllm=replace(recipe.vllm, standby=True))
    assert ladder.lower(grpo.top(recipe)).memory_share < recipe.vllm.memory_share
    below = ladder.lower(grpo.top(standby))
    assert below.memory_share == recipe.vllm.memory_share
    assert below.micro_batch_size == recipe.grpo.micro_batch_size // 2


def test_the_new_process_is_told_nothing_of_the_one_process_group(tmp_path, restarts, monkeypatch):
    for name in ladder.DISTRIBUTED:
        monkeypatch.setenv(name, "0")
    with pytest.raises(Restarted):
        ladder.step_down(tmp_path, Rung(2), None, 1, RuntimeError("CUDA out of memory"))
    assert not set(ladder.DISTRIBUTED) & set(os.environ)


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
    with pytest.raises(UserError, match=r"nothing left to give up.*load_in_4bit") as refused:
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
        (MemoryError("Unsloth: Your GPU ran out of memory loading vLLM with standby mode enabled."), True),
        (ValueError("Free memory on device (10/80 GiB) on startup is less than desired GPU memory utilization"), True),
        (RuntimeError("expected scalar type Half but found Float"), False),
        (ValueError("memory"), False),
        (MemoryError("Unable to allocate 9 GiB for an array"), False),
        (RuntimeError("Memory profiling failed. This is a transient race, NOT an out of memory error. Free"), False),
    ],
)
def test_what_counts_as_out_of_memory(tmp_path, restarts, error, expected):
    with pytest.raises(Restarted if expected else type(error)), ladder.stepping_down(tmp_path, Rung(2), None):
        raise error


def test_an_out_of_memory_that_another_error_wraps_is_found(tmp_path, restarts):
    with pytest.raises(Restarted), ladder.stepping_down(tmp_path, Rung(2), None):
        try:
            raise OutOfMemoryError("Tried to allocate")
        except OutOfMemoryError as error:
            raise RuntimeError("Engine core failed") from error


def test_what_is_no_lack_of_memory_writes_nothing(tmp_path):
    with pytest.raises(KeyError), ladder.stepping_down(tmp_path, Rung(2), None):
        raise KeyError("out of memory")
    assert list(tmp_path.iterdir()) == []
