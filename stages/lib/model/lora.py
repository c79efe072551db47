"""A new LoRA adapter: its settings, and the modules it sits on."""

from typing import Any

from stages.lib.errors import UserError, nearest
from stages.lib.recipe.tables import Recipe


def lora_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments that PEFT's LoraConfig and Unsloth's get_peft_model share."""
    lora = recipe.lora
    modules = "all-linear" if lora.target_modules == ["all-linear"] else lora.target_modules
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return settings | {"target_modules": modules, "bias": "none", "use_rslora": False}


def require_modules(recipe: Recipe, model: Any) -> None:
    """Raise `UserError` for a name in `[lora] target_modules` that no module of `model` has: PEFT ignores it."""
    named = [name for name in recipe.lora.target_modules if name != "all-linear"]
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    for name in named:
        if name.rpartition(".")[2] not in found:
            raise UserError(
                f"{recipe.path}: [lora] target_modules names {name!r}; {recipe.model.name} has no such "
                f"module{nearest(name, found)}; it has {', '.join(sorted(found - {''}))}"
            )
