"""Where a recipe's model comes from: a folder, the hub, or the base-model stage."""

from pathlib import Path

from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe

MODEL_SUFFIXES = (".jinja", ".json", ".model", ".safetensors", ".txt")  # of what is read of a model's folder
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


def local_model(recipe: Recipe) -> dict[str, Path]:
    """Return the folder of a model on this disk and the files in it, by name: what a stage reads from outside.

    Nothing for a hub's model, which its revision states, and for the one that base-model makes.
    """
    if recipe.model_folder is None or recipe.model.name == "base-model":
        return {}
    folder = Path(locate_model(recipe)[0])
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_SUFFIXES)
    return {"model": folder} | {f"model {path.name}": path for path in files}
