"""The base model and the trainable adapter, as the engine loads them."""

from pathlib import Path
from typing import Any

from stages.lib.model.files import fetching_model
from stages.lib.model.locate import SAFE, locate_model
from stages.lib.model.lora import lora_settings, require_modules
from stages.lib.model.network import network_class, outside_text
from stages.lib.model.unsloth import load_unsloth
from stages.lib.recipe.tables import Recipe


def load_model(recipe: Recipe) -> Any:
    """Return the base model in the recipe's dtype, as transformers loads it."""
    import torch

    name, revision = locate_model(recipe)
    dtype = getattr(torch, recipe.model.dtype)
    with fetching_model(name, revision):
        network = network_class(name, revision)
        return network.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True, **SAFE)


def load_trainable(recipe: Recipe, adapter: Path | None) -> Any:
    """Return the base model with a LoRA adapter to train: the one saved in `adapter` (GRPO), or a new one (SFT).

    Call `import_engine` first. For GRPO, Unsloth's model has a vLLM engine on the same weights, its `vllm_engine`.
    """
    if recipe.model.engine == "unsloth":
        return load_unsloth(recipe, adapter)
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_model(recipe)
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    require_modules(recipe, model)
    settings = lora_settings(recipe) | {"exclude_modules": outside_text(model)}
    return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
