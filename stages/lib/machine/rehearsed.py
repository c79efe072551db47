"""The finding on the model itself: prepare-data's checks of it and the rehearsal, where their packages are."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from stages.lib.errors import UserError
from stages.lib.machine.copies import has_packages, model_place, output_until, start_python
from stages.lib.machine.disk import ARTIFACTS
from stages.lib.machine.findings import Finding
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report import terminal

REHEARSAL_SECONDS = 90  # from the doctor's start; on an idle machine it takes 6 to 20
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def start_rehearsal(recipe: Recipe, cache: Path) -> subprocess.Popen | None:
    """Start `run_rehearsal` in a process of its own; None without a model's config.json, a tokenizer or the packages.

    It reads no weights, so a copy without them will do.
    """
    folder = model_place(recipe, cache)
    there = (folder / "config.json").is_file() and any((folder / name).is_file() for name in TOKENIZERS)
    if not recipe.model.rehearsal or not there or not has_packages("torch", "transformers", "peft", "llama_cpp"):
        return None
    code = f"from stages.lib.machine import rehearsed; rehearsed.run_rehearsal({str(recipe.path)!r})"
    return start_python(code, cache)


def run_rehearsal(path: str) -> None:
    """Exit with 1 and a message where prepare-data would refuse the model of the recipe at `path`; else say how it did.

    Left out are the checks of the weights' files and of the tokenizer in llama.cpp, which have findings of their own.
    """
    from stages.lib.model.dress import rehearse
    from stages.lib.model.files import model_config, model_folder, refuse_quantized_base
    from stages.lib.model.locate import locate_model
    from stages.lib.model.rehearsal import check_chat_template, check_completion
    from stages.lib.model.sampled import refuse_unsampled
    from stages.lib.model.tokenizer import load_tokenizer

    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    recipe = read_recipe(Path(path), ARTIFACTS / Path(path).stem / "base-model")
    try:
        folder = model_folder(*locate_model(recipe))
        refuse_quantized_base(folder, recipe.model.name)
        refuse_unsampled(recipe, model_config(folder))
        tokenizer = load_tokenizer(recipe)
        check_chat_template(recipe, tokenizer)
        check_completion(recipe, tokenizer)
        if figures := rehearse(recipe):
            print(*terminal.rehearsal(figures))
    except UserError as error:
        sys.exit(error.message)


def rehearsal_finding(process: subprocess.Popen | None, recipe: Recipe, deadline: float) -> Finding:
    """Return the result of `start_rehearsal` at `deadline`, in seconds of the monotonic clock."""
    later = f"make prepare-data RECIPE={recipe.path.stem} does it before any training"
    if not recipe.model.rehearsal:
        return Finding("ok", "rehearsal", "left out: [model] rehearsal = false")
    if process is None:
        return Finding("ok", "rehearsal", f"not done: no config.json and tokenizer, or not the packages, here; {later}")
    output = output_until(process, deadline)
    if output is None:
        return Finding("warn", "rehearsal", "the small copy took too long and was ended", f"nothing: {later}")
    lines = output.strip().splitlines()
    if process.returncode == 0:
        said = next((line.partition(": ")[2] for line in lines if line.startswith("rehearsal: ")), None)
        if said is None:  # that no small copy can be made, which refuses nothing
            return Finding("warn", "rehearsal", " ".join(lines)[-600:], "nothing: training itself will tell")
        return Finding("ok", "rehearsal", said)
    if process.returncode < 0:
        found = f"a small copy of the model was ended by {signal.Signals(-process.returncode).name}"
        return Finding("fail", "rehearsal", " ".join([f"{found}:", *lines[-3:]]), "use another base model")
    crashed = any(line.startswith("Traceback") for line in lines)
    found = lines[-1] if crashed else " ".join(output.split())[-900:]
    return Finding("fail", "rehearsal", found, "what it says, or use another base model (docs/models.md)")
