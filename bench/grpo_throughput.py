"""Completion tokens a second of GRPO: this project's engine "unsloth" beside plain TRL with vLLM, on one GPU.

    python -m bench.grpo_throughput --work FOLDER --run unsloth:qwen3-1.7b:256:32 --run trl:qwen3-1.7b:256:8

A run is ENGINE:SHAPE:COMPLETIONS:MICRO_BATCH[:WORD...], each in a process of its own. A word is NAME=VALUE of [grpo]
or [vllm], or one of: `4bit`; `scoring` (keep Unsloth's pass that scores before it trains); `objects` (let vLLM make
text of its tokens and an object of each log-probability, and Python's garbage collector walk all); `uncut` (TRL's own
micro-batches, neither sorted, trimmed nor skipped); `profile` (write where a step's time goes on the GPU beside the
results).
The models have the published shapes and random weights: these hardly ever end by themselves, so all completions are
equally long. `mean=300` gives the end token such a bias that completions are 300 tokens long on average, were they not
truncated at 768: a geometric distribution. `idle=0.64` rewards so many of the groups all alike, which is what a first
run on real weights had (370 of 576). Both with engine "unsloth" alone. Tokens a second are of real tokens, useful ones
of groups with an advantage. Counted are whole optimizer steps after the first. Appends to
bench/results/grpo_throughput.jsonl.
"""

import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from stages import grpo
from stages.lib.artifact.folder import Run
from stages.lib.machine.copies import shape_of_model
from stages.lib.machine.memory import gpu_estimates
from stages.lib.model import unsloth
from stages.lib.model.engine import import_engine
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe, Vllm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "grpo_throughput.jsonl"
# shape: (family of tests/support/family_models.py, recipe, sizes)
SHAPES = {
    "qwen3-1.7b": ("qwen3", "qwen3-1.7b-dapo", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    }),
    "qwen2.5-3b": ("qwen2.5", "qwen2.5-3b-gsm8k", {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2,
    }),
    "llama3.1-8b": ("llama3.1", "llama3.1-8b-gsm8k", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }),
}  # fmt: skip
COMPLETION_TOKENS, PROMPT_TOKENS = 768, 128
# Added to the end token's logit, less ln(n), it ends a completion every n tokens: ln of the 151,936 entries of Qwen's
# vocabulary, of which random weights make each about equally likely.
END_BIAS = math.log(151_936)


def make_model(shape: str, work: Path) -> Path:
    """Write a random-weight model of a published shape, once; return its folder."""
    from tests.support import family_models

    family, _, sizes = SHAPES[shape]
    folder = work / shape
    if not (folder / "generation_config.json").is_file():
        import torch

        sizes = {**sizes, "max_position_embeddings": 4096, "initializer_range": 0.02}
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # on a GPU drawn in seconds
            family_models.base(family_models.FAMILIES[family], folder, **sizes)
    return folder


def make_adapter(recipe: Recipe, folder: Path, out: Path) -> Path:
    """Write an untrained adapter, as SFT's would be; return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    settings = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        target_modules=recipe.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    made = get_peft_model(model, settings).to_empty(device="cpu")
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.01) if "lora_A" in name else torch.nn.init.zeros_(weight)
    made.save_pretrained(out)
    return out


def changed(recipe: Recipe, run: str, work: Path) -> Recipe:
    """Return the recipe with what a run's name asks for."""
    engine, shape, completions, micro_batch, *extra = run.split(":")
    values = dict(word.split("=") for word in extra if "=" in word)

    def typed(table: Any) -> dict[str, Any]:
        known = {field.name: getattr(table, field.name) for field in fields(table)}
        return {name: type(known[name])(json.loads(text)) for name, text in values.items() if name in known}

    group = 4 if int(completions) == 4 else 8
    new = replace(
        recipe.grpo,
        steps=4,
        prompts_per_step=int(completions) // group,
        completions_per_prompt=group,
        micro_batch_size=int(micro_batch),
        max_completion_tokens=COMPLETION_TOKENS,
        mask_truncated_completions=False,  # every completion is cut off here, and all would be masked
        save_steps=1000,
        log_steps=1,
        show_completions_steps=1000,
    )
    vllm = recipe.vllm or Vllm(0.5, 256)
    return replace(
        recipe,
        model=replace(recipe.model, name=str(work / shape), revision="", engine=engine, load_in_4bit="4bit" in extra),
        model_folder=work / shape,
        vllm=replace(vllm, **{"sequences": max(8, int(completions)), **typed(vllm)}),
        data=replace(recipe.data, max_prompt_tokens=PROMPT_TOKENS + 64),
        grpo=replace(new, **typed(new)),
    )


