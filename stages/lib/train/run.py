"""What SFT and GRPO share: an orderly end on TERM, what is logged, and what is saved at the end."""

import glob
import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.lib.artifact.folder import Run
from stages.lib.artifact.manifest import LOGS
from stages.lib.recipe.tables import Health
from stages.lib.train.callbacks import make_callbacks
from stages.lib.train.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments


def run_trainer(
    trainer: "Trainer",
    checkpoints: Path,
    bar: tuple[str, ...],
    knobs: Health,
    extra: tuple[Any, ...] = (),
    *,
    round_steps: int = 1,
) -> None:
    """Run `trainer`, from its last complete checkpoint if there is one, with `bar` naming the metrics beside the bar.

    On TERM, HUP or INT the round of `round_steps` in hand is finished (for a trainer that can only be carried on
    between two), a checkpoint is saved, and the process exits with 128 + the signal. A second INT ends it at once.
    Raises `UserError` when the log shows what `knobs` say is a wasted run.
    """
    from transformers import PrinterCallback, ProgressCallback

    progress, stop, watch = make_callbacks(bar, round_steps, knobs)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in (log_every_step(), progress, stop, watch, *extra):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints, trainer.args.max_steps))
    if stop.signal is not None:
        click.echo(
            f"stopped by {signal.Signals(stop.signal).name}, saved at step {trainer.state.global_step}", err=True
        )
        raise SystemExit(128 + stop.signal)


def log_every_step() -> Any:
    """Return a callback that lets the trainer log each step, and save as often as its arguments now say.

    So what is recorded depends neither on log_steps nor on the step at which a run was killed: the trainer keeps its
    sums since the last entry in memory alone. And it goes by the log_steps and save_steps of a checkpoint that it is
    carried on from.
    """
    from transformers import TrainerCallback

    class LogEveryStep(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.logging_steps, state.save_steps = 1, args.save_steps

    return LogEveryStep()


def read_rows(path: Path, run: Run) -> "Dataset":
    """Return the rows of a JSON lines file."""
    from datasets import load_dataset

    # What a path holds of [ or * stands for itself.
    pattern = glob.escape(str(path.absolute()))
    return load_dataset("json", data_files=pattern, split="train", cache_dir=str(run.folder / "cache"))


def configure(kind: "type[TrainingArguments]", fields: dict[str, Any]) -> "TrainingArguments":
    """Return the trainer's configuration, of TRL's class `kind`, for one device: a GPU if there is one.

    With several GPUs in sight transformers would take as many micro-batches at once, which nobody asked for; and
    without one it refuses bfloat16 unless it is told that a CPU is meant.
    """
    import torch

    config = kind(**fields, **({} if torch.accelerator.is_available() else {"use_cpu": True}))
    config._n_gpu = min(config.n_gpu, 1)
    return config


def keep_logs(checkpoints: Path) -> None:
    """Let TensorBoard's files lie with the checkpoints, so that a run that is carried on keeps its curves."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints / LOGS)


def save_adapter(trainer: "Trainer", tokenizer: Any, run: Run) -> None:
    """Save the adapter in `adapter/`, the tokenizer with its chat template in `tokenizer/`, the curves in `logs/`."""
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(run.folder / "adapter")
    (run.folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    path = run.folder / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    if isinstance(settings["target_modules"], list):  # of a set: in another order in each process
        settings["target_modules"].sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True))
    tokenizer.save_pretrained(run.folder / "tokenizer")
    shutil.rmtree(run.folder / "cache", ignore_errors=True)
    shutil.copytree(run.checkpoints / LOGS, run.folder / LOGS)  # a copy: killed now, the run still needs its own
