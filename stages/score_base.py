"""Sample from the base or SFT model before GPU hours are spent: do the rewards tell its completions apart?"""

import dataclasses
import random
import statistics
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.answers import formats
from stages.lib.answers.grade import mark, shown_answer
from stages.lib.artifact.folder import Run, write_artifact
from stages.lib.artifact.manifest import read_manifest
from stages.lib.bars import open_bar
from stages.lib.errors import UserError
from stages.lib.jsonl import rows_of, write_rows
from stages.lib.machine.room import room_to_answer
from stages.lib.model.generate import Sampling, generate_completions, open_generator
from stages.lib.model.locate import local_model
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe, ScoreBase
from stages.lib.report import terminal
from stages.lib.report.figures import ScoreBaseFigures, Scores, Spread, figures_of
from stages.lib.rewards.checked import ROW
from stages.lib.rewards.local import own_reward_files
from stages.lib.rewards.names import load_rewards
from stages.lib.rewards.trial import of_trainer, try_rewards
from stages.lib.train import ranks
from stages.lib.train.sampling import Completion, sample_on_gpus

# The keys of [grpo] that this stage reads: with other values of these alone it samples again.
SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling) if field.name != "seed")
GRPO_KNOBS = (*SAMPLING, "prompts_per_step")  # and how many problems a subset must have
NO_VARIANCE = 1e-6  # rewards no further apart are equal: a weighted sum is rounded


@click.command(help=__doc__)
@options.recipe
@options.reads("prepare-data")
@options.reads("sft", required=False)
@options.base_model
@options.out
def main(recipe: Path, prepare_data: Path, sft: Path | None, base_model: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe, base_model)
    knobs = run_recipe.score_base
    if knobs is None:
        raise UserError(f"{recipe}: has no [score_base] table; score-base needs one, like that of recipes/tiny.toml")
    inputs = {"prepare-data": (prepare_data, ["grpo.jsonl"])}
    inputs |= {"sft": (sft, ["adapter/*"])} if sft else {}
    inputs |= {"base-model": (base_model, ["model/*"])} if base_model else {}
    tables = run_recipe.tables("model", "vllm", "format", "rewards", "score_base")
    tables["grpo"] = {name: getattr(run_recipe.grpo, name) for name in GRPO_KNOBS}
    tables["data"] = {"max_prompt_tokens": run_recipe.data.max_prompt_tokens}
    sources = own_reward_files(run_recipe.rewards.functions, run_recipe.path.parent) | local_model(run_recipe)
    room = room_to_answer(knobs.problems * (knobs.completions_per_problem + 1), run_recipe.grpo.max_completion_tokens)
    try:
        with write_artifact(out, "score-base", tables, inputs, sources=sources, room_bytes=room) as run:
            try_rewards(run_recipe, prepare_data / "grpo.jsonl")
            problems = draw(rows_of(prepare_data / "grpo.jsonl"), knobs)
            rows = sample(run_recipe, problems, sft / "adapter" if sft else None, run)
            write_rows(run.folder / "scores.jsonl", rows)
            scores = score(rows, run_recipe.rewards.weights, knobs.completions_per_problem)
            figures = ScoreBaseFigures(**scores, model="sft" if sft else "base", advice=[])
            subset = choose(problems, rows, knobs)
            if subset is not None:
                write_rows(run.folder / "grpo.jsonl", subset)
                figures["subset"] = len(subset)
            figures["advice"] = advise(figures, run_recipe.grpo.prompts_per_step)
            run.metrics.update(figures)
    except SystemExit as end:
        if end.code:
            raise  # it exits with 0 when up to date: its advice still holds
    figures = figures_of(read_manifest(out, "score-base"), ScoreBaseFigures)
    click.echo(terminal.score_base(figures))
    if figures["advice"]:
        reasons = "\n".join(f"- {line}" for line in figures["advice"])
        raise UserError(f"GRPO would learn too little; {out}/scores.jsonl has every completion:\n{reasons}")


