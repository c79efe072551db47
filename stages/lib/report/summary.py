"""The summary at the end of `make all`: accuracies, files, times, and where each part of the result is.

It is drawn from manifests alone, and fits 80 columns. Names are whole: one that does not fit beside what it is for goes
on a line of its own.
"""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.lib.recipe.tables import Recipe
from stages.lib.report.page import MODELS, duration, standing, verdict
from stages.lib.report.terminal import accuracies, aligned

WIDTH = 80


def summary(recipe: Recipe, artifacts: Path) -> list[tuple[str, list[str]]]:
    """Return the parts of the summary of a run, finished or not, a heading and its lines each."""
    stages = list(standing(recipe, artifacts))
    figures = {stage["name"]: stage["manifest"]["metrics"] for stage in stages if stage["manifest"]}
    parts = [("Accuracy on held-out problems", list(accuracy(figures.get("infer"))))]
    parts += [("GGUF files, each against the merged model", list(files(figures.get("gguf"))))]
    parts += [("Time", list(times(stages)))]
    parts += [("Where it is", list(places(recipe, artifacts, figures)))]
    parts += [("What to run", list(commands(recipe, figures)))]
    return [(heading, lines) for heading, lines in parts if lines]


def accuracy(infer: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a line a model, and what GRPO changed in a sentence."""
    if infer is None:
        return
    yield from aligned(accuracies({name: infer[name] for name in MODELS}))
    yield from textwrap.wrap(str(verdict(infer)), WIDTH - 2)


def files(gguf: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a line a GGUF file: its size, its distance and its answers."""
    if gguf is None:
        return
    rows = [("type", "MB", "mean KL, nats", "same top token", "right")]
    for kind, file in sorted(gguf["files"].items(), key=lambda item: -item[1]["bytes"]):
        distances = (f"{file['bytes'] / 1e6:,.1f}", f"{file['mean_kl']:.1e}", f"{file['same_top']:.1%}")
        rows.append((kind, *distances, f"{file['accuracy']:.1%}"))
    yield from aligned(rows)


def times(stages: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line a stage with its time, or with where it stands, and the time of all that are finished."""
    rows = []
    for stage in stages:
        state = "" if stage["state"] == "finished" else stage["state"]
        rows.append((stage["name"], duration(stage["seconds"]) if stage["manifest"] else "", state))
    rows.append(("all", duration(sum(stage["seconds"] for stage in stages)), ""))
    widths = [max(len(row[place]) for row in rows) for place in (0, 1)]
    yield from (f"{name.ljust(widths[0])}  {took.rjust(widths[1])}  {state}".rstrip() for name, took, state in rows)


def places(recipe: Recipe, artifacts: Path, figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths of what was made, and what each is."""
    kind = recipe.ollama.quantization.lower()
    found = {
        "ollama-modelfile": ("ollama-modelfile/Modelfile", f"for Ollama, with the file {kind}"),
        "gguf": ("gguf", "for llama.cpp and LM Studio"),
        "merge": ("merge/model", "for transformers and vLLM, 16 bits"),
        "grpo": ("grpo/adapter", "the LoRA adapter"),
        "infer": ("infer/answers.jsonl", "every answer of each model"),
    }
    lines = [(artifacts / path, what) for stage, (path, what) in found.items() if stage in figures]
    lines.insert(0, (artifacts / "report.html", "the page of this run"))
    yield from pairs([(str(path), what) for path, what in lines])


def commands(recipe: Recipe, figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield what to run next."""
    name = recipe.path.stem
    if "ollama-modelfile" not in figures:
        yield from pairs([(f"make all RECIPE={name}", "goes on from here")])
        return
    asked = {"ask": "one question: Q=\"...\"", "chat": "talk in the terminal", "serve": "answer as OpenAI's API does",
             "ollama": "hand the model to Ollama"}  # fmt: skip
    yield from pairs([(f"make {target} RECIPE={name}", what) for target, what in asked.items()])


def pairs(lines: list[tuple[str, str]]) -> Iterator[str]:
    """Yield each name with what it is for beside it, or below it where a line would be too long."""
    width = max(len(name) for name, _ in lines)
    is_narrow = max(width + 2 + len(what) for _, what in lines) <= WIDTH - 2
    for name, what in lines:
        yield from [f"{name.ljust(width)}  {what}"] if is_narrow else [name, f"    {what}"]
