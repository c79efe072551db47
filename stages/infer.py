"""Examine base, SFT and GRPO model on held-out problems: accuracy with intervals, and whether each step helped."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.answers import formats, stats
from stages.lib.answers.grade import mark
from stages.lib.artifact.folder import write_artifact
from stages.lib.model.generate import Sampling, generate_completions, open_generator
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe

ROOM_BYTES = 100_000_000
MODELS = ("base", "sft", "grpo")


@click.command(help=__doc__)
@options.recipe
@options.reads("prepare-data")
@options.reads("sft")
@options.reads("grpo")
@options.base_model
@options.out
def main(recipe: Path, prepare_data: Path, sft: Path, grpo: Path, base_model: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe, base_model)
    inputs = {"prepare-data": prepare_data, "sft": sft, "grpo": grpo}
    inputs |= {"base-model": base_model} if base_model else {}
    tables = run_recipe.tables("model", "vllm", "format", "infer")
    with write_artifact(out, "infer", tables, inputs, room_bytes=ROOM_BYTES) as run:
        with (prepare_data / "eval.jsonl").open() as file:
            problems = [json.loads(line) for _, line in zip(range(run_recipe.infer.problems), file, strict=False)]
        adapters = {"sft": sft / "adapter", "grpo": grpo / "adapter"}
        rows = answer(run_recipe, problems, adapters)
        with (run.folder / "answers.jsonl").open("w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        run.metrics.update(examine(rows))
        click.echo(table(run.metrics))


def answer(recipe: Recipe, problems: list[dict[str, Any]], adapters: dict[str, Path]) -> list[dict[str, Any]]:
    """Return every model's greedy answer to every problem, a row each, in the order of the problems.

    A row holds `id`, `question`, `answer` (the right one), `model`, `completion`, `tokens` (the end token counted),
    `ended` (false: cut off), `well_formed`, `given` (the canonical answer read, or None) and `right`.
    """
    from tqdm import tqdm

    knobs = recipe.infer
    answer_format = formats.get(recipe.format.name)
    sampling = Sampling(knobs.max_completion_tokens)
    rows = []
    with (
        open_generator(recipe, adapters, knobs.max_completion_tokens, seed=0) as generator,
        tqdm(total=len(MODELS) * len(problems), desc="infer", unit="answer", dynamic_ncols=True) as bar,
    ):
        tokenizer = generator.tokenizer
        prompts = [
            tokenizer.apply_chat_template(problem["prompt"], add_generation_prompt=True, tokenize=False)
            for problem in problems
        ]
        for name in MODELS:
            adapter = name if name in adapters else None
            made = generate_completions(
                generator, prompts, sampling, knobs.batch_size, adapter=adapter, advance=bar.update
            )
            for problem, ids in zip(problems, made, strict=True):
                ended = ids[-1] in generator.ends
                completion = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
                rows.append(
                    {
                        "id": problem["id"],
                        "question": problem["prompt"][-1]["content"],
                        "answer": problem["answer"],
                        "model": name,
                        "completion": completion,
                        "tokens": len(ids),
                        "ended": ended,
                        **mark(answer_format, completion, problem["answer"], problem.get("kind", "number")),
                    }
                )
    return rows


def examine(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the examination, a dict a model, and `steps`: for each model and the one before it McNemar.

    `accuracy`, `well_formed` and `cut_off` are shares of 1, `accuracy_interval` is Wilson's 95% interval, `tokens` the
    mean of the completion. In a step, `gained` problems only the later model solves, `lost` only the earlier one; `p`
    is the two-sided exact probability of a split at least as uneven if neither were better.
    """
    figures: dict[str, Any] = {}
    right: dict[str, list[bool]] = {}
    for name in MODELS:
        own = [row for row in rows if row["model"] == name]
        right[name] = [row["right"] for row in own]
        total = len(own)
        figures[name] = {
            "problems": total,
            "accuracy": sum(right[name]) / total,
            "accuracy_interval": list(stats.wilson(sum(right[name]), total)),
            "well_formed": sum(row["well_formed"] for row in own) / total,
            "tokens": sum(row["tokens"] for row in own) / total,
            "cut_off": sum(not row["ended"] for row in own) / total,
        }
    figures["steps"] = {}
    for before, after in pairwise(MODELS):
        pairs = list(zip(right[before], right[after], strict=True))
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        figures["steps"][f"{before} to {after}"] = {"gained": gained, "lost": lost, "p": stats.mcnemar(gained, lost)}
    return figures


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a table for the terminal."""
    lines = [f"{'':6} {'accuracy':>9} {'95% interval':>17} {'well formed':>12} {'tokens':>7} {'cut off':>8}"]
    for name in MODELS:
        own = figures[name]
        low, high = own["accuracy_interval"]
        lines.append(
            f"{name:6} {own['accuracy']:9.1%} {f'{low:.1%} to {high:.1%}':>17} {own['well_formed']:12.1%} "
            f"{own['tokens']:7.1f} {own['cut_off']:8.1%}"
        )
    for step, own in figures["steps"].items():
        lines.append(f"{step}: {own['gained']} problems gained, {own['lost']} lost, McNemar {stats.p_text(own['p'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
