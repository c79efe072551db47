"""What SFT and GRPO share: an orderly end on TERM, what is logged, and what is saved at the end."""

import glob
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages.lib.artifact.folder import Run
from stages.lib.artifact.manifest import LOGS
from stages.lib.recipe.tables import Health
from stages.lib.train import ranks
from stages.lib.train.callbacks import make_callbacks, reseed, watch_health
from stages.lib.train.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments


def run_trainer(trainer: "Trainer", bar: Mapping[str, str], knobs: Health, *, round_steps: int = 1) -> None:
    """Run `trainer` from its last complete checkpoint, if there is one; `bar` names the metrics beside the bar,
    by the short name that is shown.

    On TERM, HUP or INT the trainer finishes its round of `round_steps`, saves a checkpoint, and the process exits with
    128 + the signal; a second INT ends it at once. A run goes on from the end of a round only. Raises `UserError` when
    the log shows what `knobs` call a wasted run.
    """
    from transformers import PrinterCallback, ProgressCallback

    progress, stop = make_callbacks(bar, round_steps)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in ([progress] if ranks.is_first() else []) + [stop, watch_health(knobs)]:
        trainer.add_callback(callback)
    checkpoints = Path(trainer.args.output_dir)
    start = last_checkpoint(checkpoints, trainer.args.max_steps)
    if start and ranks.lacks_random_state(Path(start)):
        trainer.add_callback(reseed())
    try:
        trainer.train(resume_from_checkpoint=start)
    finally:
        progress.close()  # or what is said of an error would stand on its line
    if stop.signal is not None:
        name = signal.Signals(stop.signal).name
        click.echo(f"stopped by {name}, saved at step {trainer.state.global_step}", err=True)
        raise SystemExit(128 + stop.signal)


def read_rows(path: Path, run: Run) -> "Dataset":
    """Return the rows of a JSON lines file."""
    from datasets import load_dataset

    files = glob.escape(str(path.absolute()))  # a [ or * of the path stands for itself
    return load_dataset("json", data_files=files, split="train", cache_dir=str(run.folder / "cache"))


def configure(kind: "type[TrainingArguments]", fields: dict[str, Any]) -> "TrainingArguments":
    """Return the trainer's configuration, of TRL's class `kind`, for one device: a GPU if there is one.

    With several GPUs, transformers would run a micro-batch on each. Without one, it refuses bfloat16 unless told
    `use_cpu`. TensorBoard's files go beside the checkpoints, so that a resumed run keeps its curves.
    """
    import torch

    os.environ["TENSORBOARD_LOGGING_DIR"] = f"{fields['output_dir']}/{LOGS}"
    config = kind(**fields, **({} if torch.accelerator.is_available() else {"use_cpu": True}))
    config._n_gpu = min(config.n_gpu, 1)
    if ranks.world_size() > 1:
        config.ddp_find_unused_parameters = False  # every adapter weight has a gradient
        if config.use_cpu:  # a checkpoint's optimizer is read to this device, and torch.load knows no cpu:0
            config.__dict__["_setup_devices"] = torch.device("cpu")
    return config


def write_adapter(trainer: "Trainer", folder: Path) -> None:
    """Write the adapter as it is now to `folder`."""
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    if isinstance(settings["target_modules"], list):  # made of a set: each process has another order
        settings["target_modules"].sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True))


def save_adapter(trainer: "Trainer", tokenizer: Any, run: Run, kept: Path | None = None) -> None:
    """Save the adapter in `adapter/`, the tokenizer with its chat template in `tokenizer/`, the curves in `logs/`.

    `kept`: the folder of an adapter that was written before; None: as it is now.
    """
    if not ranks.is_first():
        return
    if kept:
        shutil.copytree(kept, run.folder / "adapter")
    else:
        write_adapter(trainer, run.folder / "adapter")
    tokenizer.save_pretrained(run.folder / "tokenizer")
    shutil.rmtree(run.folder / "cache", ignore_errors=True)
    shutil.copytree(run.checkpoints / LOGS, run.folder / LOGS)  # if it is killed now, the run still needs these
