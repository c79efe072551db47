"""Where a recipe's model comes from: a folder, the hub, or the base-model stage."""

from pathlib import Path

from stages.lib import modelscope
from stages.lib.errors import UserError
from stages.lib.model.headers import AGAIN, MAX_JSON_BYTES
from stages.lib.recipe.tables import Recipe

MODEL_SUFFIXES = (".jinja", ".json", ".model", ".safetensors", ".txt")  # of a model's files that are read
SAFE = {"trust_remote_code": False}  # no code from a model repository ever runs here


def locate_model(recipe: Recipe) -> tuple[str, str | None]:
    """Return folder or hub name, and revision (None: a folder); a model of ModelScope is fetched to a folder.

    Raises `UserError` for a folder without config.json, and for what ModelScope does not give.
    """
    name, folder = recipe.model.name, recipe.model_folder
    if folder is None:
        if name == "base-model":
            raise UserError("[model] name = 'base-model': expected the folder of that stage. Add --base-model FOLDER")
        if recipe.model.hub == "modelscope":
            return str(modelscope.fetch("models", name, recipe.model.revision, files_to_read)), None
        return name, recipe.model.revision
    if name != "base-model" and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a model folder with config.json, from the recipe's [model] name")
    return str(folder), None


def files_to_read(paths: list[str], folder: Path) -> list[str]:
    """Return those files of a repository that are read: the model's own, not Mistral's weights a second time."""
    tops = [path for path in paths if "/" not in path and not path.startswith(("consolidated", "."))]
    return [path for path in tops if Path(path).suffix in MODEL_SUFFIXES]


def local_model(recipe: Recipe) -> dict[str, Path]:
    """Return the folder of a local model and its files, by name, for `sources`; {} for one of the hub or base-model.

    Raises `UserError` for a file, other than weights, that is too large to be read whole.
    """
    if recipe.model_folder is None or recipe.model.name == "base-model":
        return {}
    folder = Path(locate_model(recipe)[0])
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_SUFFIXES)
    for path in files:
        if path.suffix != ".safetensors" and path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(
                f"{path}: has {path.stat().st_size:,} bytes; expected at most {MAX_JSON_BYTES:,} of a file that is "
                f"read whole. {AGAIN}"
            )
    return {"model": folder} | {f"model {path.name}": path for path in files}
