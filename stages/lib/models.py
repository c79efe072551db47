"""Where a recipe's model comes from, and how it and its tokenizer are loaded."""

from pathlib import Path
from typing import Any

from stages.lib import formats
from stages.lib.errors import UserError
from stages.lib.recipe import Model, Recipe, is_hub_name

SAFE = {"trust_remote_code": False}  # no code out of a model repository ever runs here


def locate(model: Model, base_model: Path | None) -> tuple[str, str | None]:
    """Return what `from_pretrained` takes: a folder or hub name, and the hub revision (None for a folder).

    `base_model` is the finished artifact of the base-model stage, for recipes that make their own.
    Raises `UserError` when there is no such model folder or it lacks the weights' configuration.
    """
    if model.name == "base-model":
        if base_model is None:
            raise UserError("the recipe's model is the one that base-model makes; name it with --base-model FOLDER")
        return str(base_model / "model"), None
    if is_hub_name(model.name):
        return model.name, model.revision
    folder = Path(model.name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a model folder with config.json, from the recipe's [model] name")
    return str(folder), None


def load_tokenizer(recipe: Recipe, base_model: Path | None) -> Any:
    """Return the model's tokenizer with the chat template that this run trains and ships.

    Raises `UserError` when a local model folder has no tokenizer, or when neither model nor format has a chat template.
    """
    from transformers import AutoTokenizer

    name, revision = locate(recipe.model, base_model)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise UserError(f"{name}: the model folder has no tokenizer; expected one of {', '.join(files)}")
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **SAFE)
    template = formats.get(recipe.format.name).chat_template
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name}: the tokenizer has no chat template and format {recipe.format.name!r} brings none; "
            f"choose an instruction-tuned model, or [format] name = 'think'"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: Recipe, base_model: Path | None, adapter: Path | None = None, *, trainable: bool = False) -> Any:
    """Return the model in the recipe's dtype, with `adapter` on it if there is one.

    Raises `UserError` for an engine that this version does not have.
    """
    if recipe.model.engine != "trl":
        raise UserError(
            f"{recipe.path}: [model] engine = {recipe.model.engine!r} is not in this version, and nothing else takes its "
            f"place unasked. Set engine = 'trl'"
        )
    import torch
    from transformers import AutoModelForCausalLM

    name, revision = locate(recipe.model, base_model)
    dtype = getattr(torch, recipe.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True, **SAFE)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the token ids at which a completion ends: those of the generation config, and the tokenizer's own."""
    stated = model.generation_config.eos_token_id
    stated = [] if stated is None else [stated] if isinstance(stated, int) else stated
    return sorted({*stated, tokenizer.eos_token_id})