def watch(owner: Any, name: str, spent: dict[str, float], key: str) -> None:
    """Let calls of `owner.name` add their seconds to `spent[key]`."""
    inner = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[key] = spent.get(key, 0.0) + time.monotonic() - started

    setattr(owner, name, timed)


class Profile:
    """Kernels of one step, its generation and its training apart, as torch's profiler sees them on the GPU."""

    def __init__(self) -> None:
        self.profiler: Any = None
        self.parts: dict[str, tuple[float, dict[str, tuple[int, float]]]] = {}

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profiler = profile(activities=[ProfilerActivity.CUDA])
        self.profiler.start()

    def stop(self, part: str, seconds: float) -> None:
        """End a part that took so long by the clock; keep how often each kernel ran and its seconds in all."""
        self.profiler.stop()
        kernels: dict[str, tuple[int, float]] = {}
        for event in self.profiler.profiler.kineto_results.events():
            if str(event.device_type()).endswith("CUDA"):
                count, total = kernels.get(event.name(), (0, 0.0))
                kernels[event.name()] = count + 1, total + event.duration_ns() / 1e9
        self.parts[part] = seconds, kernels
        self.profiler = None

    def part(self, owner: Any, name: str, spent: dict[str, float]) -> None:
        """Let a call of `owner.name` be a part of its own, while the profile runs."""
        inner = getattr(owner, name)

        def profiled(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if self.profiler:
                self.stop("generation", spent["generation"])
                self.start()
            return result

        setattr(owner, name, profiled)

    def write(self, run: str, path: Path) -> None:
        """Write a table of the kernels that took longest."""
        command = f"python -m bench.grpo_throughput --work FOLDER --run {run}"
        lines = ["# Where one GRPO step spends the GPU's time", "", f"`{command}`"]
        for part, (seconds, kernels) in self.parts.items():
            busy = sum(total for _, total in kernels.values())
            lines += ["", f"## {part}: {seconds:.2f} s by the clock, kernels {busy:.2f} s", ""]
            lines += ["| kernel | times | seconds | share of the kernels |", "|---|--:|--:|--:|"]
            most = sorted(kernels.items(), key=lambda item: -item[1][1])[:25]
            for name, (count, total) in most:
                shown = name.replace("|", "\\|")[:110]
                lines.append(f"| `{shown}` | {count:,} | {total:.3f} | {total / busy:.1%} |")
        path.write_text("\n".join(lines) + "\n")


def measure(run: str, work: Path) -> dict[str, Any]:
    """Return what one run came to: seconds of each part of a step (medians), tokens a second, peak GPU memory."""
    engine, shape, _, _, *words = run.split(":")
    recipe = changed(read_recipe(ROOT / "recipes" / f"{SHAPES[shape][1]}.toml"), run, work)
    problems = work / "problems.jsonl"
    prompt = [{"role": "user", "content": "one two three four " * 24 + "{}"}]
    with problems.open("w") as file:
        for number in range(2000):
            turns = [{**turn, "content": turn["content"].format(number)} for turn in prompt]
            file.write(json.dumps({"prompt": turns, "answer": str(number)}) + "\n")
    peak, stop = [0], threading.Event()

    def look() -> None:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        query = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not stop.wait(0.5):
            peak[0] = max(peak[0], int(subprocess.run(query, capture_output=True, text=True).stdout.split()[0]))

    threading.Thread(target=look, daemon=True).start()
    started = time.monotonic()
    if engine == "unsloth":
        import_engine(recipe)
    import torch
    from transformers import TrainerCallback, trainer
    from trl import GRPOTrainer
    from trl.generation.vllm_generation import VLLMGeneration

    spent: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    profile = Profile() if "profile" in words else None

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.started = time.monotonic()
            spent.setdefault("load", self.started - started)
            if profile and state.global_step == recipe.grpo.steps:  # one more than are counted
                profile.start()

        def on_step_end(self, args, state, control, **kwargs):
            whole = time.monotonic() - self.started
            if state.global_step > recipe.grpo.steps:
                profile.stop("training", whole - spent["generation"])
                return
            parts = {name: spent.pop(name, 0.0) for name in ("generation", "scoring", "weight transfer")}
            steps.append({"step": whole, **parts, "training": whole - sum(parts.values())})
            print(f"{run}: step {state.global_step} {steps[-1]}", flush=True)

    trainer.DEFAULT_CALLBACKS.append(Timer)
    watch(VLLMGeneration, "generate", spent, "generation")
    if profile:
        profile.part(VLLMGeneration, "generate", spent)
    if "objects" in words:
        inner, costly = grpo.arguments, {"detokenize": True, "flat_logprobs": False}
        grpo.arguments = lambda *args: (
            (made := inner(*args)) | {"generation_kwargs": {**made["generation_kwargs"], **costly}}
        )
        grpo.settle_heap = TrainerCallback
    if "scoring" in words:
        unsloth.needs_scoring_pass = grpo.needs_scoring_pass = lambda recipe: True
    if "uncut" in words:
        grpo.arrange_micro_batches = lambda trainer: None
    made_tokens: list[tuple[int, int]] = []
    if engine == "unsloth":
        values = dict(word.split("=") for word in words if "=" in word)
        spread_out(recipe, float(values.get("mean", 0)), float(values.get("idle", 0)), made_tokens)
    watch(VLLMGeneration, "sync_weights", spent, "weight transfer")
    watch(GRPOTrainer, "_calculate_rewards", spent, "scoring")
    folder = work / "run"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    made = Run(folder)
    made.checkpoints.mkdir(parents=True)
    if engine == "unsloth":
        longer = replace(recipe, grpo=replace(recipe.grpo, steps=recipe.grpo.steps + bool(profile)))
        grpo.train(longer, grpo.Rows(problems, problems), work / f"{shape}-adapter", made)
    else:
        plain_trl(recipe, problems, made)
    stop.set()
    tokens = recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt * COMPLETION_TOKENS
    counted = steps[1:]
    if made_tokens:
        tokens, useful = (statistics.mean(counts) for counts in zip(*made_tokens[1 : 1 + len(counted)], strict=True))
    if profile:
        profile.write(run, RESULTS.with_name("grpo_profile.md"))
    total = torch.cuda.get_device_properties(0).total_memory
    stages = gpu_estimates(recipe, shape_of_model(recipe, work / shape)[0], total)
    medians = {name: round(statistics.median(step[name] for step in counted), 2) for name in counted[0]}
    return {
        "run": run,
        "tokens_per_second": round(tokens / medians["step"]),
        **(
            {"useful_tokens_per_second": round(useful / medians["step"]), "tokens": round(tokens)}
            if made_tokens
            else {}
        ),
        "load": round(spent["load"], 1),
        "first step": round(steps[0]["step"], 1),
        **medians,
        "peak_gib": round(peak[0] / 1024, 1),
        **({"estimated_gib": round(stages["grpo"].peak_bytes / 2**30, 1)} if engine == "unsloth" else {}),
    }


def spread_out(recipe: Recipe, mean: float, idle: float, made_tokens: list[tuple[int, int]]) -> None:
    """Give completions a spread of lengths, and a share of the groups rewards that are all alike.

    Appends, a step, how many tokens it made, and how many of them in groups with an advantage.
    """
    group = recipe.grpo.completions_per_prompt
    inner = grpo.arguments

    def arguments(*given: Any) -> dict[str, Any]:
        made = inner(*given) | {"reward_weights": [1.0]}
        if mean:
            made["generation_kwargs"] |= {"logit_bias": {given[2][0]: END_BIAS - math.log(mean)}}
        return made

    def distinct(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        def is_idle(row: int) -> bool:
            number = row // group
            return int((number + 1) * idle) > int(number * idle)

        lengths = [len(ids) for ids in completion_ids]
        made_tokens.append((sum(lengths), sum(n for row, n in enumerate(lengths) if not is_idle(row))))
        return [1.0 if is_idle(row) else len(set(ids)) / 100 for row, ids in enumerate(completion_ids)]

    grpo.arguments = arguments
    grpo.load_rewards = lambda *given, **named: [distinct]


def plain_trl(recipe: Recipe, problems: Path, run: Run) -> None:
    """Train with TRL's own trainer and its colocated vLLM, the same recipe otherwise."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    arguments = grpo.arguments(recipe, run.checkpoints)
    arguments |= {
        "use_vllm": True,
        "vllm_gpu_memory_utilization": recipe.vllm.memory_share,
        "vllm_max_model_length": recipe.data.max_prompt_tokens + COMPLETION_TOKENS,
        "model_init_kwargs": {"dtype": recipe.model.dtype},
        "save_strategy": "no",
        "report_to": [],
    }
    rows = load_dataset("json", data_files=str(problems), split="train", cache_dir=str(run.folder / "cache"))
    lora = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        target_modules=recipe.lora.target_modules,
        task_type="CAUSAL_LM",
    )

    def distinct(completions: list[Any], **kwargs: Any) -> list[float]:
        return [len(set(turns[-1]["content"].split())) / 100 for turns in completions]

    arguments |= {"reward_weights": [1.0]}
    GRPOTrainer(
        model=recipe.model.name,
        args=GRPOConfig(**arguments),
        reward_funcs=[distinct],
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(recipe.model.name),
        peft_config=lora,
    ).train()


def note(result: dict[str, Any], out: Path) -> None:
    """Append a run's figures to `out`, with the machine, the date and the versions."""
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "vllm", "unsloth", "unsloth_zoo")}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    line = json.dumps({**result, "gpu": gpu, "date": str(datetime.date.today()), "packages": packages})
    with out.open("a") as file:
        file.write(line + "\n")
    click.echo(line)


