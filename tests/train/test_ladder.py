"""What is given up for lack of GPU memory, in which order, and that the batch stays what it was."""

import json
import os
import sys
from dataclasses import replace

import pytest

from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe
from stages.lib.train import ladder
from tests.support.arguments import RECIPES


def of_vllm(size: int, share: float, tokens: int, least: int | None = None) -> Recipe:
    """Return a recipe of engine unsloth with this micro-batch, share of the GPU and completion length."""
    made = RECIPES["qwen2.5-3b-gsm8k"]
    table = replace(made.grpo, micro_batch_size=size, max_completion_tokens=tokens, min_completion_tokens=least)
    return replace(made, grpo=table, vllm=replace(made.vllm, memory_share=share, standby=False))


def of_transformers(size: int) -> Recipe:
    """Return a recipe of engine trl with this micro-batch in SFT and GRPO."""
    made = RECIPES["tiny"]
    tables = {name: replace(getattr(made, name), micro_batch_size=size) for name in ("sft", "grpo")}
    return replace(made, **tables)


def down(recipe: Recipe, stage: str = "grpo") -> list[tuple[float, ...]]:
    """Return what is left on every rung under the recipe's."""
    below = ladder.lower(recipe, stage)
    return [] if below is None else [tuple(ladder.values(below, stage).values()), *down(below, stage)]


def test_vllms_share_goes_first_then_the_micro_batch_and_the_length_only_where_it_may():
    assert down(of_vllm(4, 0.4, 256)) == [
        (4, 0.3, 256), (4, 0.225, 256), (4, 0.2, 256), (2, 0.2, 256), (1, 0.2, 256),
    ]  # fmt: skip
    assert down(of_vllm(4, 0.4, 256, least=100))[5:] == [(1, 0.2, 128), (1, 0.2, 100)]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_rung_changes_nothing_of_the_recipe_but_what_the_manifest_will_state(name, stage):
    recipe = RECIPES[name]
    below = ladder.lower(recipe, stage)
    assert below is not None
    assert below != recipe
    back = ladder.with_values(below, stage, ladder.values(recipe, stage))
    assert back == recipe


TOO_SMALL = [
    "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine",
    "To serve at least one request with the model's max seq len (640), (1.2 GiB KV cache is needed, which is larger "
    "than the available KV cache memory (0.4 GiB). Try increasing",
]


@pytest.mark.parametrize("message", TOO_SMALL)
def test_a_share_that_is_too_small_for_vllm_goes_back_and_stays_and_the_micro_batch_halves(tmp_path, restarts, message):
    recipe = top = of_vllm(4, 0.6, 768)
    errors = [RuntimeError("CUDA out of memory")] * 2 + [ValueError(message)] + [RuntimeError("CUDA out of memory")]
    for step, error in enumerate(errors):
        with pytest.raises(Restarted), ladder.stepping_down(recipe, "grpo", tmp_path):
            raise error
        recipe, steps = ladder.lowered(top, "grpo", tmp_path), ladder.read_steps(tmp_path)
        assert len(steps) == step + 1
    assert [(each["to"]["memory_share"], each["to"]["micro_batch_size"]) for each in steps] == [
        (0.45, 4), (0.338, 4), (0.45, 2), (0.45, 1),
    ]  # fmt: skip
    with (
        pytest.raises(UserError, match=r"nothing left to give up: micro_batch_size = 1, memory_share = 0\.45, "),
        ladder.stepping_down(recipe, "grpo", tmp_path),
    ):
        raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize("message", TOO_SMALL)
def test_a_recipes_own_share_that_is_too_small_ends_the_run_with_advice(tmp_path, restarts, message):
    with (
        pytest.raises(UserError, match=r"memory_share = 0\.3 of this GPU does not hold .*Raise it"),
        ladder.stepping_down(of_vllm(4, 0.3, 768), "grpo", tmp_path),
    ):
        raise ValueError(message)
    assert not (tmp_path / ladder.FILE).exists()


def test_with_standby_the_share_is_left_alone():
    recipe = of_vllm(8, 0.5, 768)
    standby = replace(recipe, vllm=replace(recipe.vllm, standby=True))
    assert down(recipe)[0] == (8, 0.375, 768)
    assert down(standby)[0] == (4, 0.5, 768)


def test_the_new_process_is_told_nothing_of_the_one_process_group(tmp_path, restarts, monkeypatch):
    for name in ladder.DISTRIBUTED:
        monkeypatch.setenv(name, "0")
    with pytest.raises(Restarted):
        ladder.step_down(of_transformers(2), "sft", tmp_path, 1, RuntimeError("CUDA out of memory"))
    assert not set(ladder.DISTRIBUTED) & set(os.environ)


def test_without_vllm_only_the_micro_batch_halves():
    assert down(of_transformers(8), "sft") == [(4,), (2,), (1,)]
    assert down(of_transformers(8), "grpo") == [(4, 64), (2, 64), (1, 64)]
    assert down(of_transformers(12), "sft") == [(6,), (3,)]  # 1 would not divide the batch as 3 does


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
    top, checkpoints = of_vllm(8, 0.2, 256), tmp_path / "checkpoints"
    assert (ladder.lowered(top, "grpo", checkpoints), ladder.read_steps(checkpoints)) == (top, [])
    with pytest.raises(Restarted):
        ladder.step_down(top, "grpo", checkpoints, 7, RuntimeError("CUDA out of memory.\nmore"))
    assert restarts == [(sys.executable, [sys.executable, "-m", "stages.grpo", "--out", "x"])]
    once = ladder.lowered(top, "grpo", checkpoints)
    assert once == of_vllm(4, 0.2, 256)
    assert ladder.read_steps(checkpoints) == [
        {
            "at_step": 7, "reason": "CUDA out of memory.",
            "from": {"micro_batch_size": 8, "memory_share": 0.2, "max_completion_tokens": 256},
            "to": {"micro_batch_size": 4, "memory_share": 0.2, "max_completion_tokens": 256},
        }
    ]  # fmt: skip
    assert "micro_batch_size 8 -> 4" in capsys.readouterr().err
    with pytest.raises(Restarted):
        ladder.step_down(once, "grpo", checkpoints, 9, RuntimeError("CUDA out of memory"))
    assert ladder.lowered(top, "grpo", checkpoints) == of_vllm(2, 0.2, 256)
    assert json.loads((checkpoints / ladder.FILE).read_text()) == ladder.read_steps(checkpoints)
    assert [step["at_step"] for step in ladder.read_steps(checkpoints)] == [7, 9]


def test_at_the_bottom_the_run_ends_with_advice(tmp_path, restarts):
    with pytest.raises(UserError, match=r"nothing left to give up.*load_in_4bit") as refused:
        ladder.step_down(of_vllm(1, 0.2, 256), "grpo", tmp_path, 3, RuntimeError("CUDA out of memory"))
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
    expected_end = pytest.raises(Restarted if expected else type(error))
    with expected_end, ladder.stepping_down(of_transformers(2), "sft", tmp_path):
        raise error


def test_an_out_of_memory_that_another_error_wraps_is_found(tmp_path, restarts):
    with pytest.raises(Restarted), ladder.stepping_down(of_transformers(2), "sft", tmp_path):
        try:
            raise OutOfMemoryError("Tried to allocate")
        except OutOfMemoryError as error:
            raise RuntimeError("Engine core failed") from error


def test_what_is_no_lack_of_memory_writes_nothing(tmp_path):
    with pytest.raises(KeyError), ladder.stepping_down(of_transformers(2), "sft", tmp_path):
        raise KeyError("out of memory")
    assert list(tmp_path.iterdir()) == []
