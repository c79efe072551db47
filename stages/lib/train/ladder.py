"""The memory ladder: what a trainer gives up, rung by rung, when the GPU's memory runs out, and learns the same.

Out of memory, a process can seldom free its memory: fragments, CUDA graphs and vLLM's cache stay. So the stage writes
the next rung beside its checkpoints and starts itself anew, from the last checkpoint.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from stages.lib.artifact.folder import RANK_FOLDER
from stages.lib.artifact.manifest import write_json
from stages.lib.errors import UserError, chain, says
from stages.lib.recipe.tables import Recipe, Vllm

FILE = "memory_ladder.json"
MIN_MEMORY_SHARE = 0.2  # less would hold no useful KV cache beside the weights
# vLLM's words when its share does not hold the weights and one sequence: a smaller share does not help.
TOO_SMALL = ("No available memory for the cache blocks", "larger than the available KV cache")
# In the errors of torch and CUDA; in vLLM's, when other programs hold its share, or its own step runs out.
OUT_OF_MEMORY = ("out of memory", "Free memory on device")
# TRL sets these to start vLLM. A process that starts with them would wait for others.
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_MEMORY = "NOT an out of memory error"  # in two of Unsloth's errors that more memory does not fix


class OutOfMemory(Exception):
    """A rank's GPU has too little memory: at which optimizer step, and the error's first line."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


