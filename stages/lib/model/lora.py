"""The modules that a LoRA adapter sits on."""

from typing import Any

from stages.lib.errors import UserError, nearest
from stages.lib.recipe.tables import Recipe


def adapted_modules(recipe: Recipe) -> str | list[str]:
    """Return PEFT's `target_modules`: its word for all linear layers, or the recipe's list."""
    modules = recipe.lora.target_modules
    return "all-linear" if modules == ["all-linear"] else modules


def require_modules(recipe: Recipe, model: Any) -> None:
    """Raise `UserError` for a name among `[lora] target_modules` that no module of `model` has: PEFT passes over it."""
    named = [name for name in recipe.lora.target_modules if name != "all-linear"]
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    for name in named:
        if name.rpartition(".")[2] not in found:
            raise UserError(
                f"{recipe.path}: [lora] target_modules names {name!r}, and {recipe.model.name} has no such "
                f"module{nearest(name, found)}; it has {', '.join(sorted(found - {''}))}"
            )
