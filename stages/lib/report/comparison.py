"""Runs held against each other: what differs in their recipes, accuracy on the problems they share, time and cost."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from stages.lib.answers import stats
from stages.lib.artifact.manifest import MANIFEST, manifest_in, read_manifest
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe
from stages.lib.report.figures import GgufFigures, InferFigures, figures_of
from stages.lib.report.page import STAGES, duration, page_environment, read_jsonl
from stages.lib.report.plots import draw_accuracy
from stages.lib.report.terminal import aligned, interval

ALPHA = 0.05  # of a difference that is called one, after the correction
NOT_COMPARED = ("path", "model_folder")  # of a recipe: where it lies


@dataclass(frozen=True)
class Run:
    """A run whose models were evaluated."""

    name: str
    settings: dict[str, str]  # the recipe's keys by dotted name, as JSON
    figures: InferFigures
    rights: dict[tuple[str, str], bool]  # is GRPO's answer right, by problem: question and answer
    seconds: dict[str, float]  # by finished stage
    grpo_steps: int
    gguf: GgufFigures | None
    quantization: str
    machine: str  # the GPU that trained, or the number of processors


@dataclass(frozen=True)
class Pair:
    """Two runs on the problems that both were evaluated on: those that the second gained and lost."""

    first: str
    second: str
    problems: int
    gained: int
    lost: int
    p: float  # McNemar's exact test, two-sided
    corrected: float  # by Holm's method, for the number of pairs


def read_run(recipe: Recipe, artifacts: Path) -> Run:
    """Return the run of `recipe` in the folder `artifacts`. Raises `UserError` where infer or grpo is not finished."""
    name = recipe.path.stem
    manifests = {
        stage: manifest
        for stage in STAGES
        if (manifest := manifest_in(artifacts / stage / MANIFEST, stage)) is not None
    }
    for stage in ("grpo", "infer"):
        if stage not in manifests:
            raise UserError(f"{artifacts / stage}: not finished, so there is nothing to compare. "
                            f"Run: make infer RECIPE={name}")  # fmt: skip
    manifests["infer"] = read_manifest(artifacts / "infer", "infer", "answers.jsonl")
    rows = [row for row in read_jsonl(artifacts / "infer" / "answers.jsonl") if row["model"] == "grpo"]
    where = manifests["grpo"]["environment"]
    return Run(
        name, settings(recipe), figures_of(manifests["infer"], InferFigures),
        {(row["question"], str(row["answer"])): row["right"] for row in rows},
        {stage: manifest["wall"]["seconds"] for stage, manifest in manifests.items()}, recipe.grpo.steps,
        figures_of(manifests["gguf"], GgufFigures) if "gguf" in manifests else None, recipe.ollama.quantization.lower(),
        where["gpu"] or f"{where['processors']} processors",
    )  # fmt: skip


def settings(recipe: Recipe) -> dict[str, str]:
    """Return all keys of a recipe by dotted name, those of a list of tables by place, with their values as JSON."""
    tables = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in NOT_COMPARED}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in flat(tables, "") if value is not None}


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of tables and lists of tables by dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for place, item in enumerate(value):
            yield from flat(item, f"{name}[{place}]")
    else:
        yield name, value


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the keys whose values differ, each with the value of every run; "" where a run has no such key."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key, "") for run in runs] for key in keys}
    return {key: own for key, own in values.items() if len(set(own)) > 1}


def compared(runs: Sequence[Run]) -> list[Pair]:
    """Return all pairs of runs with their paired test; pairs that share no problem are left out."""
    found = []
    for first, second in combinations(runs, 2):
        shared = first.rights.keys() & second.rights.keys()
        if shared:
            gained = sum(second.rights[key] and not first.rights[key] for key in shared)
            lost = sum(first.rights[key] and not second.rights[key] for key in shared)
            found.append((first.name, second.name, len(shared), gained, lost, stats.mcnemar(gained, lost)))
    corrected = stats.holm([each[-1] for each in found])
    return [Pair(*each, own) for each, own in zip(found, corrected, strict=True)]


def verdict(pair: Pair) -> str:
    """Return which of two runs answers better, in words, by the corrected test."""
    if pair.corrected >= ALPHA:
        return "no measurable difference"
    return f"{pair.second if pair.gained > pair.lost else pair.first} is better"


def conclusion(runs: Sequence[Run], pairs: Sequence[Pair]) -> str:
    """Return in a sentence which run has the highest accuracy, and which others it is measurably better than."""
    best = max(runs, key=lambda run: run.figures["grpo"]["accuracy"])
    said = f"Highest accuracy: {best.name}, {best.figures['grpo']['accuracy']:.1%}."
    own = [pair for pair in pairs if best.name in (pair.first, pair.second)]
    beaten = [
        pair.first if best.name == pair.second else pair.second
        for pair in own
        if verdict(pair) == f"{best.name} is better"
    ]
    if beaten:
        return f"{said} Measurably better than {', '.join(beaten)}."
    return f"{said} Measurably better than none of the others." if own else said


def by_seeds(runs: Sequence[Run]) -> list[tuple[str, list[float]]]:
    """Return the accuracies of the runs that differ in seeds alone, by what else sets them apart; none without any."""
    apart = [key for key in differences(runs) if key.rpartition(".")[2] != "seed"]
    found: dict[str, list[float]] = {}
    for run in runs:
        words = ", ".join(f"{key} = {run.settings.get(key, '(left out)')}" for key in apart)
        found.setdefault(words or "all", []).append(run.figures["grpo"]["accuracy"])
    return list(found.items()) if len(found) < len(runs) else []


def warnings(runs: Sequence[Run], pairs: Sequence[Pair]) -> list[str]:
    """Return what a reader of the comparison has to know, a sentence each."""
    said = []
    if len(pairs) < len(runs) * (len(runs) - 1) // 2:
        said.append("Some runs share no problem: their accuracies are of different exams and can't be compared.")
    elif len({frozenset(run.rights) for run in runs}) > 1:
        said.append("The runs were not evaluated on the same problems: only the paired tests compare like with like.")
    if len(machines := dict.fromkeys(run.machine for run in runs)) > 1:
        said.append(f"The runs were made on different machines ({'; '.join(machines)}): times and costs tell little.")
    return said


def table(runs: Sequence[Run], price: float | None) -> list[tuple[str, ...]]:
    """Return a header, and a row of texts for each run."""
    head = ("run", "SFT", "GRPO", "95% interval", "pass@k", "maj@k", "tokens", "truncated", "grpo", "a step", "in all")
    rows: list[tuple[str, ...]] = [head + (("cost",) if price is not None else ()) + ("file", "MB", "mean KL")]
    for run in runs:
        own, seconds, total = run.figures["grpo"], run.seconds["grpo"], sum(run.seconds.values())
        file = run.gguf["files"].get(run.quantization) if run.gguf else None
        rows.append((
            run.name, f"{run.figures['sft']['accuracy']:.1%}", f"{own['accuracy']:.1%}",
            interval(*own["accuracy_interval"]), *drawn(run), f"{own['tokens']:.1f}", f"{own['cut_off']:.1%}",
            duration(seconds), f"{seconds / run.grpo_steps:.2f} s", duration(total),
            *(() if price is None else (f"{price * total / 3600:.2f}",)),
            *((run.quantization, f"{file['bytes'] / 1e6:,.1f}", f"{file['mean_kl']:.1e}") if file else ("", "", "")),
        ))  # fmt: skip
    filled = [place for place in range(len(rows[0])) if any(row[place] for row in rows[1:])]
    return [tuple(row[place] for place in filled) for row in rows]


def drawn(run: Run) -> tuple[str, str]:
    """Return pass@k and maj@k after GRPO, of as many drawn answers as there are; empty without any."""
    if "sampled" not in run.figures:
        return "", ""
    own = run.figures["sampled"]["grpo"]
    k = str(own["samples"])
    return f"{own['pass_at'][k]['share']:.1%} (k = {k})", f"{own['majority_at'][k]['share']:.1%} (k = {k})"


def pair_rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Return a header, and a row of texts for each pair."""
    rows: list[tuple[str, ...]] = [("pair", "problems", "gained", "lost", "McNemar", "corrected", "")]
    for pair in pairs:
        counts = (f"{pair.problems:,}", str(pair.gained), str(pair.lost))
        tests = (stats.p_text(pair.p), stats.p_text(pair.corrected))
        rows.append((f"{pair.first}, then {pair.second}", *counts, *tests, verdict(pair)))
    return rows


