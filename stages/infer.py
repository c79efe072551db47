"""Evaluate base, SFT and GRPO model on held-out problems: accuracy with intervals, and whether each step helped."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.answers import formats, stats
from stages.lib.answers.grade import mark, shown_answer
from stages.lib.answers.sampled import Sampled, Vote, figures_of_samples
from stages.lib.artifact.folder import Run, write_artifact
from stages.lib.bars import open_bar
from stages.lib.jsonl import rows_of, write_rows
from stages.lib.machine.room import room_to_answer
from stages.lib.model.generate import Sampling, generate_completions, open_generator
from stages.lib.model.locate import local_model
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report import terminal
from stages.lib.report.figures import Evaluation, InferFigures, Step
from stages.lib.train import ranks, trackers
from stages.lib.train.sampling import Completion, sample_on_gpus

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
    inputs = {"prepare-data": (prepare_data, ["eval.jsonl"])}
    inputs |= {"sft": (sft, ["adapter/*"]), "grpo": (grpo, ["adapter/*"])}
    inputs |= {"base-model": (base_model, ["model/*"])} if base_model else {}
    tables = run_recipe.tables("model", "vllm", "format", "infer")
    tables |= {"data": {"max_prompt_tokens": run_recipe.data.max_prompt_tokens}}
    sources = local_model(run_recipe)
    answers = len(MODELS) * (1 + run_recipe.infer.samples)  # to each problem
    room = room_to_answer(answers * run_recipe.infer.problems, run_recipe.infer.max_completion_tokens)
    with write_artifact(out, "infer", tables, inputs, sources=sources, room_bytes=room) as run:
        problems = rows_of(prepare_data / "eval.jsonl", run_recipe.infer.problems)
        rows = answer(run_recipe, problems, {"sft": sft / "adapter", "grpo": grpo / "adapter"}, run)
        drawn = [row for row in rows if "sample" in row]
        rows = [row for row in rows if "sample" not in row]
        write_rows(run.folder / "answers.jsonl", rows)
        figures = evaluate(rows)
        if drawn:
            write_rows(run.folder / "samples.jsonl", drawn)
            figures["sampled"] = evaluate_samples(drawn)
        run.metrics.update(figures)
        click.echo(terminal.infer(figures))
        trackers.add_result(run_recipe, out.parent, tracked(figures))


def tracked(figures: InferFigures) -> dict[str, float]:
    """Return the figures that trackers show."""
    values: dict[str, float] = {}
    for name, own in (("base", figures["base"]), ("sft", figures["sft"]), ("grpo", figures["grpo"])):
        low, high = own["accuracy_interval"]
        found = {"accuracy": own["accuracy"], "low": low, "high": high, "truncated": own["cut_off"]}
        values |= {f"evaluation/{name}/{key}": value for key, value in found.items()}
    for name, sampled in figures.get("sampled", {}).items():
        for k, share in sampled["pass_at"].items():
            values[f"evaluation/{name}/pass_at_{k}"] = share["share"]
            values[f"evaluation/{name}/majority_at_{k}"] = sampled["majority_at"][k]["share"]
    return values | {f"evaluation/{step}/p": own["p"] for step, own in figures["steps"].items()}


def answer(recipe: Recipe, problems: list[dict[str, Any]], adapters: dict[str, Path], run: Run) -> list[dict[str, Any]]:
    """Return every model's greedy answer to every problem, a row each, in the order of the problems, then drawn ones.

    A row holds `id`, `question`, `answer` (the right one), `model`, `completion`, `tokens` (with the end token),
    `ended` (false: truncated), `well_formed`, `given` (the canonical answer read, or None) and `right`. A drawn answer
    has its number as `sample`, from 0, besides; they are in the order of that.
    """

    def sample(places: list[int]) -> list[list[Completion]]:
        return complete(recipe, [problems[place] for place in places], adapters)

    completions = sample_on_gpus(run, len(problems), recipe.infer.batch_size, sample)
    answer_format, tokenizer = formats.get(recipe.format.name), load_tokenizer(recipe)
    rows = []
    # Of each model the greedy answers, then those of each drawing.
    drawings = [(name, sample) for name in MODELS for sample in (None, *range(recipe.infer.samples))]
    for (name, sample), own in zip(drawings, completions, strict=True):
        for problem, (ids, has_end) in zip(problems, own, strict=True):
            completion = tokenizer.decode(ids[:-1] if has_end else ids, skip_special_tokens=True)
            rows.append(
                {
                    "id": problem["id"],
                    "question": problem["prompt"][-1]["content"],
                    "answer": shown_answer(problem.get("kind", "number"), problem["answer"]),
                    "model": name,
                    "completion": completion,
                    "tokens": len(ids),
                    "ended": has_end,
                    **mark(answer_format, completion, problem["answer"], problem.get("kind", "number")),
                    **({} if sample is None else {"sample": sample}),
                }
            )
    return rows


def complete(recipe: Recipe, problems: list[dict[str, Any]], adapters: dict[str, Path]) -> list[list[Completion]]:
    """Return each model's greedy completions of `problems`, in their order, each followed by `samples` drawn ones.

    What is drawn goes by `sample_seed`; of several processes, each has a seed of its own.
    """
    knobs = recipe.infer
    greedy = Sampling(knobs.max_completion_tokens)
    completions = []
    with (
        open_generator(recipe, adapters, knobs.max_completion_tokens, seed=0) as generator,
        open_bar(len(MODELS) * len(problems) * (1 + knobs.samples), "answer", "infer") as bar,
    ):
        conversations = [problem["prompt"] for problem in problems]
        prompts = generator.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
        for name in MODELS:
            adapter = name if name in adapters else None

            def completed(
                asked: list[list[int]], sampling: Sampling, adapter: str | None = adapter
            ) -> list[Completion]:
                found = generate_completions(
                    generator, asked, sampling, knobs.batch_size, adapter=adapter, advance=bar.update
                )
                return [(ids, ids[-1] in generator.ends) for ids in found]

            completions.append(completed(prompts, greedy))
            if knobs.samples:
                drawn = completed([prompt for prompt in prompts for _ in range(knobs.samples)], drawing(recipe))
                completions += [drawn[sample :: knobs.samples] for sample in range(knobs.samples)]
    return completions


def drawing(recipe: Recipe) -> Sampling:
    """Return how answers are drawn."""
    knobs = recipe.infer
    drawn: dict[str, Any] = {"temperature": knobs.sample_temperature, "top_p": knobs.sample_top_p}
    return Sampling(knobs.max_completion_tokens, **drawn, seed=(knobs.sample_seed or 0) + 1_000_003 * ranks.rank())


def evaluate(rows: list[dict[str, Any]]) -> InferFigures:
    """Return the figures of each model, and of each step from a model to the next."""
    models = {name: [row for row in rows if row["model"] == name] for name in MODELS}
    steps: dict[str, Step] = {}
    for before, after in pairwise(MODELS):
        pairs = [(old["right"], new["right"]) for old, new in zip(models[before], models[after], strict=True)]
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        steps[f"{before} to {after}"] = {"gained": gained, "lost": lost, "p": stats.mcnemar(gained, lost)}
    base, sft, grpo = (evaluate_model(own) for own in models.values())
    return {"base": base, "sft": sft, "grpo": grpo, "steps": steps}


def evaluate_samples(rows: list[dict[str, Any]]) -> dict[str, Sampled]:
    """Return the figures of each model's drawn answers, `rows`: those of a problem have its `id`."""
    figures = {}
    for name in MODELS:
        by_problem: dict[str, list[Vote]] = {}
        for row in rows:
            if row["model"] == name:
                by_problem.setdefault(row["id"], []).append(Vote(row["given"], row["right"]))
        figures[name] = figures_of_samples(list(by_problem.values()))
    return figures


def evaluate_model(rows: list[dict[str, Any]]) -> Evaluation:
    """Return the figures of one model, whose answers are `rows`."""
    right, total = sum(row["right"] for row in rows), len(rows)
    return {
        "problems": total,
        "accuracy": right / total,
        "accuracy_interval": list(stats.wilson(right, total)),
        "well_formed": sum(row["well_formed"] for row in rows) / total,
        "tokens": sum(row["tokens"] for row in rows) / total,
        "cut_off": sum(not row["ended"] for row in rows) / total,
    }


if __name__ == "__main__":
    main()
