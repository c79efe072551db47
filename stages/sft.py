"""Fine-tune the base model on worked solutions, so that it learns the answer format."""

from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.artifact.folder import Run, write_artifact
from stages.lib.errors import UserError
from stages.lib.machine.room import room_to_train
from stages.lib.model.engine import import_engine
from stages.lib.model.load import load_trainable
from stages.lib.model.locate import local_model
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report.figures import SftFigures
from stages.lib.train import ladder, trackers
from stages.lib.train.config import shared_arguments
from stages.lib.train.launch import train_on_gpus
from stages.lib.train.run import configure, read_rows, run_trainer, save_adapter


@click.command(help=__doc__)
@options.recipe
@options.reads("prepare-data")
@options.base_model
@options.out
def main(recipe: Path, prepare_data: Path, base_model: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe, base_model)
    inputs = {"prepare-data": (prepare_data, ["sft.jsonl"])}
    inputs |= {"base-model": (base_model, ["model/*"])} if base_model else {}
    tables = run_recipe.tables("model", "format", "lora", "sft")
    sources = local_model(run_recipe)
    examples = prepare_data / "sft.jsonl"
    room = room_to_train(run_recipe, "sft", examples)
    with write_artifact(out, "sft", tables, inputs, sources=sources, room_bytes=room) as run:
        run.metrics.update(train_on_gpus(run_recipe, "sft", run, lambda: train(run_recipe, examples, run)))


def arguments(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Return the fields of TRL's SFTConfig: every one that changes the result, none left to a default."""
    knobs = recipe.sft
    return shared_arguments(recipe, knobs, knobs.batch_size, output) | {
        "max_length": knobs.max_tokens,
        "packing": knobs.packing,
        "packing_strategy": "bfd",
        "padding_free": False,
        "completion_only_loss": True,
        "assistant_only_loss": False,
        "loss_type": "nll",
        "shuffle_dataset": False,  # the sampler shuffles
        "train_sampling_strategy": "random",
        "activation_offloading": False,
    }


def train(recipe: Recipe, examples: Path, run: Run) -> SftFigures:
    """Train a LoRA adapter on `examples`, save it under `run.folder`, return the figures."""
    trackers.prepare(recipe, run.folder.parent)
    import_engine(recipe)
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(recipe.sft.seed)  # the trainer's own comes after PEFT has drawn the adapter's first weights
    recipe = ladder.lowered(recipe, "sft", run.checkpoints)
    tokenizer = load_tokenizer(recipe)
    model = load_trainable(recipe, adapter=None)
    rows = read_rows(examples, run).select_columns(["prompt", "completion"])

    def fits(row: dict[str, Any]) -> bool:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        return len(ids) <= recipe.sft.max_tokens

    fitting = rows.filter(fits, desc="measuring")  # a truncated example would teach never to end
    if len(fitting) == 0:
        message = f"{examples}: all {len(rows)} examples are longer than [sft] max_tokens = {recipe.sft.max_tokens}"
        raise UserError(f"{message}. Raise it in the recipe and run: make sft")
    trainer = SFTTrainer(
        model=model,
        args=configure(SFTConfig, arguments(recipe, run.checkpoints)),
        train_dataset=fitting,
        processing_class=tokenizer,
    )
    for callback in trackers.follow(recipe, "sft", run.folder.parent, trainer):
        trainer.add_callback(callback)
    with ladder.stepping_down(recipe, "sft", run.checkpoints, trainer):
        run_trainer(trainer, {"loss": "loss"}, recipe.health)
    save_adapter(trainer, tokenizer, run)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "examples": len(fitting),
        "dropped_too_long": len(rows) - len(fitting),
        "loss": sum(last) / len(last),
        "trainable_parameters": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        "memory_ladder": ladder.read_steps(run.checkpoints),
    }


if __name__ == "__main__":
    main()