def seed_lines(runs: Sequence[Run]) -> list[str]:
    """Return a line for each group of runs that differ in seeds alone: mean, least and highest accuracy."""
    return [
        f"{words}: {len(own)} {'run' if len(own) == 1 else 'runs'}, accuracy {sum(own) / len(own):.1%} on average "
        f"({interval(min(own), max(own))})"
        for words, own in by_seeds(runs)
    ]


def text(runs: Sequence[Run], price: float | None) -> str:
    """Return the comparison for the terminal."""
    pairs = compared(runs)
    different = [[key, *(value or "(left out)" for value in own)] for key, own in differences(runs).items()]
    head = ["differs", *(run.name for run in runs)]
    blocks = [
        aligned([head, *different]) if different else ["The recipes are the same."],
        aligned(table(runs, price)),
        aligned(pair_rows(pairs)) if pairs else [],
        [conclusion(runs, pairs)],
        seed_lines(runs),
        warnings(runs, pairs),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def write(runs: Sequence[Run], price: float | None) -> str:
    """Return the comparison as a page: one file that fetches nothing."""
    found = compared(runs)
    accuracies: Mapping[str, Any] = {run.name: run.figures["grpo"] for run in runs}
    return page_environment().get_template("comparison.html.jinja").render(
        runs=runs, differences=differences(runs), rows=table(runs, price), pairs=pair_rows(found),
        conclusion=conclusion(runs, found), seeds=seed_lines(runs), warnings=warnings(runs, found),
        plot=draw_accuracy(accuracies),
        made=datetime.now().astimezone().isoformat(" ", "minutes"),
    )  # fmt: skip
