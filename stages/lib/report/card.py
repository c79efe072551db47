"""The model card, README.md of a repository on the hub: `card.md.jinja`, filled in from manifests and recipe.

Every figure in a card is in a manifest. A figure without one (the accuracy of the 4-bit model) is left out. The front
matter is what the hub reads: https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.lib.answers import formats, stats
from stages.lib.recipe.tables import Recipe, is_hub_name
from stages.lib.report.figures import (
    GgufFigures,
    GrpoFigures,
    InferFigures,
    MergeFigures,
    OllamaModelfileFigures,
    PrepareDataFigures,
    SftFigures,
    figures_of,
)
from stages.lib.report.repository import KINDS, File
from stages.lib.report.terminal import counted, interval

Manifests = Mapping[str, Mapping[str, Any]]

# The hub's names of licences. Any other licence is "other" there, with a name of its own.
LICENSES = (
    "agpl-3.0", "apache-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m",
    "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0",
    "cc0-1.0", "creativeml-openrail-m", "gemma", "gpl-3.0", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "mit", "mpl-2.0", "openrail", "openrail++", "unlicense",
)  # fmt: skip


def write(kind: str, names: Mapping[str, str], recipe: Recipe, manifests: Manifests, files: Sequence[File]) -> str:
    """Return the card of `names[kind]`, with `files`; `names`: all uploads. Raises `UserError` for mistyped figures."""
    import jinja2
    import yaml

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  Markdown is no HTML: `cell` and `fence` escape
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "cell": cell, "counted": counted, "fence": fence, "interval": lambda bounds: interval(*bounds),
        "is_hub_name": is_hub_name, "json": lambda text: json.dumps(text, ensure_ascii=False),
        "megabytes": lambda size: f"{size / 1e6:,.1f}", "nats": "{:.1e}".format, "number": "{:,}".format,
        "p_text": stats.p_text, "share": "{:.1%}".format, "share2": "{:.2%}".format, "shown": shown,
    }  # fmt: skip
    data = figures_of(manifests["prepare-data"], PrepareDataFigures)
    grpo = figures_of(manifests["grpo"], GrpoFigures)
    infer = figures_of(manifests["infer"], InferFigures)
    gguf = figures_of(manifests["gguf"], GgufFigures)
    front = front_matter(kind, names, recipe, infer, gguf)
    answers = formats.get(recipe.format.name)
    first, last = grpo["first"]["rewards"], grpo["last"]["rewards"]
    rewards = [
        (name, weight, first.get(label), last.get(label))
        for name, weight in zip(recipe.rewards.functions, recipe.rewards.weights, strict=True)
        for label in [name.rpartition(":")[2]]  # TRL logs a function of a file by its own name
    ]
    return environment.get_template("card.md.jinja").render(
        kind=kind, names=names, recipe=recipe, files=files, kinds=KINDS,
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=10_000),
        prepared=data, grpo=grpo, infer=infer, gguf=gguf, sft=figures_of(manifests["sft"], SftFigures),
        merge=figures_of(manifests["merge"], MergeFigures), rewards=rewards, versions=versions(manifests),
        sources=list(zip(recipe.data.sources, data["sources"], strict=True)), begun=answers.generation_prefix,
        example=answers.generation_prefix + answers.write(formats.Answer("the reasoning, step by step", "42")),
        prompted_by=figures_of(manifests["ollama-modelfile"], OllamaModelfileFigures)["prompted_by"],
        recipe_text=recipe.path.read_text().strip("\n"),
    )  # fmt: skip


def front_matter(
    kind: str, names: Mapping[str, str], recipe: Recipe, infer: InferFigures, gguf: GgufFigures
) -> dict[str, Any]:
    """Return the front matter: licence, base model, data, tags, and the accuracies measured on these files."""
    front: dict[str, Any] = {}
    if recipe.ollama.license in LICENSES:
        front["license"] = recipe.ollama.license
    elif recipe.ollama.license:
        front |= {"license": "other", "license_name": slug(recipe.ollama.license)}
    if kind in ("gguf", "merged_4bit") and "merged_16bit" in names:
        front |= {"base_model": names["merged_16bit"], "base_model_relation": "quantized"}
    elif is_hub_name(recipe.model.name) and not recipe.model.hub:  # of ModelScope, the hub has no link to draw
        relation = "adapter" if kind == "lora" else "finetune"
        front |= {"base_model": recipe.model.name, "base_model_relation": relation}
    sources = recipe.data.sources
    if datasets := list(
        dict.fromkeys(source.name for source in sources if is_hub_name(source.name) and not source.hub)
    ):
        front["datasets"] = datasets
    # On the hub a dataset's subsets are often its languages; nothing else in a recipe says one.
    languages = {source.config for source in sources}
    if all(re.fullmatch("[a-z]{2}", language) for language in languages):
        front["language"] = sorted(languages)
    front["library_name"] = {"lora": "peft", "gguf": "gguf"}.get(kind, "transformers")
    front["pipeline_tag"] = "text-generation"
    tags = {"lora": ["lora"], "gguf": ["gguf", "llama.cpp", "ollama"], "merged_4bit": ["bitsandbytes", "4-bit"]}
    front["tags"] = ["temper", "sft", "grpo", "reasoning", "conversational", *tags.get(kind, [])]
    if kind != "merged_4bit":  # its accuracy is not measured
        eval_sources = [source for source in sources if "eval" in source.use]
        titles = [f"{shown(source.name)} ({source.split})" for source in eval_sources]
        dataset = {
            "name": ", ".join([*titles, "held-out problems"]),
            "type": next((each.name for each in eval_sources if is_hub_name(each.name) and not each.hub), "custom"),
        }
        metrics = accuracies(infer, gguf if kind == "gguf" else None)
        result = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
        front["model-index"] = [{"name": names[kind].partition("/")[2], "results": [result]}]
    return front


def accuracies(infer: InferFigures, gguf: GgufFigures | None) -> list[dict[str, Any]]:
    """Return the accuracies, shares of 1, of the GGUF files; without them, of the model after GRPO."""
    if gguf is None:
        own = infer["grpo"]
        name = f"accuracy ({own['problems']} problems, greedy)"
        return [{"type": "accuracy", "value": own["accuracy"], "name": name}]
    prompts = gguf["reference"]["prompts"]
    return [
        {"type": "accuracy", "value": file["accuracy"], "name": f"accuracy of {name} ({prompts} problems, greedy)"}
        for name, file in gguf["files"].items()
    ]


def versions(manifests: Manifests) -> list[tuple[str, str]]:
    """Return Temper's revision, packages and hardware; where stages differ, each value with its stages."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in manifests.items():
        where = manifest["environment"]
        git = (where["git"] or "not known").replace("-dirty", " with changes that were not committed")
        facts = {"Temper": git, "Python": where["python"], **where["packages"], "GPU": where["gpu"] or "none"}
        for name, value in facts.items():
            found.setdefault(name, {}).setdefault(value, []).append(stage)
    return [
        (name, ", ".join(value if len(values) == 1 else f"{value} ({', '.join(at)})" for value, at in values.items()))
        for name, values in found.items()
    ]


def shown(name: str) -> str:
    """Return the name of a model or source in a card: never a path on this disk."""
    if name == "base-model":
        return "generated with the base model"
    return name if is_hub_name(name) else Path(name).name


def slug(text: str) -> str:
    """Return the first line of `text` as a name for the hub: lower case, at most 60 characters, no blanks."""
    return re.sub(r"[^a-z0-9.]+", "-", text.strip().split("\n")[0].lower())[:60].strip("-.")


def cell(text: str) -> str:
    """Return `text` escaped as one cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def fence(text: str, language: str) -> str:
    """Return `text`, without one line break at its end, fenced as one block of code in Markdown."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text.removesuffix(chr(10))}\n{marks}"
