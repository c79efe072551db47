"""Fold the adapter into the base model, as 16-bit safetensors, and prove that the result is the trained model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import click

from stages.lib import options
from stages.lib.artifact.folder import write_artifact
from stages.lib.distance import Text, compare_logits, spread_positions, store_logits
from stages.lib.ends import end_ids, verify_end
from stages.lib.errors import UserError
from stages.lib.jsonl import first_rows
from stages.lib.model.files import (
    local_model_folder,
    model_config,
    model_folder,
    parameter_count,
    refuse_quantized,
    vocabulary_size,
    weight_shapes,
    whole_model_folder,
)
from stages.lib.model.fold import SHARD_SIZE, fold
from stages.lib.model.locate import local_model, locate_model
from stages.lib.model.nf4 import nf4_lacks, require_nf4, training_cost, verify_nf4, write_nf4
from stages.lib.model.reference import load_reference, model_logits
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Merge
from stages.lib.report import terminal
from stages.lib.report.figures import FourBitDistance, MergeFigures

REFERENCE = "adapter-on-base.npy"  # among the checkpoints: the logits to compare with


@click.command(help=__doc__)
@options.recipe
@options.reads("grpo")
@options.reads("prepare-data")
@options.base_model
@options.out
def main(recipe: Path, grpo: Path, prepare_data: Path, base_model: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe, base_model)
    name, revision = locate_model(run_recipe)
    inputs = {"grpo": (grpo, ["adapter/*", "tokenizer/*"]), "prepare-data": (prepare_data, ["eval.jsonl"])}
    inputs |= {"base-model": (base_model, ["model/*"])} if base_model else {}
    four_bits = "merged_4bit" in run_recipe.save
    room = room_bytes(local_model_folder(name, revision), run_recipe.merge, four_bits=four_bits)
    tables = run_recipe.tables("model", "merge") | ({"save": ["merged_4bit"]} if four_bits else {})
    sources = local_model(run_recipe)
    with write_artifact(out, "merge", tables, inputs, sources=sources, room_bytes=room) as run:
        knobs = run_recipe.merge
        if four_bits:
            require_nf4(recipe)
        rows = first_rows(prepare_data / "eval.jsonl", knobs.prompts, "[merge] prompts")
        base = model_folder(name, revision)
        if revision and not any(base.glob("*.safetensors")):  # trained on another machine, or the cache is empty
            base = whole_model_folder(name, revision)
        refuse_quantized(base, "merge")
        fold(base, grpo, knobs.dtype, run.folder / "model")
        run.checkpoints.mkdir(exist_ok=True)
        figures = verify(base, grpo, run.folder / "model", rows, knobs, run.checkpoints)
        reference = run.checkpoints / REFERENCE, texts_of(run.folder / "model", rows, knobs.positions_per_prompt)
        if run_recipe.model.load_in_4bit and not nf4_lacks():
            cost = training_cost(base, grpo / "adapter", knobs.dtype, *reference)
            figures["trained_in_4bit"] = cast(FourBitDistance, cost)
        if four_bits:
            write_nf4(run.folder / "model", run.folder / "model-4bit", knobs.dtype, SHARD_SIZE)
            figures["merged_4bit"] = cast(FourBitDistance, verify_nf4(run.folder / "model-4bit", *reference))
        run.metrics.update(figures)
    click.echo(terminal.merge(figures))


def room_bytes(base: Path | None, knobs: Merge, *, four_bits: bool = False) -> int:
    """Return the bytes that a merge writes at most: weights (2 x for `four_bits`), tokenizer, logits; 0: unknown."""
    if base is None or not any(base.glob("*.safetensors")):
        return 0
    tokenizer = sum(path.stat().st_size for path in base.iterdir() if path.is_file() and path.suffix != ".safetensors")
    logits = 2 * knobs.prompts * knobs.positions_per_prompt * vocabulary_size(base) * 4
    model = 2 * parameter_count(base) + 2 * tokenizer + 1_000_000
    return model * (2 if four_bits else 1) + logits


def verify(base: Path, grpo: Path, merged: Path, rows: Sequence[dict], knobs: Merge, scratch: Path) -> MergeFigures:
    """Return the distances of the model saved in `merged`, and of the base, from the adapter on its base.

    Next-token distributions are compared at positions spread over the prompts of `rows` and their completions. Raises
    `UserError`, with the cause, when merged is not the trained model.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    verify_tokenizer(AutoTokenizer.from_pretrained(base, trust_remote_code=False), tokenizer, merged)
    verify_end(tokenizer, end_ids(GenerationConfig.from_pretrained(merged)), str(merged / "generation_config.json"))
    texts = texts_of(merged, rows, knobs.positions_per_prompt)
    if cause := untied_cause(base, merged):
        raise UserError(f"{merged}: is not the trained model. Cause: {cause}")

    logits = scratch / REFERENCE
    model = PeftModel.from_pretrained(load_reference(base), grpo / "adapter").eval()
    store_logits(logits, texts, model.config.get_text_config().vocab_size, model_logits(model, texts))
    with model.disable_adapter():
        from_base = compare_logits(logits, texts, model_logits(model, texts))
    del model  # both models may not fit in memory
    difference = compare_logits(logits, texts, model_logits(load_reference(merged), texts))  # loaded as by a user

    limit = knobs.max_mean_kl
    if not from_base["mean_kl"] > limit:
        raise UserError(
            f"{grpo / 'adapter'}: does next to nothing: mean KL {from_base['mean_kl']:.2e} nats between the base with "
            f"it and without; expected more than [merge] max_mean_kl = {limit:.2e}, or a merge can't be proven. Look "
            f"at the training's loss and reward, or lower the limit"
        )
    if not difference["mean_kl"] <= limit:
        cause = find_cause(base, grpo, merged, texts, limit, scratch)
        raise UserError(
            f"{merged}: is not the trained model: mean KL {difference['mean_kl']:.2e} nats from the adapter on its "
            f"base over {difference['positions']:,} positions; expected at most [merge] max_mean_kl = "
            f"{limit:.2e}. Cause: {cause}"
        )
    return {
        "prompts": len(texts),
        "positions": difference["positions"],
        "merged_mean_kl": difference["mean_kl"],
        "merged_max_kl": difference["max_kl"],
        "merged_same_top": difference["same_top"],
        "base_mean_kl": from_base["mean_kl"],
        "parameters": parameter_count(merged),
        "bytes": sum(path.stat().st_size for path in merged.glob("*.safetensors")),
    }


