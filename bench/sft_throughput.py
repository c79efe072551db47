"""Trained tokens a second of SFT: this project's engine "unsloth" beside plain TRL, on one GPU.

    python -m bench.sft_throughput --work FOLDER

Qwen3-1.7B's shape with random weights, 16-bit LoRA, rows of at most 2,048 tokens, examples of 100 to 900, with packing
and without. Each run is a process of its own. Counted are whole optimizer steps after the third, and no padding.
Appends to bench/results/sft_throughput.jsonl.
"""

import json
import random
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bench.grpo_throughput import ROOT, make_model, note, run_apart
from stages import sft
from stages.lib.artifact.folder import Run
from stages.lib.model.engine import import_engine
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe

RESULTS = ROOT / "bench" / "results" / "sft_throughput.jsonl"
SHAPE, STEPS, BATCH, MICRO_BATCH, TOKENS, WARM_UP = "qwen3-1.7b", 13, 32, 8, 2048, 3
RUNS = ["unsloth:packing", "trl:packing", "unsloth:padding", "trl:padding"]


def write_examples(path: Path) -> None:
    """Write examples of 100 to 900 tokens."""
    chance = random.Random(0)
    with path.open("w") as file:
        for number in range(4000):
            words = " ".join(chance.choice(["one", "two", "three", "four"]) for _ in range(chance.randint(50, 850)))
            turns = [{"role": "user", "content": f"Say {number}."}], [{"role": "assistant", "content": words}]
            file.write(json.dumps(dict(zip(("prompt", "completion"), turns, strict=True))) + "\n")


def plain_trl(recipe: Recipe, examples: Path, run: Run) -> None:
    """Train with TRL's own trainer, the same recipe otherwise."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = sft.arguments(recipe, run.checkpoints)
    arguments |= {"model_init_kwargs": {"dtype": recipe.model.dtype}, "save_strategy": "no", "report_to": []}
    lora = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        target_modules=recipe.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    SFTTrainer(
        model=recipe.model.name,
        args=SFTConfig(**arguments),
        train_dataset=load_dataset("json", data_files=str(examples), split="train"),
        processing_class=AutoTokenizer.from_pretrained(recipe.model.name),
        peft_config=lora,
    ).train()


def measure(run: str, work: Path) -> dict[str, Any]:
    """Return what one run came to: medians over its counted steps."""
    engine, layout = run.split(":")
    recipe = read_recipe(ROOT / "recipes" / "qwen3-1.7b-dapo.toml")
    knobs = replace(
        recipe.sft, steps=STEPS, batch_size=BATCH, micro_batch_size=MICRO_BATCH, max_tokens=TOKENS,
        packing=layout == "packing", save_steps=1000, log_steps=1,
    )  # fmt: skip
    model = replace(recipe.model, name=str(work / SHAPE), revision="", engine=engine)
    recipe = replace(recipe, model=model, model_folder=work / SHAPE, sft=knobs)
    write_examples(work / "examples.jsonl")
    if engine == "unsloth":
        import_engine(recipe)
    import torch
    from transformers import Trainer, TrainerCallback, trainer

    steps: list[tuple[float, int]] = []
    seen = [0]
    inner = Trainer.training_step

    def counted(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        seen[0] += int((inputs["input_ids"] != self.processing_class.pad_token_id).sum())
        return inner(self, model, inputs, *rest)

    Trainer.training_step = counted

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen[0], self.started = 0, time.monotonic()

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            steps.append((time.monotonic() - self.started, seen[0]))
            print(f"{run}: step {state.global_step} {steps[-1]}", flush=True)

    trainer.DEFAULT_CALLBACKS.append(Timer)
    folder = work / "sft-run"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    made = Run(folder)
    made.checkpoints.mkdir(parents=True)
    if engine == "unsloth":
        sft.train(recipe, work / "examples.jsonl", made)
    else:
        plain_trl(recipe, work / "examples.jsonl", made)
    counted_steps = steps[WARM_UP:]
    return {
        "run": run,
        "tokens_per_second": round(statistics.median(tokens / seconds for seconds, tokens in counted_steps)),
        "tokens_a_step": round(statistics.median(tokens for _, tokens in counted_steps)),
        "step": round(statistics.median(seconds for seconds, _ in counted_steps), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


@click.command(help=__doc__.partition("\n")[0])
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where the model goes.")
@click.option("--run", "runs", multiple=True, default=RUNS, show_default=True)
@click.option("--timeout-seconds", default=240, show_default=True, help="For one run.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
@click.option("--here", is_flag=True, hidden=True, help="Measure in this process.")
def main(work: Path, runs: tuple[str, ...], timeout_seconds: int, out: Path, here: bool) -> None:
    if here:
        return note(measure(runs[0], work), out)
    work.mkdir(parents=True, exist_ok=True)
    make_model(SHAPE, work)
    for run in runs:
        run_apart("bench.sft_throughput", run, work, out, timeout_seconds)


if __name__ == "__main__":
    main()