def draw(problems: list[dict[str, Any]], knobs: ScoreBase) -> list[dict[str, Any]]:
    """Return the problems to score, drawn by the seed, in the order they had; all, where there are no more."""
    count = min(knobs.problems, len(problems))
    return [problems[place] for place in sorted(random.Random(knobs.seed).sample(range(len(problems)), count))]


def sample(recipe: Recipe, problems: list[dict[str, Any]], adapter: Path | None, run: Run) -> list[dict[str, Any]]:
    """Return the completions of every problem, a row each, group after group, sampled and rewarded as in GRPO.

    A row holds `id`, `question`, `answer` (the right one), `completion`, `tokens` (with the end token), `ended` (false:
    truncated), `well_formed`, `given` (the canonical answer read, or None), `right`, `rewards` (by name, not weighted)
    and `total`, their weighted sum; None for what is not scored. Rewards see all completions in one call, on any number
    of GPUs.
    """
    answer_format = formats.get(recipe.format.name)
    functions = load_rewards(recipe)
    knobs = recipe.score_base
    each = [problem for problem in problems for _ in range(knobs.completions_per_problem)]

    def draw_own(places: list[int]) -> list[list[Completion]]:
        return [complete(recipe, [each[place] for place in places], adapter)]

    (completions,) = sample_on_gpus(run, len(each), knobs.batch_size, draw_own)
    completion_ids = [ids for ids, _ in completions]
    texts = load_tokenizer(recipe).batch_decode(completion_ids, skip_special_tokens=True)
    columns = {
        "prompts": [problem["prompt"] for problem in each],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": completion_ids,
        "answer": [problem["answer"] for problem in each],
        "kind": [problem.get("kind", "number") for problem in each],
        **{name: [problem.get(name) for problem in each] for name in ("id", ROW)},
        **of_trainer(recipe),
    }
    rewards = {function.__name__: function(**columns) for function in functions}
    rows = []
    for place, (problem, (ids, has_end), text) in enumerate(zip(each, completions, texts, strict=True)):
        own = {name: values[place] for name, values in rewards.items()}
        scored = [pair for pair in zip(recipe.rewards.weights, own.values(), strict=True) if pair[1] is not None]
        total = sum(weight * value for weight, value in scored) if scored else None
        rows.append(
            {
                "id": problem["id"],
                "question": problem["prompt"][-1]["content"],
                "answer": shown_answer(problem.get("kind", "number"), problem["answer"]),
                "completion": text,
                "tokens": len(ids),
                "ended": has_end,
                **mark(answer_format, text, problem["answer"], problem.get("kind", "number")),
                "rewards": own,
                "total": total,
            }
        )
    return rows


def complete(recipe: Recipe, problems: list[dict[str, Any]], adapter: Path | None) -> list[Completion]:
    """Return a completion of each of `problems`, drawn as in GRPO; of several processes, each has a seed of its own."""
    knobs = recipe.score_base
    sampling = Sampling(**{name: getattr(recipe.grpo, name) for name in SAMPLING})
    adapters = {"sft": adapter} if adapter else {}
    seed = knobs.seed + ranks.rank()
    with (
        open_generator(recipe, adapters, sampling.max_completion_tokens, seed) as generator,
        open_bar(len(problems), "completion", "score-base") as bar,
    ):
        conversations = [problem["prompt"] for problem in problems]
        prompts = generator.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
        completion_ids = generate_completions(
            generator, prompts, sampling, knobs.batch_size, adapter="sft" if adapter else None, advance=bar.update
        )
    return [(ids, ids[-1] in generator.ends) for ids in completion_ids]


def score(rows: list[dict[str, Any]], weights: list[float], group: int) -> Scores:
    """Return the figures of `rows`, which are `group` completions a problem."""
    rates = pass_rates(rows, group)
    return {
        "problems": len(rates),
        "completions": len(rows),
        "right": sum(row["right"] for row in rows) / len(rows),
        "well_formed": sum(row["well_formed"] for row in rows) / len(rows),
        "cut_off": sum(not row["ended"] for row in rows) / len(rows),
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "never_right": rates.count(0.0),
        "always_right": rates.count(1.0),
        "rewards": [
            {"name": name, "weight": weight, **summary([row["rewards"][name] for row in rows], group)}
            for name, weight in zip(rows[0]["rewards"], weights, strict=True)
        ],
        "total": summary([row["total"] for row in rows], group),
    }


