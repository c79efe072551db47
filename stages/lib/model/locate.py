"""Where a recipe's model comes from: a folder, the hub, or the base-model stage."""

from pathlib import Path

from stages.lib.errors import UserError
from stages.lib.recipe.tables import Model, is_hub_name

SAFE = {"trust_remote_code": False}  # no code out of a model repository ever runs here


def locate_model(model: Model, base_model: Path | None) -> tuple[str, str | None]:
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
