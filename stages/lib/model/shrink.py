"""A small copy of a model: its own config.json with small sizes, random weights, its own vocabulary and tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from stages.lib.model.files import model_config
from stages.lib.model.locate import MODEL_SUFFIXES, SAFE

# Sizes that a small copy states, by the names of transformers' configs; a head's own size, windows and RoPE stay.
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "block_dim": 64, "block_ff_dim": 64,
    "conv_dim": 64, "moe_intermediate_size": 32, "shared_intermediate_size": 64, "shared_expert_intermediate_size": 32,
    "hidden_size_per_layer_input": 8, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "mamba_n_heads": 2, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_expand": 2,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2,
}  # fmt: skip
# Of the part that reads images or sound, which no stage runs.
OTHER_SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "depth": 1, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "out_hidden_size": 64,
    "deepstack_visual_indexes": [], "num_position_embeddings": 256, "position_embedding_size": 256, "image_size": 56,
}  # fmt: skip
MAX_LAYERS = 16


def write_small_copy(base: Path, out: Path) -> None:
    """Write to `out` the model in `base` made small, in bfloat16: config.json and the tokenizer's files are its own.

    Of `base` no weight is read. Raises what transformers raises for a config.json that it can't make a network of.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(base, **SAFE)
    published = model_config(base)
    out.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and path.suffix in MODEL_SUFFIXES and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copyfile(path, out / path.name)
    text_part = published.get("text_config", published)
    text_part |= small_sizes(config.get_text_config(), text_part)
    for name, part in published.items():
        if name in ("vision_config", "audio_config") and part:
            part |= {key: size for key, size in OTHER_SIZES.items() if key in part}
    (out / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    small = transformers.AutoConfig.from_pretrained(out, **SAFE)
    made_by = getattr(transformers, (published.get("architectures") or [""])[0], None)
    torch.manual_seed(0)
    model = made_by(small) if made_by else transformers.AutoModelForCausalLM.from_config(small)
    with torch.no_grad():  # as published weights do, random ones have to tell one token from another
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.08)
    stated = out / "generation_config.json"
    own = stated.read_bytes() if stated.is_file() else None
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    if own is not None:
        stated.write_bytes(own)


def small_sizes(config: Any, stated: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a text model's config.json that a small copy states otherwise than `config`, transformers'.

    Layers are cut to the first that have every kind of layer, a list with an entry a layer as well. `stated` is the
    text part of config.json: what it does not state and has transformers' default, stays away where it can.
    """
    sizes = {name: min(size, getattr(config, name)) for name, size in SIZES.items() if getattr(config, name, None)}
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    sizes["num_attention_heads"] = 2
    if groups:
        sizes["num_key_value_heads"] = 2 if groups == heads else 1
    if getattr(config, "num_global_key_value_heads", None):
        sizes["num_global_key_value_heads"] = 1
    if not getattr(config, "head_dim", None):  # then it is this quotient
        sizes["hidden_size"] = 2 * (config.hidden_size // heads)
    layers, shared = config.num_hidden_layers, getattr(config, "num_kv_shared_layers", None)
    a_layer = {
        name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == layers > 1
    }
    kinds = list(zip(*a_layer.values(), strict=True)) or [()] * layers
    dense = getattr(config, "first_k_dense_replace", None) or getattr(config, "num_dense_layers", None) or 0
    count = max(next(n for n in range(1, layers + 1) if {*kinds[:n]} == {*kinds}), dense + 1, 2)
    if shared:
        sizes["num_kv_shared_layers"] = count
        count *= 2
    count = min(count, layers)
    sizes["num_hidden_layers"] = count
    return sizes | {name: value[:count] for name, value in a_layer.items() if name in stated}