def run_apart(module: str, run: str, work: Path, out: Path, timeout_seconds: int) -> None:
    """Measure a run in a process of its own: what it leaves on the GPU is gone with it."""
    command = [sys.executable, "-m", module, "--work", str(work), "--run", run, "--here", "--out", str(out)]
    try:
        subprocess.run(command, cwd=ROOT, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        click.echo(f"{run}: not finished in {timeout_seconds} s")


@click.command(help=__doc__.partition("\n")[0])
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where models go.")
@click.option("--run", "runs", multiple=True, required=True)
@click.option("--timeout-seconds", default=400, show_default=True, help="For one run.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
@click.option("--here", is_flag=True, hidden=True, help="Measure in this process.")
def main(work: Path, runs: tuple[str, ...], timeout_seconds: int, out: Path, here: bool) -> None:
    if here:
        return note(measure(runs[0], work), out)
    work.mkdir(parents=True, exist_ok=True)
    for run in runs:
        shape = run.split(":")[1]
        folder = make_model(shape, work)
        recipe = read_recipe(ROOT / "recipes" / f"{SHAPES[shape][1]}.toml")
        if not (work / f"{shape}-adapter").is_dir():
            make_adapter(recipe, folder, work / f"{shape}-adapter")
        run_apart("bench.grpo_throughput", run, work, out, timeout_seconds)


if __name__ == "__main__":
    main()
