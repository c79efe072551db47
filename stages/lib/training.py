"""What SFT and GRPO share: checkpoints to trust, an orderly end on TERM, and what a person sees meanwhile."""

import glob
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.lib import health
from stages.lib.artifact import LOGS, Run
from stages.lib.errors import UserError
from stages.lib.recipe import Health

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

COMPLETE = "complete"  # in a checkpoint: everything was written; transformers itself writes one file after another


def train(
    trainer: "Trainer",
    checkpoints: Path,
    bar: tuple[str, ...],
    knobs: Health,
    extra: tuple[Any, ...] = (),
    *,
    round_steps: int = 1,
) -> None:
    """Run `trainer`, from its last complete checkpoint if there is one, with `bar` naming the metrics beside the bar.

    On TERM or INT the round of `round_steps` in hand is finished (for a trainer that can only be carried on between
    two), a checkpoint is saved, and the process exits with 128 + the signal. Raises `UserError` when the log shows
    what `knobs` say is a wasted run.
    """
    from transformers import PrinterCallback, ProgressCallback

    progress, stop, watch = make_callbacks(bar, round_steps, knobs)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in (progress, stop, watch, *extra):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints, trainer.args.max_steps))
    if stop.signal is not None:
        click.echo(
            f"stopped by {signal.Signals(stop.signal).name}, saved at step {trainer.state.global_step}", err=True
        )
        raise SystemExit(128 + stop.signal)


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


def last_checkpoint(folder: Path, steps: int) -> str | None:
    """Return the newest complete checkpoint under `folder` for a run of `steps`, or None; delete the others of no use.

    Those are what a crash left incomplete, and the checkpoint of the last step: carried on from there, transformers'
    Trainer would take one step more.
    """
    usable = {}
    for path in folder.glob("checkpoint-*"):
        if not path.name.removeprefix("checkpoint-").isdecimal():
            continue  # somebody's own
        step = int(path.name.split("-")[1])
        if (path / COMPLETE).is_file() and step < steps:
            usable[step] = path
        else:
            shutil.rmtree(path)
    return str(usable[max(usable)]) if usable else None


def keep_logs(checkpoints: Path) -> None:
    """Let TensorBoard's files lie with the checkpoints, so that a run that is carried on keeps its curves."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(checkpoints / LOGS)


def make_callbacks(bar: tuple[str, ...], round_steps: int, knobs: Health) -> tuple[Any, Any, Any]:
    """Return the progress bar, the signal handler and the watch over the log, as callbacks of transformers' Trainer."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """A bar with the metrics named in `bar` and the time left."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.tqdm = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

        def on_step_end(self, args, state, control, **kwargs):
            self.tqdm.update(state.global_step - self.tqdm.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.tqdm.set_postfix({name: f"{logs[name]:.3f}" for name in bar if name in logs})

        def on_train_end(self, args, state, control, **kwargs):
            self.tqdm.close()

    class StopOnSignal(TrainerCallback):
        """Save and stop after the round in which TERM or INT came; mark what was saved as complete."""

        signal: int | None = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(self, number, frame):
            self.signal = number

        def on_step_end(self, args, state, control, **kwargs):
            if self.signal is not None and state.global_step % round_steps == 0:
                control.should_save = control.should_training_stop = True

        def on_save(self, args, state, control, **kwargs):
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

        def on_train_end(self, args, state, control, **kwargs):
            for number, handler in self.before.items():
                signal.signal(number, handler)

    class Watch(TrainerCallback):
        """Stop a run that would only waste GPU hours, or say so once, as the recipe's [health] says."""

        said: set[str] = set()

        def on_log(self, args, state, control, **kwargs):
            for check, advice in health.find(state.log_history, knobs, scaled=args.fp16).items():
                if check not in knobs.warn_only:
                    raise UserError(f"stopped at step {state.global_step} by the {check} check: {advice}")
                if check not in self.said:
                    self.said.add(check)
                    tqdm.write(f"step {state.global_step}, {check} check: {advice}")

    return Progress(), StopOnSignal(), Watch()


def save_adapter(trainer: "Trainer", tokenizer: Any, run: Run) -> None:
    """Save the adapter in `adapter/`, the tokenizer with its chat template in `tokenizer/`, the curves in `logs/`."""
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(run.folder / "adapter")
    (run.folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    tokenizer.save_pretrained(run.folder / "tokenizer")
    shutil.rmtree(run.folder / "cache", ignore_errors=True)
    shutil.copytree(run.checkpoints / LOGS, run.folder / LOGS)  # a copy: killed now, the run still needs its own
