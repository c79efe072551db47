"""Learning on real weights: a recipe's SFT and GRPO with several seeds, then the held-out problems.

    python -m bench.learning --work FOLDER --recipe recipes/smollm2-135m-gsm8k.toml --model MODEL --data DATA \\
        --set "sft.seed=0,1,2" --gpus 0,1,2 --out bench/results/learning.jsonl

`--set` is that of `make sweep`: one run for each combination of its values; a changed `sft.seed` is GRPO's too. Runs
are started at once, on the GPUs in turn, so their seconds are no measure of speed. A run appends one line to `--out`:
its accuracies with the paired tests, and by step the mean reward, the share of right completions and the share of
groups with an advantage. Whoever ends the program early calls it again: finished stages are kept.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click

from stages import sweep
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.write import as_toml

ROOT = Path(__file__).parents[1]
READS = {
    "prepare-data": [],
    "sft": ["prepare-data"],
    "grpo": ["prepare-data", "sft"],
    "infer": ["prepare-data", "sft", "grpo"],
}


def local_recipe(recipe: Path, model: Path | None, alike: str, work: Path) -> Path:
    """Write `recipe` with the model of the folder `model` and the values of `alike` to `work`; return its path."""
    tables = tomllib.loads(recipe.read_text())
    for key, values in sweep.read_set(alike).items() if alike else ():
        table, _, name = key.partition(".")
        tables[table][name] = values[0]
    if model:
        tables["model"] = {**tables["model"], "name": str(model)}
        tables["model"].pop("revision", None)
    path = work / recipe.name
    path.write_text(as_toml(tables))
    return path


def variants(recipe: Path, wanted: str) -> list[Path]:
    """Write a recipe for each combination of the values in `wanted`; return their paths."""
    tables, keys, paths = tomllib.loads(recipe.read_text()), sweep.read_set(wanted), []
    for values in itertools.product(*keys.values()):
        changes = dict(zip(keys, values, strict=True))
        path = recipe.with_name(f"{sweep.variant_name(recipe.stem, changes)}.toml")
        if "sft.seed" in changes:
            changes.setdefault("grpo.seed", changes["sft.seed"])
        sweep.write_variant(path, recipe.stem, tables, changes)
        read_recipe(path)
        paths.append(path)
    return paths


def run_stage(stage: str, recipe: Path, folders: dict[str, Path], more: list[str], gpu: str, threads: int) -> float:
    """Run `stage` as `make` does, with its output in a file beside its artifact; return its seconds."""
    given = [part for name in READS[stage] for part in (f"--{name}", str(folders[name]))]
    command = [sys.executable, "-m", f"stages.{stage.replace('-', '_')}", "--recipe", str(recipe), *given, *more]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    log = folders[stage].with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a") as file:
        done = subprocess.run(
            [*command, "--out", str(folders[stage])], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    if done.returncode:
        raise RuntimeError(f"{recipe.stem}: {stage} failed: {log.read_text()[-2000:]}")
    return round(time.monotonic() - started, 1)


def shared(recipe: Path, work: Path) -> dict[str, Path]:
    """Return where the stages of `recipe` write: runs whose SFT is the same share it."""
    tables = {key: value for key, value in tomllib.loads(recipe.read_text()).items() if key not in ("grpo", "rewards")}
    same = hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:8]
    own = recipe.with_suffix("")
    return {
        "prepare-data": work / same / "data",
        "sft": work / same / "sft",
        "grpo": own / "grpo",
        "infer": own / "infer",
    }


def prepare(recipe: Path, folders: dict[str, Path], data: Path | None, gpu: str, threads: int) -> dict[str, float]:
    """Prepare the data and train by SFT; return the seconds by stage."""
    more = ["--data", str(data)] if data else []
    return {
        "prepare-data": run_stage("prepare-data", recipe, folders, more, gpu, threads),
        "sft": run_stage("sft", recipe, folders, [], gpu, threads),
    }


def learn(recipe: Path, folders: dict[str, Path], gpu: str, threads: int) -> dict[str, Any]:
    """Train by GRPO and evaluate; return the run's line."""
    seconds = {stage: run_stage(stage, recipe, folders, [], gpu, threads) for stage in ("grpo", "infer")}
    metrics = {name: json.loads((folders[name] / "manifest.json").read_text())["metrics"] for name in ("sft", "infer")}
    return {
        "run": recipe.stem,
        "seconds": seconds,
        "sft loss": metrics["sft"]["loss"],
        "infer": metrics["infer"],
        "curve": curve(folders["grpo"] / "completions.jsonl", read_recipe(recipe).rewards.functions),
    }


def curve(path: Path, rewards: list[str]) -> list[list[float]]:
    """Return [step, mean reward, share right, share of groups with an advantage, mean characters] by step."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            kept = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
            by_step.setdefault(row["step"], []).append({**kept, "group": row["prompt"], "long": len(row["completion"])})
    right = next(name for name in rewards if name in ("correctness", "math_correct", "reasoning_gym"))
    points = []
    for step, rows in sorted(by_step.items()):
        groups: dict[str, bool] = {}
        for row in rows:
            groups[str(row["group"])] = groups.get(str(row["group"]), False) or row["advantage"] != 0
        scored = [[row[name] or 0.0 for name in rewards] for row in rows]
        points.append([
            step,
            round(sum(map(sum, scored)) / len(rows), 4),
            round(sum(row[right] > 0 for row in rows) / len(rows), 4),
            round(sum(groups.values()) / len(groups), 4),
            round(sum(row["long"] for row in rows) / len(rows), 1),
        ])  # fmt: skip
    return points


def said(line: dict[str, Any]) -> str:
    """Return a line of a table: accuracies, and the step from SFT to GRPO."""
    figures = line["infer"]
    shares = ", ".join(f"{name} {figures[name]['accuracy']:.1%}" for name in ("base", "sft", "grpo"))
    step = figures["steps"]["sft to grpo"]
    return f"{line['run']}: {shares}; {step['gained']} gained, {step['lost']} lost, p = {step['p']:.1e}"


@click.command(help=__doc__.partition("\n")[0])
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where artifacts go.")
@click.option("--recipe", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="The folder of the recipe's model.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="As of prepare-data.")
@click.option("--set", "wanted", default="sft.seed=0,1,2", show_default=True, help="As of make sweep.")
@click.option("--alike", default="", help="Values of all runs, in the same form.")
@click.option("--gpus", default="0", show_default=True, help="Their numbers; 0,0 runs two at once on the first.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="bench/results/learning.jsonl")
def main(
    work: Path, recipe: Path, model: Path | None, data: Path | None, wanted: str, alike: str, gpus: str, out: Path
) -> None:
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    recipes = variants(local_recipe(recipe, model and model.absolute(), alike, work), wanted)
    places = gpus.split(",")
    threads = max(1, (os.cpu_count() or 1) // len(places))
    pool = ThreadPoolExecutor(len(places))
    folders = {path: shared(path, work) for path in recipes}
    first = {own["sft"]: path for path, own in folders.items()}  # a recipe for each SFT
    turns = itertools.cycle(places)
    prepared = [pool.submit(prepare, path, folders[path], data, next(turns), threads) for path in first.values()]
    for job in prepared:
        click.echo(f"sft: {job.result()}")
    turns = itertools.cycle(places)
    jobs = {path: pool.submit(learn, path, folders[path], next(turns), threads) for path in recipes}
    for job in as_completed(jobs.values()):
        try:
            line = job.result()
        except RuntimeError as error:
            click.echo(str(error))
            continue
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        click.echo(said(line))


if __name__ == "__main__":
    main()
