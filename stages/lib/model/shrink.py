"""A small copy of a model: its own config.json with small sizes, random weights, its own vocabulary and tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from stages.lib.model.files import model_config
from stages.lib.model.locate import MODEL_SUFFIXES, SAFE
from stages.lib.model.network import network_class

# Sizes that a small copy states, by the names of transformers' configs; a head's own size, windows and RoPE stay.
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "block_dim": 64, "block_ff_dim": 64,
    "conv_dim": 64, "conv_dim_out": 64, "moe_intermediate_size": 32, "shared_intermediate_size": 64,
    "shared_expert_intermediate_size": 32, "hidden_size_per_layer_input": 8, "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "experts_per_token": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "mamba_chunk_size": 32,
}  # fmt: skip
# Of the parts that read images or sound, which no stage runs.
OTHER_SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "depth": 1, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "out_hidden_size": 64,
    "deepstack_visual_indexes": [], "num_position_embeddings": 256, "position_embedding_size": 256, "image_size": 56,
}  # fmt: skip


def write_small_copy(base: Path, out: Path) -> None:
    """Write to `out` the model in `base` made small, in bfloat16: config.json and the tokenizer's files are its own.

    Of `base` no weight is read. Raises what transformers raises for sizes that make no network.
    """
    import torch
    import transformers

    out.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and path.suffix in MODEL_SUFFIXES and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copyfile(path, out / path.name)
    published = small_config(base)
    (out / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    made_by = getattr(transformers, (published.get("architectures") or [""])[0], None)
    small = transformers.AutoConfig.from_pretrained(out, **SAFE)
    if "tie_word_embeddings" not in published:  # transformers' own default for Mistral 3 holds for its smallest alone
        small.tie_word_embeddings = small.get_text_config().tie_word_embeddings
    torch.manual_seed(0)
    model = made_by(small) if made_by else network_class(out).from_config(small)
    width = small.get_text_config().hidden_size
    with torch.no_grad():  # as published weights do, random ones have to tell one token from another
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.64 / width**0.5)
    stated = out / "generation_config.json"
    own = stated.read_bytes() if stated.is_file() else None
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    if own is not None:
        stated.write_bytes(own)


def small_config(base: Path) -> dict[str, Any]:
    """Return config.json of the model in `base` with small sizes, in the words in which it was published."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(base, **SAFE)
    published = model_config(base)
    text_part = published.get("text_config", published)
    text_part |= small_sizes(config.get_text_config().to_dict(), text_part)
    for name, part in published.items():
        if name.endswith("_config") and name != "text_config" and isinstance(part, dict):
            part |= {key: size for key, size in OTHER_SIZES.items() if key in part}
    return published


def small_sizes(known: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a text model's config.json that a small copy states otherwise.

    `known` are all its values as transformers has them, `stated` those of config.json: what it does not state, and has
    a default, stays away where it can. Layers are cut to the first that have every kind of layer, and so is a list with
    an entry a layer.
    """
    values = known | stated
    layers = values["num_hidden_layers"]
    a_layer = {name: of for name, of in values.items() if isinstance(of, list) and len(of) == layers > 1}
    count, shared = layers_with_every_kind(values, a_layer), values.get("num_kv_shared_layers")
    sizes: dict[str, Any] = {name: value for name, value in a_layer.items() if name in stated}
    for name, most in SIZES.items():
        value = sizes.get(name, values.get(name))
        if value:
            sizes[name] = [min(each, most) for each in value] if isinstance(value, list) else min(value, most)
    heads = values["num_attention_heads"]
    quotient = values["hidden_size"] // heads
    if not stated.get("head_dim") and known.get("head_dim") in (None, quotient):
        sizes["hidden_size"] = 2 * quotient  # of which a head's size is half
    sizes |= head_counts(heads, values) | mamba_heads(sizes["hidden_size"], values)
    if shared:
        sizes["num_kv_shared_layers"] = count
        count *= 2
    sizes["num_hidden_layers"] = min(count, layers)
    if "per_layer_config" in stated:
        sizes["per_layer_config"] = {
            number: {key: min(value, 1) if key == "num_key_value_heads" else value for key, value in own.items()}
            for number, own in stated["per_layer_config"].items()
            if int(number) < sizes["num_hidden_layers"]
        }
    return {name: value[: sizes["num_hidden_layers"]] if name in a_layer else value for name, value in sizes.items()}


def layers_with_every_kind(values: dict[str, Any], a_layer: dict[str, list]) -> int:
    """Return how many of the first layers have every kind of layer, at least 2; `a_layer` has lists of an entry each.

    A layer's kind is its entries. Where the first layers are dense and the others have experts, one more than those.
    """
    layers = values["num_hidden_layers"]
    kinds = list(zip(*a_layer.values(), strict=True)) or [()] * layers
    seen = next(n for n in range(1, layers + 1) if {*map(str, kinds[:n])} == {*map(str, kinds)})
    dense = values.get("first_k_dense_replace") or values.get("num_dense_layers") or 0
    return min(max(seen, dense + 1, 2), layers)


def head_counts(heads: int, values: dict[str, Any]) -> dict[str, int]:
    """Return the counts of attention heads: 2, with one key and value head for both where `values` share them too."""
    shared = {"num_attention_heads": 2}
    if groups := values.get("num_key_value_heads"):
        shared["num_key_value_heads"] = 2 if groups == heads else 1
    if values.get("num_global_key_value_heads"):
        shared["num_global_key_value_heads"] = 1
    return shared


def mamba_heads(width: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return the count of Mamba heads that `width` asks for: their columns are mamba_expand times the width."""
    columns, head = values.get("mamba_n_heads") and values["mamba_expand"] * width, values.get("mamba_d_head")
    if not columns:
        return {}
    return {"mamba_n_heads": columns // head if isinstance(head, int) else 2, "mamba_n_groups": 1}
