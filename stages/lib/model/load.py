"""The base model and the trainable adapter, as the engine loads them."""

from pathlib import Path
from typing import Any

from stages.lib.model.files import fetching_model
from stages.lib.model.locate import SAFE, locate_model
from stages.lib.model.lora import adapted_modules, require_modules
from stages.lib.model.unsloth import load_unsloth
from stages.lib.recipe.tables import Recipe


def load_model(recipe: Recipe) -> Any:
    """Return the base model in the recipe's dtype, as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    name, revision = locate_model(recipe)
    dtype = getattr(torch, recipe.model.dtype)
    with fetching_model(name, revision):
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True, **SAFE)


def load_trainable(recipe: Recipe, adapter: Path | None) -> Any:
    """Return the base model with a LoRA adapter to train: a new one for SFT, or for GRPO that saved in `adapter`.

    `import_engine` comes first. Engine "unsloth" makes the model for sequences as long as the stage trains on and, for
    GRPO, with a vLLM engine on the same weights, as its attribute `vllm_engine`.
    """
    if recipe.model.engine == "unsloth":
        return load_unsloth(recipe, adapter)
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_model(recipe)
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    require_modules(recipe, model)
    settings = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=adapted_modules(recipe),
        bias="none",
        use_rslora=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)