def lower(recipe: Recipe, stage: str, *, share_stays: bool = False) -> Recipe | None:
    """Return `recipe` one rung down for `stage`, "sft" or "grpo"; None when there is no rung left.

    First vLLM's share shrinks by a quarter, down to MIN_MEMORY_SHARE, which costs only speed; not with standby, which
    takes its own share, nor with `share_stays`, for a share that was too small before. Then the micro-batch halves and
    accumulation doubles. Last, the completion length halves, which changes what is learnt: only where
    `min_completion_tokens` is set, and never below it.
    """
    table, vllm = getattr(recipe, stage), vllm_beside(recipe, stage)
    if vllm and not (vllm.standby or share_stays) and vllm.memory_share > MIN_MEMORY_SHARE:
        share = max(MIN_MEMORY_SHARE, round(0.75 * vllm.memory_share, 3))
        return replace(recipe, vllm=replace(vllm, memory_share=share))
    if table.micro_batch_size % 2 == 0:
        return replace(recipe, **{stage: replace(table, micro_batch_size=table.micro_batch_size // 2)})
    least = table.min_completion_tokens if stage == "grpo" else None
    if least is not None and table.max_completion_tokens > least:
        tokens = max(least, table.max_completion_tokens // 2)
        return replace(recipe, grpo=replace(table, max_completion_tokens=tokens))
    return None


def vllm_beside(recipe: Recipe, stage: str) -> Vllm | None:
    """Return `[vllm]` where `stage` has vLLM on the GPU beside the trainer, else None."""
    return recipe.vllm if stage == "grpo" and recipe.model.engine == "unsloth" else None


def values(recipe: Recipe, stage: str) -> dict[str, float]:
    """Return the values that the ladder lowers for `stage`, by the recipe's keys."""
    found: dict[str, float] = {"micro_batch_size": getattr(recipe, stage).micro_batch_size}
    if vllm := vllm_beside(recipe, stage):
        found["memory_share"] = vllm.memory_share
    if stage == "grpo":
        found["max_completion_tokens"] = recipe.grpo.max_completion_tokens
    return found


def with_values(recipe: Recipe, stage: str, found: dict[str, float]) -> Recipe:
    """Return `recipe` with the values `found`, as `values` gives them."""
    own = {key: value for key, value in found.items() if key != "memory_share"}
    recipe = replace(recipe, **{stage: replace(getattr(recipe, stage), **own)})
    if "memory_share" in found and (vllm := vllm_beside(recipe, stage)):
        recipe = replace(recipe, vllm=replace(vllm, memory_share=found["memory_share"]))
    return recipe


def read_steps(checkpoints: Path) -> list[Any]:
    """Return the steps down the ladder that a run took so far, as its manifest will state them."""
    path = checkpoints / FILE
    return json.loads(path.read_text()) if path.is_file() else []


def lowered(recipe: Recipe, stage: str, checkpoints: Path) -> Recipe:
    """Return `recipe` on the rung that the run of `stage` is on."""
    steps = read_steps(checkpoints)
    return with_values(recipe, stage, steps[-1]["to"]) if steps else recipe


@contextlib.contextmanager
def stepping_down(recipe: Recipe, stage: str, checkpoints: Path, trainer: Any = None) -> Iterator[None]:
    """Start the process anew, one rung under `recipe`, when the GPU runs out of memory in the body."""
    try:
        yield
    # The types of torch's OutOfMemoryError, of vLLM's refusal, and of Unsloth's error while vLLM loads.
    except (RuntimeError, ValueError, MemoryError) as error:
        if not (says(error, TOO_SMALL) or is_out_of_memory(error)):
            raise
        step_down(recipe, stage, checkpoints, trainer.state.global_step if trainer else 0, error)


def step_down(recipe: Recipe, stage: str, checkpoints: Path, step: int, error: Exception) -> None:
    """Write the rung under `recipe` and start this process anew on it; this does not return.

    Raises `OutOfMemory` in a rank: the process that started it starts all ranks anew.
    """
    if RANK_FOLDER in os.environ:
        raise OutOfMemory(step, str(error).splitlines()[0]) from error
    write_rung(recipe, stage, checkpoints, step, error)
    sys.stdout.flush()
    sys.stderr.flush()
    for name in DISTRIBUTED:
        os.environ.pop(name, None)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def write_rung(recipe: Recipe, stage: str, checkpoints: Path, step: int, error: Exception) -> None:
    """Write the rung under `recipe` beside the checkpoints.

    `error`, the lack of memory, came at the optimizer step `step`. Where vLLM's share is too small, it goes back to the
    one before, and stays there. Raises `UserError` when no rung is left.
    """
    steps = read_steps(checkpoints)
    reason = str(error).splitlines()[0]
    before, start = values(recipe, stage), recipe
    stays = any(each["to"].get("memory_share", 0) > each["from"].get("memory_share", 0) for each in steps)
    if says(error, TOO_SMALL):
        shares = [share for each in steps if (share := each["from"]["memory_share"]) > before["memory_share"]]
        if not shares:
            raise UserError(
                f"[vllm] memory_share = {before['memory_share']} of this GPU does not hold the model's weights and the "
                f"KV cache of one completion. Raise it, or use a GPU with more memory, [model] load_in_4bit = true or "
                f"a shorter max_completion_tokens. {reason}"
            ) from error
        start, stays = with_values(recipe, stage, {"memory_share": shares[-1]}), True
    below = lower(start, stage, share_stays=stays)
    if below is None:
        lowest = ", ".join(f"{name} = {value}" for name, value in before.items())
        raise UserError(
            f"out of GPU memory at step {step} with nothing left to give up: {lowest}. Use a GPU with more memory, "
            f"[model] load_in_4bit = true, a shorter max_completion_tokens or max_tokens, or a lower [lora] rank. "
            f"{reason}"
        ) from error
    after = values(below, stage)
    steps.append({"at_step": step, "from": before, "to": after, "reason": reason})
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(checkpoints / FILE, steps)
    changes = ", ".join(f"{name} {old} -> {after[name]}" for name, old in before.items() if old != after[name])
    click.echo(f"out of GPU memory at step {step}: {changes}, and on from the last checkpoint", err=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` is the GPU's memory running out: torch's own error, CUDA's, or vLLM's refusal to start."""
    from_torch = any(type(each).__name__ == "OutOfMemoryError" for each in chain(error))
    return (from_torch or says(error, OUT_OF_MEMORY)) and not says(error, (NOT_MEMORY,))
