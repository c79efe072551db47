"""Where a recipe's model comes from: a folder, the hub, or the base-model stage."""

from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe

SAFE = {"trust_remote_code": False}  # no code out of a model repository ever runs here


def locate_model(recipe: Recipe) -> tuple[str, str | None]:
    """Return what `from_pretrained` takes: a folder or hub name, and the hub revision (None for a folder).

    Raises `UserError` when there is no such model folder or it lacks the weights' configuration.
    """
    name, folder = recipe.model.name, recipe.model_folder
    if folder is None:
        if name == "base-model":
            raise UserError("the recipe's model is the one that base-model makes; name it with --base-model FOLDER")
        return name, recipe.model.revision
    if name != "base-model" and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a model folder with config.json, from the recipe's [model] name")
    return str(folder), None
