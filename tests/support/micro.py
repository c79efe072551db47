"""The smallest run of the stages that train: the tiny recipe with numbers so low that a stage takes a second or two."""

import hashlib
import importlib
import json
from pathlib import Path

import click
from click.testing import CliRunner, Result

from tests.support.recipes import read_tables, write_tables

INPUTS = {
    "base-model": [],
    "prepare-data": ["base-model"],
    "sft": ["base-model", "prepare-data"],
    "grpo": ["base-model", "prepare-data", "sft"],
    "infer": ["base-model", "prepare-data", "sft", "grpo"],
}
NUMBERS = {
    "base_model": {
        "layers": 1, "hidden_size": 64, "intermediate_size": 64, "corpus_problems": 400, "eval_problems": 240,
        "train_problems": 200, "steps": 80, "warmup_steps": 1,
    },
    "sft": {"steps": 8, "save_steps": 2, "log_steps": 1, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 2},
    "grpo": {
        "steps": 8, "save_steps": 2, "prompts_per_step": 2, "completions_per_prompt": 4, "micro_batch_size": 4,
        "max_completion_tokens": 12, "show_completions_steps": 4, "learning_rate": 5e-3,
    },
    "rewards": {"functions": ["own.py:variety", "strict_format", "correctness"], "weights": [1.0, 1.0, 1.0]},
    "infer": {"problems": 20, "batch_size": 8, "max_completion_tokens": 12},
}  # fmt: skip
# Nothing a network says after eighty steps is well formed; this tells its completions apart, so that GRPO can learn.
# TERM_AT_CALL=n sends TERM to the process itself in the n-th generation.
OWN = """\
import os, signal

calls = 0


def variety(completions):
    global calls
    calls += 1
    if str(calls) == os.environ.get("TERM_AT_CALL"):
        os.kill(os.getpid(), signal.SIGTERM)
    return [len(set(turns[-1]["content"])) / 10 for turns in completions]
"""


def write_recipe(folder: Path, **changes: dict[str, object]) -> Path:
    """Write micro.toml, with other values where `changes` (a dict a table) has them, and its reward file; return it."""
    tables = read_tables()
    for name in NUMBERS | changes:
        tables[name] |= NUMBERS.get(name, {}) | changes.get(name, {})
    (folder / "own.py").write_text(OWN)
    return write_tables(folder / "micro.toml", tables)


def write_weights(folder: Path, value: float = 0.0) -> None:
    """Write safetensors to a model's folder, as far as a stage reads them that trains nothing."""
    import numpy
    from safetensors.numpy import save_file

    save_file({"weight": numpy.full(2, value, "float32")}, folder / "model.safetensors")


def arguments(stage: str, finished: Path, out: Path | None = None, recipe: Path | None = None) -> list[str]:
    """Return the options of `stage` for the inputs in the folder `finished`, writing to `out` (else there as well)."""
    given = [word for name in INPUTS[stage] for word in (f"--{name}", str(finished / name))]
    return ["--recipe", str(recipe or finished / "micro.toml"), *given, "--out", str(out or finished / stage)]


def run_uncaught(stage: str, finished: Path, out: Path) -> None:
    """Run the command of `stage` in this process, and let what it raises through."""
    command_of(stage).main(arguments(stage, finished, out), standalone_mode=False)


def command_of(stage: str) -> click.Command:
    """Return the click command of `stage`."""
    return importlib.import_module(f"stages.{stage.replace('-', '_')}").main


def run(stage: str, finished: Path, out: Path | None = None, recipe: Path | None = None) -> Result:
    """Run the command of `stage` in this process."""
    return CliRunner().invoke(command_of(stage), arguments(stage, finished, out, recipe))


def vouched(folder: Path) -> dict[str, object]:
    """Return what the manifest of an artifact states but for where and in what time it was made."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {key: value for key, value in manifest.items() if key not in ("environment", "wall")}


def restate(folder: Path, name: str) -> None:
    """Let the manifest of an artifact state the file `name` as it is now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
