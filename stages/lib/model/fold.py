"""The adapter folded into its base: 16-bit safetensors with the tokenizer, as transformers 4 and 5 read them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.lib.ends import end_ids
from stages.lib.gguf.tokens import save_tokenizer
from stages.lib.model.reference import load_reference

if TYPE_CHECKING:
    from transformers import GenerationConfig

SHARD_SIZE = "5GB"
GRANITE_LAYERS = {"full_attention": "attention", "linear_attention": "mamba"}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # of transformers 4


def fold(base: Path, grpo: Path, dtype: str, out: Path) -> None:
    """Write to `out` the base with the adapter folded in (in float32, rounded once to `dtype`), and its tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(grpo / "tokenizer", trust_remote_code=False)
    model = PeftModel.from_pretrained(load_reference(base), grpo / "adapter").merge_and_unload(safe_merge=True)
    for parameter in reversed(list(model.parameters())):  # the embedding last: it is the largest, and needs a copy
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.generation_config.eos_token_id = end_ids(model.generation_config, tokenizer)
    model.generation_config = savable(model.generation_config)
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    write_rope_keys(out / "config.json")
    write_layer_types(out / "config.json")
    save_tokenizer(tokenizer, base, out)


def write_rope_keys(path: Path) -> None:
    """Add to the config.json at `path` the keys by which transformers 4, and what is built on it, reads RoPE.

    transformers 5 writes rope_parameters alone; 4 does not read that, and takes its own default without a word. A kind
    that 4 has not, as Gemma 4's, is left alone: beside such keys 5 can't read it either.
    """
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    stated = text.get("rope_parameters") or {}
    scaling = dict(stated.get("full_attention", stated))
    if scaling.get("rope_type", "default") not in ROPE_TYPES:
        return
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            text[name] = scaling.pop(name)
    if scaling:
        text["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    if "sliding_attention" in stated:
        text["rope_local_base_freq"] = stated["sliding_attention"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_layer_types(path: Path) -> None:
    """Put the words for the layers of a Granite 4 into the config.json at `path`, as it was published.

    transformers 5 reads these and writes others. transformers 4 and llama.cpp's converter count these alone.
    """
    config = json.loads(path.read_text())
    if config["model_type"] == "granitemoehybrid":
        config["layer_types"] = [GRANITE_LAYERS.get(kind, kind) for kind in config["layer_types"]]
        path.write_text(json.dumps(config, indent=2) + "\n")


def savable(stated: "GenerationConfig") -> "GenerationConfig":
    """Return `stated`, or only its token ids where transformers refuses to save it.

    It refuses contradictions such as a temperature without do_sample; older bases were published with these.
    """
    from transformers import GenerationConfig

    try:
        stated.validate(strict=True)
    except ValueError as error:
        click.echo(
            f"generation_config.json of the base contradicts itself; only its token ids are kept. {error}", err=True
        )
        ids = {name: getattr(stated, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**{name: of for name, of in ids.items() if isinstance(of, list) or (of or 0) >= 0})
    return stated
