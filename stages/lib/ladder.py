"""What a trainer gives up, rung by rung, when the GPU's memory runs out, without changing what it learns.

Out of memory, a process can seldom free what it holds: fragments, CUDA graphs and vLLM's cache stay. So the stage notes
the next rung beside its checkpoints and starts itself anew, from the last checkpoint.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from stages.lib.errors import UserError

FILE = "memory_ladder.json"
MIN_MEMORY_SHARE = 0.2  # less would hold no useful KV cache beside the weights


@dataclass(frozen=True)
class Rung:
    """How much memory a run may take: the recipe's own values at the top."""

    micro_batch_size: int
    memory_share: float | None = None  # vLLM's, of the GPU; None: there is no vLLM, or the rung can't change it
    max_completion_tokens: int | None = None


def lower(rung: Rung, min_completion_tokens: int | None = None) -> Rung | None:
    """Return the next rung down, None when there is none.

    First vLLM's share shrinks by a quarter, down to `MIN_MEMORY_SHARE`: it costs speed only. Then the micro-batch
    halves, and accumulation doubles. The completion length, which changes what is learnt, halves last and never below
    `min_completion_tokens`; None: it does not.
    """
    values = asdict(rung)
    if rung.memory_share is not None and rung.memory_share > MIN_MEMORY_SHARE:
        return Rung(**values | {"memory_share": max(MIN_MEMORY_SHARE, round(0.75 * rung.memory_share, 3))})
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
    except (RuntimeError, ValueError) as error:  # torch's OutOfMemoryError is the first, vLLM's refusal the second
        if not is_out_of_memory(error):
            raise
        step_down(checkpoints, rung, min_completion_tokens, trainer.state.global_step if trainer else 0, error)


def step_down(checkpoints: Path, rung: Rung, min_completion_tokens: int | None, step: int, error: Exception) -> None:
    """Note the rung under `rung` beside the checkpoints and start this process anew on it; it does not return.

    `step` is the optimizer step at which `error`, the lack of memory, came. Raises `UserError` when no rung is left.
    """
    below = lower(rung, min_completion_tokens)
    reason = str(error).splitlines()[0]
    if below is None:
        raise UserError(
            f"out of GPU memory at step {step} with nothing left to give up: {rung}. Use a GPU with more memory, "
            f"[model] load_in_4bit = true, a shorter max_completion_tokens or max_tokens, or a lower [lora] rank. "
            f"{reason}"
        ) from error
    steps = read(checkpoints, rung)[1]
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
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` is the GPU's memory running out: torch's own error, CUDA's, or vLLM's refusal to start."""
    texts = ("CUDA out of memory", "out of memory", "No available memory for the cache blocks", "Free memory on device")
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ == "OutOfMemoryError" or any(text in str(seen) for text in texts):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
