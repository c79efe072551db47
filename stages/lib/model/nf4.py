"""The merged model in bitsandbytes' NF4: what it needs, how it is made, and how far four bits are from sixteen."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.lib.distance import Text, compare_logits
from stages.lib.errors import UserError
from stages.lib.gguf.types import GGUF_TYPES
from stages.lib.model.reference import model_logits

MAX_MEAN_KL = GGUF_TYPES["q4_0"]  # nats; the plain 4-bit type's


def nf4_lacks() -> list[str]:
    """Return what bitsandbytes lacks here to quantize to 4 bits."""
    import torch

    missing = []
    if not torch.cuda.is_available():
        missing.append("torch sees no NVIDIA GPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes is not installed")
    return missing


def require_nf4(recipe: Path) -> None:
    """Raise `UserError` where bitsandbytes can't quantize to 4 bits."""
    if missing := nf4_lacks():
        raise UserError(
            f"{recipe}: save names 'merged_4bit', and {' and '.join(missing)}; expected a machine that has both, as "
            f"bitsandbytes makes NF4 weights on the GPU. Take it out of save, or run there: make merge"
        )


def load_nf4(folder: Path, dtype: str) -> Any:
    """Return the 16-bit model in `folder`, on the GPU, in bitsandbytes' NF4, doubly quantized (arXiv 2305.14314)."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=getattr(torch, dtype), device_map={"": 0}, trust_remote_code=False,
        use_safetensors=True,
    ).eval()  # fmt: skip


def write_nf4(merged: Path, out: Path, dtype: str, shard_size: str) -> None:
    """Write to `out` the model in the folder `merged` as `load_nf4` gives it.

    That is for loading in transformers or vLLM with less memory; it is never the source of anything else.
    """
    load_nf4(merged, dtype).save_pretrained(out, max_shard_size=shard_size)
    for path in merged.iterdir():  # the tokenizer's files, as they are
        if path.suffix != ".safetensors" and not (out / path.name).exists() and "index" not in path.name:
            shutil.copyfile(path, out / path.name)


def training_cost(base: Path, adapter: Path, dtype: str, stored: Path, texts: Sequence[Text]) -> dict[str, float]:
    """Return how far the adapter on its base in 4 bits, as it was trained, is from the logits `stored` of `texts`."""
    from peft import PeftModel

    return difference(PeftModel.from_pretrained(load_nf4(base, dtype), adapter).eval(), stored, texts)


def verify_nf4(folder: Path, stored: Path, texts: Sequence[Text]) -> dict[str, float]:
    """Return how far the 4-bit model saved in `folder`, loaded as any user would, is from the logits `stored`.

    Raises `UserError` when it is too far.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": 0}, trust_remote_code=False, use_safetensors=True
    ).eval()
    found = difference(model, stored, texts)
    if not found["mean_kl"] <= MAX_MEAN_KL:
        raise UserError(
            f"{folder}: mean KL {found['mean_kl']:.2e} nats from the adapter on its base; limit {MAX_MEAN_KL:.2e}. "
            f"Four bits are too few for this model: take 'merged_4bit' out of save"
        )
    return {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), **found}


def difference(model: Any, stored: Path, texts: Sequence[Text]) -> dict[str, float]:
    """Return `mean_kl` and `max_kl` (nats) and `same_top` of `compare_logits` for a transformers model."""
    found = compare_logits(stored, texts, model_logits(model, texts))
    return {name: found[name] for name in ("mean_kl", "max_kl", "same_top")}
