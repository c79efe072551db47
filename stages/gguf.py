"""Make GGUF files of the merged model, and prove that each answers like it."""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import click

from stages.lib import options
from stages.lib.artifact.folder import Run, write_artifact
from stages.lib.artifact.manifest import read_manifest, write_json
from stages.lib.errors import UserError
from stages.lib.gguf import imatrix
from stages.lib.gguf.convert import convert_lora, convert_model, name_of, quantize
from stages.lib.gguf.prompted import Prompted, compare_prompts, conversations
from stages.lib.gguf.tokens import Vocabulary, verify_prompt
from stages.lib.gguf.types import GGUF_TYPES
from stages.lib.jsonl import first_rows, rows_of
from stages.lib.model.files import refuse_quantized, vocabulary_size, whole_model_folder
from stages.lib.model.locate import local_model, locate_model
from stages.lib.model.parity import Reference, evaluate_adapter, evaluate_file, refer
from stages.lib.model.reference import load_reference
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Gguf, Recipe
from stages.lib.report import terminal
from stages.lib.report.figures import Accuracy, AdapterFile, GgufFigures, GgufFile, MergeFigures, figures_of
from stages.lib.report.plots import draw_parity
from stages.lib.train import trackers

ADAPTER = "adapter-f16.gguf"


@click.command(help=__doc__)
@options.recipe
@options.reads("merge")
@options.reads("prepare-data")
@options.reads("grpo")
@options.base_model
@options.out
def main(recipe: Path, merge: Path, prepare_data: Path, grpo: Path, base_model: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe, base_model)
    merged = figures_of(read_manifest(merge, "merge"), MergeFigures)
    lora = grpo / "adapter" if "lora" in run_recipe.save else None
    room = room_bytes(run_recipe.gguf, merged["parameters"], merge / "model", lora)
    tables = run_recipe.tables("format", "gguf") | {
        "model": {"name": run_recipe.model.name},
        "infer": {"max_completion_tokens": run_recipe.infer.max_completion_tokens},
    }
    sets = ["eval.jsonl", "sft.jsonl"] if run_recipe.gguf.importance_prompts else ["eval.jsonl"]
    inputs = {"merge": (merge, ["model/*"]), "prepare-data": (prepare_data, sets)}
    sources = {}
    if lora:
        tables |= {"save": ["lora"], "merge": {"max_mean_kl": run_recipe.merge.max_mean_kl}}
        inputs |= {"grpo": (grpo, ["adapter/*"])}
        inputs |= {"base-model": (base_model, ["model/*"])} if base_model else {}
        sources = local_model(run_recipe)
        base, revision = locate_model(run_recipe)
    with write_artifact(out, "gguf", tables, inputs, sources=sources, room_bytes=room) as run:
        refuse_quantized(merge / "model", "gguf")
        rows = first_rows(prepare_data / "eval.jsonl", run_recipe.gguf.prompts, "[gguf] prompts")
        run.checkpoints.mkdir(exist_ok=True)
        paths = make_files(merge / "model", prepare_data / "sft.jsonl", run_recipe, run)
        check_tokens(
            min(paths.values(), key=os.path.getsize), merge / "model", rows_of(prepare_data / "eval.jsonl"), run
        )
        adapter = make_adapter(whole_model_folder(base, revision), lora, run_recipe, run) if lora else None
        figures = prove(merge / "model", paths, rows, run_recipe, run, adapter)
        run.metrics.update(figures)
        trackers.add_result(run_recipe, out.parent, tracked(figures))


def kinds(gguf: Gguf) -> list[str]:
    """Return the recipe's types in lower case."""
    return [name.lower() for name in gguf.types]


def limits(gguf: Gguf) -> dict[str, float]:
    """Return the largest mean KL divergence (nats) by type: the recipe's, else that of `GGUF_TYPES`."""
    return GGUF_TYPES | {name.lower(): limit for name, limit in gguf.max_mean_kl.items()}


