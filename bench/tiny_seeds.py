"""Does GRPO help the tiny model, whatever the seed? Everything from the base model to the examination, for three seeds.

    python -m bench.tiny_seeds [--seeds 0,1,2]

Every seed of the recipe (base model, problems, SFT, GRPO) is set to each in turn. Writes bench/results/tiny_seeds.md.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click

from stages.base_model import conversations
from stages.lib.recipe.read import read_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "tiny_seeds.md"
STAGES = {
    "base-model": [],
    "prepare-data": ["base-model"],
    "sft": ["base-model", "prepare-data"],
    "grpo": ["base-model", "prepare-data", "sft"],
    "infer": ["base-model", "prepare-data", "sft", "grpo"],
}


def run(seed: int) -> Path:
    """Run the stages with `seed` for every seed of the recipe; return the folder of the artifacts."""
    folder = ROOT / "artifacts" / f"bench-tiny-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.toml"
    text = re.sub(r"(?m)^seed = .*$", f"seed = {seed}", (ROOT / "recipes" / "tiny.toml").read_text())
    if not recipe.is_file() or recipe.read_text() != text:
        recipe.write_text(text)
    for stage, inputs in STAGES.items():
        given = [part for name in inputs for part in (f"--{name}", str(folder / name))]
        command = [sys.executable, "-m", f"stages.{stage.replace('-', '_')}", "--recipe", str(recipe), *given]
        subprocess.run([*command, "--out", str(folder / stage)], cwd=ROOT, check=True)
    return folder


def manifest(folder: Path, stage: str) -> dict:
    """Return a stage's manifest."""
    return json.loads((folder / stage / "manifest.json").read_text())


@click.command(help=__doc__.partition("\n")[0])
@click.option("--seeds", default="0,1,2", show_default=True, help="Which, separated by commas.")
def main(seeds: str) -> None:
    folders = {int(seed): run(int(seed)) for seed in seeds.split(",")}
    lines = [
        "# The tiny recipe with three seeds",
        "",
        f"{datetime.date.today()}, {len(os.sched_getaffinity(0))} processors ({platform.machine()}), "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
        + f". Command: `python -m bench.tiny_seeds --seeds {seeds}`. Every seed of the recipe is the one named.",
        "",
        "| seed | problems | base | SFT (95% interval) | GRPO (95% interval) | gain, points | lost / gained problems "
        "| McNemar p | well formed after GRPO |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for seed, folder in folders.items():
        figures = manifest(folder, "infer")["metrics"]
        base, sft, grpo, step = figures["base"], figures["sft"], figures["grpo"], figures["steps"]["sft to grpo"]

        def share(own: dict) -> str:
            low, high = own["accuracy_interval"]
            return f"{own['accuracy']:.1%} ({low:.1%} to {high:.1%})"

        lines.append(
            f"| {seed} | {grpo['problems']:,} | {base['accuracy']:.1%} | {share(sft)} | {share(grpo)} "
            f"| {100 * (grpo['accuracy'] - sft['accuracy']):.1f} | {step['lost']} / {step['gained']} "
            f"| {step['p']:.1g} | {grpo['well_formed']:.1%} |"
        )
    lines += [
        "",
        "What was learnt, as share of the answers that show their working (a line with `=` in the reasoning):",
        "",
        "| seed | SFT | GRPO | accuracy of GRPO where shown | where not |",
        "|---|--:|--:|--:|--:|",
    ]
    for seed, folder in folders.items():
        rows = [json.loads(line) for line in (folder / "infer" / "answers.jsonl").read_text().splitlines()]
        shown = {
            name: [row for row in rows if row["model"] == name and "=" in row["completion"]] for name in ("sft", "grpo")
        }
        total = sum(row["model"] == "grpo" for row in rows)
        rest = [row for row in rows if row["model"] == "grpo" and "=" not in row["completion"]]
        right = [
            f"{sum(row['right'] for row in own) / len(own):.1%}" if own else "none" for own in (shown["grpo"], rest)
        ]
        lines.append(
            f"| {seed} | {len(shown['sft']) / total:.1%} | {len(shown['grpo']) / total:.1%} | {right[0]} | {right[1]} |"
        )
    lines += [
        "",
        "Fresh problems: questions of the examination that stand, by exact text, in any training set or corpus:",
        "",
    ]
    for seed, folder in folders.items():
        knobs = read_recipe(folder / "recipe.toml").base_model
        corpus = {question for question, _ in conversations(knobs)}
        for name in ("sft", "grpo"):
            with (folder / "prepare-data" / f"{name}.jsonl").open() as file:
                corpus |= {json.loads(line)["prompt"][-1]["content"] for line in file}
        with (folder / "infer" / "answers.jsonl").open() as file:
            asked = {json.loads(line)["question"] for line in file}
        lines.append(
            f"- seed {seed}: {len(asked & corpus)} of {len(asked):,} (corpus and training sets: {len(corpus):,})"
        )
    lines += ["", "| seed | " + " | ".join(STAGES) + " |", "|---|" + "--:|" * len(STAGES)]
    for seed, folder in folders.items():
        times = [f"{manifest(folder, stage)['wall']['seconds']:.0f} s" for stage in STAGES]
        lines.append(f"| {seed} | " + " | ".join(times) + " |")
    RESULTS.write_text("\n".join(lines) + "\n")
    click.echo(RESULTS.read_text())


if __name__ == "__main__":
    main()
