"""Does it learn on a GPU, with engine "unsloth"? A base made on the spot, then every stage as the Makefile calls them.

    python -m bench.gpu_learning --work FOLDER

The base is a Qwen3 network of about 100 M parameters with the real Qwen2 vocabulary, trained for a few minutes on
generated word problems of one to three steps, as the tiny recipe's is on a CPU. Writes bench/results/gpu_learning.md
and .png. After each stage it looks whether the GPU is empty again.
"""

import datetime
import json
import platform
import random
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import click

from stages import base_model
from stages.lib.answers import formats
from stages.lib.answers.stats import p_text, wilson
from stages.lib.recipe.read import read_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
STAGES = {
    "prepare-data": [],
    "sft": ["prepare-data"],
    "grpo": ["prepare-data", "sft"],
    "infer": ["prepare-data", "sft", "grpo"],
    "merge": ["prepare-data", "grpo"],
    "gguf": ["prepare-data", "merge", "grpo"],
}
SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.02,
}  # fmt: skip
STEPS, BATCH, LEARNING_RATE = 1200, 128, 1e-3


def make_base(folder: Path, problems: Path) -> dict[str, float]:
    """Write a trained base model to `folder`, to `problems` those kept out of its corpus; return what it came to."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

    from tests.support import family_models

    knobs = read_recipe(ROOT / "recipes" / "tiny.toml").base_model
    knobs = replace(knobs, corpus_problems=60_000, eval_problems=2000)
    base_model.write_problems(knobs, problems)
    corpus = base_model.conversations(knobs)
    # With Qwen2.5's chat template: Qwen3's own puts an empty thought before every completion that it is shown.
    family = replace(family_models.FAMILIES["qwen3"], template=family_models.FAMILIES["qwen2.5"].template)
    family_models.base(family, folder, **SIZES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    documents = []
    for question, reply in corpus + repeats(len(corpus) // 4):
        turns = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        answer = tokenizer(reply + "<|im_end|>", add_special_tokens=False)["input_ids"]
        documents.append((prompt + answer, [-100] * len(prompt) + answer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = get_scheduler("cosine", optimizer, 50, STEPS)
    chance = torch.Generator().manual_seed(0)
    started, losses = time.monotonic(), []
    for step in range(STEPS):
        chosen = [documents[place] for place in torch.randint(len(documents), (BATCH,), generator=chance).tolist()]
        width = max(len(ids) for ids, _ in chosen)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen]).cuda()
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in chosen]).cuda()
        mask = (torch.arange(width) < torch.tensor([len(ids) for ids, _ in chosen])[:, None]).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            learnt = labels[:, 1:] != -100
            loss = torch.nn.functional.cross_entropy(
                model.lm_head(hidden[:, :-1][learnt]).float(), labels[:, 1:][learnt]
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 100 == 99:
            print(f"base: step {step + 1}, loss {torch.stack(losses[-50:]).mean().item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "seconds": time.monotonic() - started,
        "loss": torch.stack(losses[-50:]).mean().item(),
    }


def repeats(count: int) -> list[tuple[str, str]]:
    """Return requests to repeat words and tags in any order, so that the base has seen each token of the format.

    An adapter leaves the embeddings as they are, and no real base model has tokens that it never saw.
    """
    chance = random.Random(3)
    words = formats.get("xml").system_prompt.split() + ["<reasoning>", "</reasoning>", "<answer>", "</answer>"] * 4
    words += ["That", "is", "easy.", *"0123456789+-*="]
    made = []
    for _ in range(count):
        text = "".join(chance.choice(words) + chance.choice([" ", "\n", "\n", ""]) for _ in range(12)).strip()
        made.append((f"Repeat: {text}", text))
    return made


def write_recipe(work: Path) -> Path:
    """Write the run's recipe: the tiny recipe's problems, with the knobs of the GPU recipes."""
    text = (ROOT / "bench" / "gpu_learning.toml").read_text()
    path = work / "recipe.toml"
    path.write_text(text.replace("{base}", str(work / "base")).replace("{problems}", str(work / "problems")))
    return path


def gpu_use() -> tuple[int, int]:
    """Return the MiB of GPU memory in use, and the number of processes that use it."""
    query = ["nvidia-smi", "--format=csv,noheader,nounits"]
    used = subprocess.run([*query, "--query-gpu=memory.used"], capture_output=True, text=True, check=True).stdout
    running = subprocess.run([*query, "--query-compute-apps=pid"], capture_output=True, text=True, check=True).stdout
    return int(used.split()[0]), len(running.split())


def run(stage: str, work: Path, recipe: Path) -> dict[str, float]:
    """Run a stage as `make` does; return its seconds, and what it left on the GPU."""
    given = [part for name in STAGES[stage] for part in (f"--{name}", str(work / name))]
    command = [sys.executable, "-m", f"stages.{stage.replace('-', '_')}", "--recipe", str(recipe), *given]
    started = time.monotonic()
    subprocess.run([*command, "--out", str(work / stage)], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    time.sleep(1)
    used, processes = gpu_use()
    return {"seconds": seconds, "gpu_mib_left": used, "gpu_processes_left": processes}


def curve(work: Path) -> list[tuple[int, float, float]]:
    """Return (step, mean reward, share right) of every GRPO step, from the completions that the stage kept."""
    by_step: dict[int, list[dict]] = {}
    for line in (work / "grpo" / "completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_step.setdefault(row["step"], []).append(row)
    rewards = read_recipe(work / "recipe.toml").rewards.functions
    return [
        (
            step,
            sum(row[name] for row in rows for name in rewards) / len(rows),
            sum(row["correctness"] > 0 for row in rows) / len(rows),
        )
        for step, rows in sorted(by_step.items())
    ]


def draw(points: list[tuple[int, float, float]], examined: dict, path: Path) -> None:
    """Draw reward and accuracy by step, and the examination's accuracies with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    steps = [step for step, _, _ in points]
    left.plot(steps, [reward for _, reward, _ in points], color="tab:blue")
    left.set(xlabel="GRPO step", ylabel="mean reward")
    twin = left.twinx()
    twin.plot(steps, [share for _, _, share in points], color="tab:orange")
    twin.set(ylabel="share right (sampled)", ylim=(0, 1))
    names = ["base", "sft", "grpo"]
    values = [examined[name]["accuracy"] for name in names]
    spread = [[abs(value - edge) for value, edge in zip(values, edges, strict=True)]
              for edges in zip(*(examined[name]["accuracy_interval"] for name in names), strict=True)]  # fmt: skip
    right.bar(names, values, yerr=spread, capsize=6)
    right.set(ylabel=f"accuracy on {examined['base']['problems']:,} held-out problems (greedy)", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command(help=__doc__.partition("\n")[0])
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where models and artifacts go."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
def main(work: Path, out: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(work)
    if not (work / "base.json").is_file():
        code = "import json, sys; from pathlib import Path; from bench import gpu_learning as bench; "
        code += "w = Path(sys.argv[1]); "
        code += "(w / 'base.json').write_text(json.dumps(bench.make_base(w / 'base', w / 'problems')))"
        subprocess.run([sys.executable, "-c", code, str(work)], cwd=ROOT, check=True)
    made = json.loads((work / "base.json").read_text())
    kept = work / "seconds.json"
    figures = json.loads(kept.read_text()) if kept.is_file() else {}
    for stage in STAGES:
        measured = run(stage, work, recipe)
        figures.setdefault(stage, measured)
        kept.write_text(json.dumps(figures))
    metrics = {name: json.loads((work / name / "manifest.json").read_text())["metrics"] for name in STAGES}
    points = curve(work)
    draw(points, metrics["infer"], out / "gpu_learning.png")
    gpu = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    packages = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "vllm", "bitsandbytes")
    lines = [
        "# Learning on a GPU with Unsloth and vLLM, from nothing to proven GGUF files",
        "",
        f"`python -m bench.gpu_learning --work FOLDER`, {datetime.date.today()}, {gpu}, "
        f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages) + ".",
        "",
        f"Base: Qwen3 architecture, {made['parameters'] / 1e6:.1f} M parameters, real Qwen2 vocabulary, trained "
        f"{made['seconds']:.0f} s on 60,000 generated word problems (loss {made['loss']:.3f}). Then the recipe "
        f"`bench/gpu_learning.toml`.",
        "",
        "![Reward and accuracy by step; accuracy of the three models](gpu_learning.png)",
        "",
        "Left: in blue the mean reward, in orange the share of the sampled completions that are right. Right: with 95% "
        "intervals.",
        "",
        "| model | right of held-out | 95% interval | well formed | cut off |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in ("base", "sft", "grpo"):
        own = metrics["infer"][name]
        low, high = wilson(round(own["accuracy"] * own["problems"]), own["problems"])
        lines.append(
            f"| {name} | {own['accuracy']:.1%} of {own['problems']:,} | {low:.1%} to {high:.1%} | "
            f"{own['well_formed']:.1%} | {own['cut_off']:.1%} |"
        )
    for step, own in metrics["infer"]["steps"].items():
        lines.append(f"\n{step}: {own['gained']} problems gained, {own['lost']} lost, McNemar {p_text(own['p'])}")
    lines += ["", "| stage | seconds | GPU MiB left after it | GPU processes left |", "|---|---:|---:|---:|"]
    for stage, own in figures.items():
        lines.append(f"| {stage} | {own['seconds']:.0f} | {own['gpu_mib_left']} | {own['gpu_processes_left']} |")
    merged = metrics["merge"]
    lines += ["", f"merge: mean KL {merged['merged_mean_kl']:.1e} nats from the adapter on its base.", ""]
    lines += ["| file | mean KL | same top token |", "|---|---:|---:|"]
    for kind, own in metrics["gguf"]["files"].items():
        lines.append(f"| {kind} | {own['mean_kl']:.1e} | {own['same_top']:.1%} |")
    first, last = ({**own.pop("rewards"), **own} for own in (metrics["grpo"]["first"], metrics["grpo"]["last"]))
    lines += ["", "GRPO, first and last tenth of the steps: " + "; ".join(
        f"{name} {first[name]:.3g} to {last[name]:.3g}" for name in first
    ) + "."]  # fmt: skip
    lines += ["", "| GRPO step | mean reward | share right (sampled) |", "|---:|---:|---:|"]
    lines += [f"| {step} | {reward:.2f} | {share:.1%} |" for step, reward, share in points[::10]]
    (out / "gpu_learning.md").write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