def room_bytes(gguf: Gguf, parameters: int, model: Path, lora: Path | None = None) -> int:
    """Return the bytes that the stage writes at most for a model of `parameters` in the folder `model`.

    3 bits more than a type's digit cover its scales and finer types. An adapter, in `lora`, takes the base in 16 bits.
    """
    tokenizer = sum(path.stat().st_size for path in model.iterdir() if path.suffix != ".safetensors")
    quantizations = [name for name in kinds(gguf) if name != source_kind(gguf)]
    digits = {name: int(re.findall(r"\d+", name)[0]) for name in quantizations}
    bits = [digit if digit > 8 else min(digit + 3, 9) for digit in digits.values()]
    files = parameters * 2 + sum(parameters * count // 8 for count in bits)
    reference = gguf.prompts * gguf.positions_per_prompt * vocabulary_size(model) * 4
    if lora and lora.is_dir():
        files += parameters * 2 + sum(path.stat().st_size for path in lora.iterdir()) + tokenizer + 1_000_000
    return files + reference + (len(quantizations) + 1) * (tokenizer + 1_000_000)


def source_kind(gguf: Gguf) -> str:
    """Return the 16-bit type that the others are made from: f16, or bf16 where the recipe names only that."""
    return "bf16" if "bf16" in kinds(gguf) and "f16" not in kinds(gguf) else "f16"


def make_files(model: Path, training: Path, recipe: Recipe, run: Run) -> dict[str, Path]:
    """Convert the model in the folder `model` to 16 bits, and quantize that to every type. Return paths by type.

    `training`: sft.jsonl, for the importance matrix. A 16-bit file not in the recipe lies with the checkpoints.
    """
    types, source = kinds(recipe.gguf), source_kind(recipe.gguf)
    paths = {kind: run.folder / f"model.{kind}.gguf" for kind in types}
    source_path = paths.get(source, run.checkpoints / f"model.{source}.gguf")
    start = time.monotonic()
    convert_model(model, source_path, source, name_of(recipe))
    run.seconds["convert"] = time.monotonic() - start
    importance = None
    if recipe.gguf.importance_prompts:
        start = time.monotonic()
        rows = first_rows(training, recipe.gguf.importance_prompts, "[gguf] importance_prompts")
        importance = weigh(model, source_path, rows)
        run.seconds["importance"] = time.monotonic() - start
    for kind in types:
        if kind != source:
            start = time.monotonic()
            quantize(source_path, paths[kind], kind, importance)
            run.seconds[f"quantize {kind}"] = time.monotonic() - start
    return paths


def make_adapter(base: Path, lora: Path, recipe: Recipe, run: Run) -> tuple[Path, Path]:
    """Convert the model in `base`, among the checkpoints, and its adapter in `lora`; return both GGUF files."""
    start = time.monotonic()
    base_path = run.checkpoints / "base.f16.gguf"
    convert_model(base, base_path, "f16", name_of(recipe))
    convert_lora(lora, base, run.folder / ADAPTER)
    run.seconds["convert lora"] = time.monotonic() - start
    return base_path, run.folder / ADAPTER


def check_tokens(path: Path, model: Path, rows: Sequence[dict], run: Run) -> None:
    """Raise `UserError` unless the file `path` prompts with the merged `model`'s tokens in every problem of `rows`.

    No network runs for it, and all files hold the same tokenizer: so all problems are read, once, and not only those
    on which every file is compared.
    """
    from transformers import AutoTokenizer

    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    with contextlib.closing(Vocabulary(path)) as file:
        for row in rows:
            verify_prompt(file, tokenizer, row["prompt"], f"{path}, problem {row['id']}")
    run.seconds["tokens"] = time.monotonic() - start


def weigh(model: Path, source: Path, rows: Sequence[dict]) -> dict[str, Any]:
    """Return the importance matrix of the model in the folder `model`, whose 16-bit GGUF is `source`, over `rows`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    texts = tokenizer.apply_chat_template([row["prompt"] + row["completion"] for row in rows], return_dict=False)
    with contextlib.closing(Vocabulary(source)) as file:
        architecture = file.metadata("general.architecture")
    return imatrix.collect(load_reference(model), texts, architecture)


def prove(
    model: Path,
    paths: dict[str, Path],
    rows: list[dict],
    recipe: Recipe,
    run: Run,
    adapter: tuple[Path, Path] | None = None,
) -> GgufFigures:
    """Compare every GGUF file with the merged model; write parity.json and parity.png; return their figures.

    `adapter` is the base's GGUF file and the LoRA's, compared as one model. Raises `UserError` for a file that reads a
    prompt as other tokens, is over its limit, or does not end its completions.
    """
    start = time.monotonic()
    reference = refer(model, rows, recipe, run.checkpoints)
    run.seconds["reference"] = time.monotonic() - start
    max_kl = limits(recipe.gguf)
    files: dict[str, GgufFile] = {}
    for kind, path in paths.items():
        start = time.monotonic()
        found = evaluate_file(path, reference)
        run.threads[kind] = found.pop("threads")
        files[kind] = cast(GgufFile, found | {"max_mean_kl": max_kl[kind]})
        run.seconds[f"examine {kind}"] = time.monotonic() - start
    figures: GgufFigures = {
        "reference": {
            "prompts": len(rows),
            "positions": sum(len(text.positions) for text in reference.texts),
            **cast(Accuracy, reference.completions.accuracy),
            "ended": reference.completions.ended,
        },
        "llama_server": ask_llama_server(min(paths.values(), key=os.path.getsize), reference, run),
        "files": files,
    }
    if adapter:
        start = time.monotonic()
        # The merged model is a sum rounded once, these are two files rounded to float16 each.
        limit = max_kl["f16"] + recipe.merge.max_mean_kl
        figures["lora"] = cast(AdapterFile, evaluate_adapter(*adapter, reference) | {"max_mean_kl": limit})
        run.seconds["examine lora"] = time.monotonic() - start
    reference.logits.unlink()
    write_json(run.folder / "parity.json", figures)
    draw_parity(figures["files"], run.folder / "parity.png")
    click.echo(terminal.gguf(figures))
    failures = [line for kind in paths for line in misses(kind, figures, recipe.gguf.max_lost_ends)]
    failures += adapter_misses(figures["lora"]) if adapter else []
    if failures:
        raise UserError("the files do not answer like the merged model:\n  " + "\n  ".join(failures))
    return figures


def ask_llama_server(path: Path, reference: Reference, run: Run) -> Prompted:
    """Return how llama-server prompts the model in `path`, and warn of differences in text that no run asks.

    Raises `UserError` for a difference in what this run prompts with.
    """
    start = time.monotonic()
    prompts = [row["prompt"] for row in reference.rows]
    asked, others = conversations(prompts, reference.tokenizer)
    figures = compare_prompts(path, reference.tokenizer, asked, others)
    for found in figures["differences"]:
        click.echo(f"warning: llama-server prompts otherwise in text that no run asks: {found}", err=True)
    run.seconds["llama-server"] = time.monotonic() - start
    return figures


def tracked(figures: GgufFigures) -> dict[str, float]:
    """Return the figures that trackers show."""
    values: dict[str, float] = {}
    for kind, file in figures["files"].items():
        found = {"mb": file["bytes"] / 1e6, "mean_kl": file["mean_kl"], "accuracy": file["accuracy"]}
        values |= {f"parity/{kind}/{key}": value for key, value in found.items()}
    return values


def adapter_misses(lora: AdapterFile) -> list[str]:
    """Return a line with figure, limit and likely causes when the LoRA is over its limit."""
    if lora["mean_kl"] <= lora["max_mean_kl"]:
        return []
    return [
        f"lora: mean KL {lora['mean_kl']:.2e} nats of the base with {ADAPTER} from the merged model; limit "
        f"{lora['max_mean_kl']:.2e}, that of f16 and [merge] max_mean_kl together. Likely causes: another base or "
        "revision; a scale other than lora_alpha / r, the only one that the file can hold (rank-stabilized LoRA, a "
        "pattern of ranks); an adapter on a tied embedding; weights beyond float16's range"
    ]


def misses(kind: str, figures: GgufFigures, max_lost_ends: int) -> list[str]:
    """Return a line with figure, limit and likely causes for each limit that the file of type `kind` misses."""
    file, lines = figures["files"][kind], []
    if not file["mean_kl"] <= file["max_mean_kl"]:
        if kind in ("f32", "f16", "bf16"):
            causes = (
                "tensors mapped or tied wrongly by the converter, another RoPE or attention setting, or weights beyond "
                "float16's range (then bf16 in [gguf] types instead of f16)"
            )
        else:
            causes = (
                "too few bits for this model: if the 16-bit file is close, take a larger type, or raise "
                f"[gguf.max_mean_kl] {kind}"
            )
        lines.append(
            f"{kind}: mean KL {file['mean_kl']:.2e} nats; limit {file['max_mean_kl']:.2e}. Likely causes: {causes}"
        )
    lost = figures["reference"]["ended"] - file["ended"]
    if lost > max_lost_ends:
        lines.append(
            f"{kind}: {file['ended']} of {figures['reference']['prompts']} completions end by themselves, against "
            f"{figures['reference']['ended']} in transformers; limit [gguf] max_lost_ends = {max_lost_ends}. Likely "
            f"causes: an end token that the file does not mark, or too few bits for this model"
        )
    return lines


if __name__ == "__main__":
    main()
