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
    """Raise `UserError` for a name in `[lora] target_modules` that no module of `model` has: PEFT ignores it.

    And for an embedding that is the output layer as well: an adapter changes one of the two uses, and merge both.
    """
    named = [name for name in recipe.lora.target_modules if name != "all-linear"]
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    for name in named:
        if name.rpartition(".")[2] not in found:
            experts = any(".experts." in parameter for parameter, _ in model.named_parameters())
            why = ". Its experts are one tensor each, and take no adapter" if experts else ""
            raise UserError(
                f"{recipe.path}: [lora] target_modules names {name!r}; {recipe.model.name} has no such "
                f"module{nearest(name, found)}; it has {', '.join(sorted(found - {''}))}{why}"
            )
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    both = [name for name, module in model.named_modules() if module is embedding or module is output]
    if len(both) == 2 and embedding.weight is output.weight:
        for name in named:
            if any(f".{module}".endswith(f".{name}") for module in both):
                raise UserError(
                    f"{recipe.path}: [lora] target_modules names {name!r}; in {recipe.model.name} input and output "
                    f"embedding are one matrix, and an adapter would change one of its two uses. Leave it out"
                )
