"""Findings on a local copy of the model, in the hub's cache or a folder: its shape, and its tokenizer in llama.cpp."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stages.lib import modelscope
from stages.lib.errors import UserError
from stages.lib.machine.disk import ARTIFACTS, CONTAINER_CACHE
from stages.lib.machine.findings import Finding
from stages.lib.machine.shape import SHAPES, Shape, shape_of_config
from stages.lib.model.files import model_config, weight_files
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe, is_hub_name

TOKENIZER_SECONDS = 9  # from the doctor's start


def hub_cache(in_container: bool) -> Path:
    """Return the folder where huggingface_hub keeps downloads: by its own variables, or as docker/run sets them."""
    if in_container:
        return CONTAINER_CACHE / "huggingface" / "hub"
    return Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()


def hub_home() -> Path:
    """Return the folder of huggingface_hub's cache and login, by its own variables."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface")


def model_place(recipe: Recipe, cache: Path) -> Path:
    """Return the folder where the recipe's model is, or would be once it is fetched to the hub's `cache`, or made."""
    name = recipe.model.name
    if name == "base-model":
        return ARTIFACTS / recipe.path.stem / "base-model" / "model"
    if is_hub_name(name) and recipe.model.hub:
        return modelscope.copy_folder("models", name, recipe.model.revision)
    if is_hub_name(name):
        return cache / f"models--{name.replace('/', '--')}" / "snapshots" / recipe.model.revision
    return Path(name)


def local_model(recipe: Recipe, cache: Path) -> Path | None:
    """Return the folder with the whole model, the recipe's own or one in the hub's `cache`; None if there is none."""
    folder = model_place(recipe, cache)
    return folder if is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Return whether `folder` has config.json and every safetensors file that its index names."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except UserError:
        return False


def shape_of_model(recipe: Recipe, model: Path | None) -> tuple[Shape | None, str]:
    """Return the shape of the recipe's model, from its config.json or `SHAPES`, and ""; or None, and why not."""
    if model is not None:
        try:
            return shape_of_config(model_config(model), str(model)), ""
        except UserError as error:
            return None, error.message
    known = SHAPES.get(recipe.model.name)
    return known, "" if known else f"there is no copy of {recipe.model.name} here to read config.json from"


def start_tokenizer_check(recipe: Recipe, model: Path | None, cache: Path) -> subprocess.Popen | None:
    """Start `read_tokenizer` in a process of its own; None where there is no model or no llama.cpp."""
    if model is None or not has_packages("transformers", "llama_cpp"):
        return None
    code = f"from stages.lib.machine import copies; copies.read_tokenizer({str(recipe.path)!r}, {str(model)!r})"
    return start_python(code, cache)


def has_packages(*names: str) -> bool:
    """Return whether llama.cpp's converter and the packages `names` are installed beside this Python."""
    converter = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"
    return converter.is_file() and all(importlib.util.find_spec(name) for name in names)


def start_python(code: str, cache: Path) -> subprocess.Popen:
    """Start Python on `code`, with the hub's `cache` and no network, in a session of its own; return the process."""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}, start_new_session=True,
    )  # fmt: skip


def read_tokenizer(path: str, model: str) -> None:
    """Exit with 1 and a message if llama.cpp can't take the tokenizer of the recipe at `path`; its model is in `model`.

    Runs in a process of its own, without torch: tokenizers need none.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's sign for a module that can't be imported
    from stages.lib.gguf.tokens import check_conversion
    from stages.lib.model.tokenizer import load_tokenizer

    recipe = read_recipe(Path(path), ARTIFACTS / Path(path).stem / "base-model")
    try:
        check_conversion(load_tokenizer(recipe), Path(model), recipe.model.name)
    except UserError as error:
        sys.exit(error.message)


def tokenizer_finding(process: subprocess.Popen | None, recipe: Recipe, deadline: float) -> Finding:
    """Return the result of `start_tokenizer_check` at `deadline`, in seconds of the monotonic clock."""
    later = f"make prepare-data RECIPE={recipe.path.stem} checks it before any training"
    if process is None:
        return Finding("ok", "tokenizer", f"not checked: no copy of the model or no llama.cpp here; {later}")
    output = output_until(process, deadline)
    if output is None:
        return Finding("warn", "tokenizer", "the check took too long and was ended", f"nothing: {later}")
    if process.returncode:
        lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
        found = lines[-1] if lines[0].startswith("Traceback") else " ".join(output.split())[:600]
        return Finding("fail", "tokenizer", found, "use another base model, or see docs/recipes.md")
    return Finding("ok", "tokenizer", "llama.cpp reads text and chat template as transformers does")


def output_until(process: subprocess.Popen, deadline: float) -> str | None:
    """Return what `process` of `start_python` said by its end; None where it was ended at `deadline`, monotonic s."""
    try:
        output: str = process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
        return output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the converter it started as well
        process.wait()
        return None
