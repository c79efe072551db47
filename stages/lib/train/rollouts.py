"""The completions that GRPO samples: kept with their rewards, and shown on the terminal."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.lib.artifact.manifest import write_whole

MAX_LINE_BYTES = 1 << 26  # of a completion with its prompt: longer is what a power cut left


def keep_completions(trainer: Any, path: Path, show_steps: int) -> Any:
    """Return a callback that appends every sampled completion with its rewards to the JSON lines file `path`.

    Every `show_steps` steps it also shows the best and the worst of them on the terminal.
    """
    from transformers import TrainerCallback

    class KeepCompletions(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lines_until(path, state.global_step))  # the run samples the rest again

        def on_step_end(self, args, state, control, **kwargs):
            logs = trainer._logs  # TRL's own records: its public way to them is a table on every log
            columns = {"prompt": logs["prompt"], "completion": logs["completion"]}
            columns |= {"advantage": [round(value, 4) for value in logs["advantages"]], **scored(logs["rewards"])}
            rows = [
                {"step": state.global_step, **dict(zip(columns, values, strict=True))}
                for values in zip(*columns.values(), strict=True)
            ]
            if (state.global_step - 1) % args.num_iterations == 0:  # other steps train on the same completions again
                with path.open("a") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if state.global_step % show_steps == 0:
                show(rows, state.global_step)

    return KeepCompletions()


def scored(rewards: Mapping[str, Iterable[float]]) -> dict[str, list[float | None]]:
    """Return TRL's record of the rewards with None, in place of NaN, for what is not scored: JSON has no NaN."""
    return {name: [None if math.isnan(value) else value for value in values] for name, values in rewards.items()}


def lines_until(path: Path, step: int) -> bytes:
    """Return the lines of completions up to `step`. After them KILL or a power cut may have left anything."""
    kept: list[bytes] = []
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, LookupError, RecursionError):
                break
            kept.append(line)
    return b"".join(kept)


def show(rows: list[dict[str, Any]], step: int) -> None:
    """Show the completion of a step with the highest advantage and the one with the lowest, with their rewards."""
    from tqdm import tqdm

    rows = sorted(rows, key=lambda row: row["advantage"])
    for name, row in (("best", rows[-1]), ("worst", rows[0])):
        values = {key: value for key, value in row.items() if key not in ("step", "prompt", "completion")}
        rewards = [f"{key} {'not scored' if value is None else f'{value:g}'}" for key, value in values.items()]
        lines = ["    " + line for line in row["completion"].strip().splitlines()[:12]]
        tqdm.write("\n".join([f"step {step}, {name}: {'  '.join(rewards)}", *lines]))