def texts_of(model: Path, rows: Sequence[dict], positions: int) -> list[Text]:
    """Return the prompts of `rows`, with completions if any, as tokens, with at most `positions` positions each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    texts = []
    for row in rows:
        completion = row.get("completion")
        tokens = tokenizer.apply_chat_template(
            row["prompt"] + (completion or []), add_generation_prompt=completion is None, return_dict=False
        )
        texts.append(Text(tokens, spread_positions(len(tokens), positions)))
    return texts


def verify_tokenizer(base: Any, merged: Any, folder: Path) -> None:
    """Raise `UserError` when a token of the base has another id, so another embedding, in the merged model."""
    ids = merged.get_vocab()
    for token, number in base.get_vocab().items():
        if ids.get(token) != number:
            raise UserError(
                f"{folder}: its tokenizer has a shifted id: {token!r} is {ids.get(token, 'missing')}; expected "
                f"{number}, as in the base. Delete the grpo and sft artifacts' tokenizer and run: make sft grpo merge"
            )


def find_cause(base: Path, grpo: Path, merged: Path, texts: Sequence[Text], limit: float, scratch: Path) -> str:
    """Return why `merged` is not the adapter on its base, by trying the usual faults."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if cause := touched_cause(base, grpo):
        return cause
    logits = scratch / "merged.npy"
    model = load_reference(merged)
    store_logits(logits, texts, model.config.get_text_config().vocab_size, model_logits(model, texts))
    del model
    adapter_model = PeftModel.from_pretrained(load_reference(base), grpo / "adapter").eval()
    with adapter_model.disable_adapter():
        if compare_logits(logits, texts, model_logits(adapter_model, texts))["mean_kl"] <= limit:
            return "the adapter was not applied: merged equals the base"
    for module in adapter_model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: 2 * scale for name, scale in module.scaling.items()}
    if compare_logits(logits, texts, model_logits(adapter_model, texts))["mean_kl"] <= limit:
        return "the adapter was applied twice"
    return (
        "unknown; likely an adapter trained on another base or revision, a base trained in 4 bits and merged in 16, or "
        "weights too large for the merge's dtype (then bfloat16 in [merge] dtype)"
    )


def untied_cause(base: Path, merged: Path) -> str | None:
    """Return how the base's tied embeddings came apart, or None; by the files, as transformers may tie them again."""
    if has_output_layer(base) or not model_config(base).get("tie_word_embeddings", True):
        return None
    if has_output_layer(merged) or not model_config(merged).get("tie_word_embeddings", True):
        return (
            "tied embeddings broken: the base has one matrix for input and output embedding, merged has an output "
            "layer of its own"
        )
    return None


def touched_cause(base: Path, grpo: Path) -> str | None:
    """Return that the adapter changes one of two tied embeddings, None if it does not."""
    settings = json.loads((grpo / "adapter" / "adapter_config.json").read_text())
    named = {*(settings.get("target_modules") or []), *(settings.get("modules_to_save") or [])}
    touched = sorted(name for name in named if name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"))
    if not touched or has_output_layer(base):
        return None
    return (
        f"tied embeddings broken: the adapter changes {', '.join(touched)}, and in the base input and output embedding "
        f"are one matrix. Leave them out of [lora] target_modules"
    )


def has_output_layer(folder: Path) -> bool:
    """Return whether the weights in `folder` have an output layer of their own."""
    return any(name.endswith("lm_head.weight") for name in weight_shapes(folder))


if __name__ == "__main__":
    main()
