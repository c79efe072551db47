"""What a trainer gives up, rung by rung, when the GPU's memory runs out, without changing what it learns.

Out of memory, a process can seldom free what it holds: fragments, CUDA graphs and vLLM's cache stay. So the stage notes
the next rung beside its checkpoints and starts itself anew, from the last checkpoint.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from stages.lib.errors import UserError

FILE = "memory_ladder.json"
MIN_MEMORY_SHARE = 0.2  # less would hold no useful KV cache beside the weights
# What vLLM says when its share does not hold the weights and one sequence: less of it is no remedy.
TOO_SMALL = ("No available memory for the cache blocks", "larger than the available KV cache")
# torch's own error and CUDA's; vLLM's when others hold what it is to take, or its own step runs out.
OUT_OF_MEMORY = ("out of memory", "Free memory on device")
# TRL sets these to start vLLM; a process that is started with them takes itself for one of several.
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_MEMORY = "NOT an out of memory error"  # Unsloth's word on two failures to start that more memory would not mend


@dataclass(frozen=True)
class Rung:
    """How much memory a run may take: the recipe's own values at the top."""

    micro_batch_size: int
    memory_share: float | None = None  # vLLM's, of the GPU; None: there is no vLLM, or the rung can't change it
    max_completion_tokens: int | None = None
    least_memory_share: float = MIN_MEMORY_SHARE  # under which it is never lowered


def lower(rung: Rung, min_completion_tokens: int | None = None) -> Rung | None:
    """Return the next rung down, None when there is none.

    First vLLM's share shrinks by a quarter, down to the least it may be: it costs speed only. Then the micro-batch
    halves, and accumulation doubles. The completion length, which changes what is learnt, halves last and never below
    `min_completion_tokens`; None: it does not.
    """
    values = asdict(rung)
    if rung.memory_share is not None and rung.memory_share > rung.least_memory_share:
        return Rung(**values | {"memory_share": max(rung.least_memory_share, round(0.75 * rung.memory_share, 3))})
    if rung.micro_batch_size % 2 == 0:
        return Rung(**values | {"micro_batch_size": rung.micro_batch_size // 2})
    tokens = rung.max_completion_tokens
    if tokens is not None and min_completion_tokens is not None and tokens > min_completion_tokens:
        return Rung(**values | {"max_completion_tokens": max(min_completion_tokens, tokens // 2)})
    return None


def read(checkpoints: Path, top: Rung) -> tuple[Rung, list[dict[str, Any]]]:
    """Return the rung that a run stands on, and its steps down so far, as the manifest states them."""
    path = checkpoints / FILE
    steps = json.loads(path.read_text()) if path.is_file() else []
    return (Rung(**steps[-1]["to"]) if steps else top), steps


@contextlib.contextmanager
def stepping_down(
    checkpoints: Path, rung: Rung, min_completion_tokens: int | None, trainer: Any = None
) -> Iterator[None]:
    """Around loading or training: when the GPU's memory runs out, start the process anew one rung down."""
    try:
        yield
    # torch's OutOfMemoryError is the first, vLLM's refusal the second, Unsloth's while vLLM loads the third.
    except (RuntimeError, ValueError, MemoryError) as error:
        if not (says(error, TOO_SMALL) or is_out_of_memory(error)):
            raise
        step_down(checkpoints, rung, min_completion_tokens, trainer.state.global_step if trainer else 0, error)


def step_down(checkpoints: Path, rung: Rung, min_completion_tokens: int | None, step: int, error: Exception) -> None:
    """Note the rung under `rung` beside the checkpoints and start this process anew on it; it does not return.

    `step` is the optimizer step at which `error`, the lack of memory, came. A share of the GPU that turns out too small
    for vLLM goes back to what it was before, and stays there. Raises `UserError` when no rung is left.
    """
    steps = read(checkpoints, rung)[1]
    reason = str(error).splitlines()[0]
    start = rung
    if says(error, TOO_SMALL):
        shares = [share for each in steps if (share := each["from"]["memory_share"]) > rung.memory_share]
        if not shares:
            raise UserError(
                f"[vllm] memory_share = {rung.memory_share} of this GPU is too small for the model's weights and the "
                f"KV cache of one completion. Raise it, or use a GPU with more memory, [model] load_in_4bit = true or "
                f"a shorter max_completion_tokens. {reason}"
            ) from error
        start = replace(rung, memory_share=shares[-1], least_memory_share=shares[-1])
    below = lower(start, min_completion_tokens)
    if below is None:
        raise UserError(
            f"out of GPU memory at step {step} with nothing left to give up: {rung}. Use a GPU with more memory, "
            f"[model] load_in_4bit = true, a shorter max_completion_tokens or max_tokens, or a lower [lora] rank. "
            f"{reason}"
        ) from error
    steps.append({"at_step": step, "from": asdict(rung), "to": asdict(below), "reason": reason})
    checkpoints.mkdir(parents=True, exist_ok=True)
    temporary = checkpoints / f"{FILE}.tmp"
    temporary.write_text(json.dumps(steps, indent=2))
    temporary.rename(checkpoints / FILE)
    changed = [
        f"{name} {old} -> {asdict(below)[name]}" for name, old in asdict(rung).items() if old != asdict(below)[name]
    ]
    click.echo(f"out of GPU memory at step {step}: {', '.join(changed)}, and on from the last checkpoint", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    for name in DISTRIBUTED:
        os.environ.pop(name, None)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` is the GPU's memory running out: torch's own error, CUDA's, or vLLM's refusal to start."""
    return not says(error, (NOT_MEMORY,)) and (
        says(error, OUT_OF_MEMORY) or any(type(each).__name__ == "OutOfMemoryError" for each in chain(error))
    )


def says(error: BaseException, texts: Iterable[str]) -> bool:
    """Say whether one of `texts` is in the message of `error` or of what caused it."""
    return any(text in str(each) for each in chain(error) for text in texts)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error`, what caused it, what caused that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
