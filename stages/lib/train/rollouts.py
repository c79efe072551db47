"""The completions that GRPO samples: kept with what each was paid, and shown on the terminal."""

import json
from pathlib import Path
from typing import Any

from stages.lib.artifact.manifest import write_whole


def keep_completions(trainer: Any, path: Path, show_steps: int) -> Any:
    """Return a callback that appends every sampled completion with its rewards to the JSON lines file `path`.

    Every `show_steps` steps it also shows the best and the worst of them on the terminal.
    """
    from transformers import TrainerCallback

    class KeepCompletions(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lines_until(path, state.global_step))  # a run that is carried on repeats the rest

        def on_step_end(self, args, state, control, **kwargs):
            # TRL has no public way to a step's completions but a table on every log: these are its own records.
            logs = trainer._logs
            rows = [
                {
                    "step": state.global_step,
                    "prompt": prompt,
                    "completion": completion,
                    "advantage": round(advantage, 4),
                }
                for prompt, completion, advantage in zip(
                    logs["prompt"], logs["completion"], logs["advantages"], strict=True
                )
            ]
            for name, values in logs["rewards"].items():
                for row, value in zip(rows, values, strict=True):
                    row[name] = value
            if (state.global_step - 1) % args.num_iterations == 0:  # the other steps go over the same ones again
                with path.open("a") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if state.global_step % show_steps == 0:
                show(rows, state.global_step)

    return KeepCompletions()


def lines_until(path: Path, step: int) -> bytes:
    """Return the lines of completions up to `step`. After them KILL or a power cut may have left anything."""
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            break
        kept.append(line + b"\n")
    return b"".join(kept)


def show(rows: list[dict[str, Any]], step: int) -> None:
    """Show the completion of a step with the highest advantage and the one with the lowest, with what each was paid."""
    from tqdm import tqdm

    lines = []
    for name, row in (
        ("best", max(rows, key=lambda row: row["advantage"])),
        ("worst", min(rows, key=lambda row: row["advantage"])),
    ):
        paid = "  ".join(
            f"{key} {value:g}" for key, value in row.items() if key not in ("step", "prompt", "completion")
        )
        lines += [
            f"step {step}, {name}: {paid}",
            *("    " + line for line in row["completion"].strip().splitlines()[:12]),
        ]
    tqdm.write("\n".join(lines))
