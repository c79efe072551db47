"""The merged model in bitsandbytes' NF4: what it needs, how it is made, and its distance from 16 bits."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.lib.distance import Text, compare_logits
from stages.lib.errors import UserError
from stages.lib.gguf.types import GGUF_TYPES
from stages.lib.model.network import network_class
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
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return network_class(folder).from_pretrained(
        folder, quantization_config=settings, dtype=getattr(torch, dtype), device_map={"": 0}, trust_remote_code=False,
        use_safetensors=True,
    ).eval()  # fmt: skip


def write_nf4(merged: Path, out: Path, dtype: str, shard_size: str) -> None:
    """Write the model in the folder `merged` in NF4 to `out`, for transformers and vLLM with less memory."""
    load_nf4(merged, dtype).save_pretrained(out, max_shard_size=shard_size)
    for path in merged.iterdir():  # the tokenizer's files
        if path.suffix != ".safetensors" and not (out / path.name).exists() and "index" not in path.name:
            shutil.copyfile(path, out / path.name)


def training_cost(base: Path, adapter: Path, dtype: str, reference: Path, texts: Sequence[Text]) -> dict[str, float]:
    """Return the distance of the adapter on its 4-bit base, as in training, from the logits `reference` of `texts`."""
    from peft import PeftModel

    return difference(PeftModel.from_pretrained(load_nf4(base, dtype), adapter).eval(), reference, texts)


def verify_nf4(folder: Path, reference: Path, texts: Sequence[Text]) -> dict[str, float]:
    """Return the distance of the saved 4-bit model from the logits `reference`. Raises `UserError` over MAX_MEAN_KL."""
    model = (
        network_class(folder)
        .from_pretrained(folder, device_map={"": 0}, trust_remote_code=False, use_safetensors=True)
        .eval()
    )
    distance = difference(model, reference, texts)
    if not distance["mean_kl"] <= MAX_MEAN_KL:
        raise UserError(
            f"{folder}: mean KL {distance['mean_kl']:.2e} nats from the adapter on its base; expected at most "
            f"{MAX_MEAN_KL:.2e}. Four bits are too few for this model: take 'merged_4bit' out of save"
        )
    return {"bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), **distance}


def difference(model: Any, reference: Path, texts: Sequence[Text]) -> dict[str, float]:
    """Return `mean_kl` and `max_kl` (nats) and `same_top` of `compare_logits` for a transformers model."""
    distance = compare_logits(reference, texts, model_logits(model, texts))
    return {name: distance[name] for name in ("mean_kl", "max_kl", "same_top")}