def summary(values: list[float | None], group: int) -> Spread:
    """Return the figures of `values`, of which `group` in a row are one problem's; None is not scored, and left out.

    In a group without variance every advantage is 0.
    """
    places = range(0, len(values), group)
    groups = [[value for value in values[first : first + group] if value is not None] for first in places]
    scored = [value for own in groups for value in own] or [0.0]
    return {
        "mean": statistics.fmean(scored),
        "spread": statistics.stdev(scored) if len(scored) > 1 else 0.0,
        "least": min(scored),
        "most": max(scored),
        "zero_variance": sum(max(own, default=0) - min(own, default=0) <= NO_VARIANCE for own in groups) / len(groups),
    }


def pass_rates(rows: list[dict[str, Any]], group: int) -> list[float]:
    """Return the share of right completions of each problem, in order."""
    right = [row["right"] for row in rows]
    return [sum(right[first : first + group]) / group for first in range(0, len(right), group)]


def choose(problems: list[dict[str, Any]], rows: list[dict[str, Any]], knobs: ScoreBase) -> list[dict[str, Any]] | None:
    """Return the problems whose pass rate is within the recipe's bounds; None, where the bounds hold them all."""
    low, high = knobs.min_pass_rate, knobs.max_pass_rate
    if (low, high) == (0.0, 1.0):
        return None
    rates = pass_rates(rows, knobs.completions_per_problem)
    return [problem for problem, rate in zip(problems, rates, strict=True) if low <= rate <= high]


def advise(metrics: ScoreBaseFigures, prompts_per_step: int) -> list[str]:
    """Return reasons not to run GRPO with this recipe, and what to do about them; empty if there are none."""
    advice = []
    constant = [
        f"{own['name']} ({own['mean']:g})"
        for own in metrics["rewards"]
        if own["weight"] and own["most"] - own["least"] <= NO_VARIANCE
    ]
    if constant:
        advice.append(
            f"[rewards] {', '.join(constant)}: the same for all {metrics['completions']} completions, so GRPO learns "
            f"nothing from {'them' if constant[1:] else 'it'}"
        )
    flat = metrics["total"]["zero_variance"] == 1
    if flat:
        advice.append(
            f"in each of the {metrics['problems']} groups all completions are rewarded alike, so every advantage is 0"
        )
    if constant or flat:
        advice.append(remedy(metrics))
    if not flat and metrics.get("subset", prompts_per_step) < prompts_per_step:
        advice.append(
            f"{metrics['subset']} of {metrics['problems']} problems have a pass rate within [score_base] min_pass_rate "
            f"and max_pass_rate, fewer than GRPO's {prompts_per_step} a step: move the bounds apart, or raise "
            f"[score_base] problems"
        )
    return advice


def remedy(metrics: ScoreBaseFigures) -> str:
    """Return what to do when rewards don't tell completions apart."""
    if metrics["cut_off"] == 1:
        return "every completion was truncated: raise [grpo] max_completion_tokens, or train SFT for longer"
    if metrics["well_formed"] == 0 and metrics["model"] == "base":
        return "no completion is well formed: the base model does not know the format; score the SFT model, with --sft"
    if metrics["well_formed"] == 0:
        return "no completion is well formed: train SFT for longer, or on more examples"
    if metrics["right"] == 0:
        return "no answer is right: take easier problems, or train SFT for longer on worked solutions"
    if metrics["right"] == 1:
        return "every answer is right: take harder problems"
    return (
        "where every completion earns the reward, the model has learned it: give it weight 0, which still logs it. "
        "Otherwise take one that tells completions apart, or raise [grpo] temperature, so that they differ more"
    )


if __name__ == "__main__":
    main()
