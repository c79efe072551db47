"""Bad input ends every stage with 1 or 2 and one clear message, before anything was written; what was there stays."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from stages import grpo, score_base
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from tests.support import micro

ROOT = Path(__file__).parents[1]
TRAINING = list(micro.INPUTS)
OTHERS = {
    "merge": ["grpo", "prepare-data", "base-model"],
    "gguf": ["merge", "prepare-data", "grpo", "base-model"],
    "ollama-modelfile": ["merge", "gguf"],
}
INPUTS = micro.INPUTS | OTHERS


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file under `folder`, but for locks."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def run(stage: str, recipe: Path, inputs: Path, out: Path) -> Result:
    """Run `stage` in this process with its inputs in the folder `inputs`, whether or not they are there."""
    given = [word for name in INPUTS[stage] for word in (f"--{name}", str(inputs / name))]
    return CliRunner().invoke(micro.command_of(stage), ["--recipe", str(recipe), *given, "--out", str(out)])


def is_refused(result: Result, message: str, code: int = 1) -> None:
    """Raise AssertionError unless the stage ended with `code` and one message that matches."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert result.output.count("Error: ") == 1
    assert re.search(message, result.output), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("stage", INPUTS)
def test_a_recipe_with_an_unknown_key(tmp_path, stage):
    recipe = micro.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("[gguf]\n", "[gguf]\nprompst = 3\n"))
    before = state(tmp_path)
    is_refused(
        run(stage, recipe, tmp_path, tmp_path / "out"),
        r"micro\.toml: \[gguf\] prompst is not known \(did you mean 'prompts'\?\)",
    )
    assert state(tmp_path) == before


@pytest.mark.parametrize("stage", INPUTS)
def test_a_number_that_only_a_later_stage_would_stumble_over(tmp_path, stage):
    recipe = micro.write_recipe(tmp_path, infer={"problems": 0})
    before = state(tmp_path)
    is_refused(
        run(stage, recipe, tmp_path, tmp_path / "out"), r"micro\.toml: \[infer\] problems = 0; expected 1 or more\n"
    )
    assert state(tmp_path) == before


@pytest.mark.parametrize("stage", INPUTS)
def test_an_own_reward_that_its_file_does_not_have(tmp_path, stage):
    recipe = micro.write_recipe(tmp_path, rewards={"functions": ["own.py:varieti"], "weights": [1.0]})
    before = state(tmp_path)
    is_refused(
        run(stage, recipe, tmp_path, tmp_path / "out"),
        r"\[rewards\] 'own\.py:varieti': .*own\.py has no function 'varieti' \(did you mean 'variety'\?\)",
    )
    assert state(tmp_path) == before


@pytest.mark.parametrize("stage", INPUTS)
def test_a_recipe_that_is_not_there(tmp_path, stage):
    is_refused(run(stage, tmp_path / "tyni.toml", tmp_path, tmp_path / "out"), r"'.*tyni\.toml' does not exist", code=2)


@pytest.mark.parametrize("stage", [stage for stage in INPUTS if INPUTS[stage]])
def test_an_input_that_was_never_made(tmp_path, stage):
    result = run(stage, micro.write_recipe(tmp_path), tmp_path / "nothing", tmp_path / "out")
    is_refused(result, r"nothing/[a-z-]+.*: .*Run: make [a-z-]+")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "nothing").exists()


@pytest.mark.torch
@pytest.mark.parametrize("stage", ["sft", "grpo", "infer"])
def test_an_input_that_was_started_and_not_finished(finished, tmp_path, stage):
    for name in INPUTS[stage]:
        (tmp_path / name).symlink_to(finished / name)
    last = INPUTS[stage][-1]
    (tmp_path / last).rename(tmp_path / f"{last}.unfinished")
    result = run(stage, finished / "micro.toml", tmp_path, tmp_path / "out")
    is_refused(result, rf"/{last}: it was started and not finished; .* Run: make {last}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
@pytest.mark.parametrize("stage", TRAINING)
def test_a_foreign_file_in_out(finished, tmp_path, stage):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    result = micro.run(stage, finished, tmp_path / "out")
    is_refused(result, rf"out: holds 'thesis\.txt', which {stage} did not write and will not delete")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.torch
@pytest.mark.parametrize("stage", TRAINING)
def test_another_stages_folder_as_out(finished, stage):
    other = next(name for name in TRAINING if name != stage)
    before = state(finished)
    result = micro.run(stage, finished, finished / other)
    is_refused(result, rf"{other}: holds '.*' and \d+ more, which {stage} did not write")
    assert state(finished) == before


@pytest.mark.torch
@pytest.mark.parametrize("stage", TRAINING)
def test_a_disk_with_too_little_room(finished, tmp_path, stage, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10_000_000))
    before = state(tmp_path)
    result = micro.run(stage, finished, tmp_path / "out")
    is_refused(result, rf"out: the disk has 0\.01 GB free; {stage} needs 0\.\d\d GB")
    assert state(tmp_path) == before


def broken_model(finished: Path, folder: Path, *absent: str) -> Path:
    """Copy the base model without some of its files; return a recipe that names the copy."""
    ignored = shutil.ignore_patterns(*absent)
    shutil.copytree(finished / "base-model" / "model", folder / "model", ignore=ignored)
    return micro.write_recipe(folder, model={"name": str(folder / "model")})


@pytest.mark.torch
@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["tokenizer*"], r"model: the model folder has no tokenizer; expected one of tokenizer\.json"),
        (["config.json"], r"model: expected a model folder with config\.json, from the recipe's \[model\] name"),
        (["chat_template.jinja"], r"model: the tokenizer has no chat template, and format 'xml' brings none"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "grpo", "infer"])
def test_a_model_folder_that_lacks_something(finished, tmp_path, stage, absent, message):
    recipe = broken_model(finished, tmp_path, *absent)
    is_refused(micro.run(stage, finished, tmp_path / "out", recipe), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.torch
def test_a_base_model_that_is_not_given(finished, tmp_path):
    arguments = micro.arguments("sft", finished, tmp_path / "out")
    place = arguments.index("--base-model")
    result = CliRunner().invoke(micro.command_of("sft"), arguments[:place] + arguments[place + 2 :])
    is_refused(result, r"\[model\] name = 'base-model': expected the folder of that stage\. Add --base-model FOLDER")
    assert not (tmp_path / "out").exists()


def test_from_a_shell_the_message_is_one_line_on_stderr_and_the_exit_code_1(tmp_path):
    recipe = micro.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("[sft]\n", "[sft]\nstepz = 3\n"))
    command = [sys.executable, "-m", "stages.base_model", "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*micro\.toml: \[sft\] stepz is not known \(did you mean 'steps'\?\).*\n", done.stderr)


@pytest.mark.torch
@pytest.mark.parametrize("stage", TRAINING)
def test_what_is_up_to_date_says_so_and_loads_nothing_heavy(finished, stage):
    before = {name: size for name, (size, _) in state(finished / stage).items()}
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage.replace('-', '_')}"]
    command += micro.arguments(stage, finished)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{stage}: up to date, ")
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "stages" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "trl", "peft", "numpy", "sentencepiece"}
    assert {name: size for name, (size, _) in state(finished / stage).items()} == before


@pytest.mark.torch
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def variety(texts): ...", r"expected variety\(completions, \*\*kwargs\).* found variety\(texts\)"),
        ("from math import *", "has no function 'variety'"),
        ("import no_such_module\nvariety = None", "own.py, line 1: ModuleNotFoundError"),
    ],
)
@pytest.mark.parametrize("stage", ["grpo", "score-base"])
def test_a_reward_that_only_loading_shows_to_be_wrong_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, stage, source, message
):
    recipe = read_recipe(micro.write_recipe(tmp_path))
    (tmp_path / "own.py").write_text(source)

    def load(*_):
        raise AssertionError("a model is loaded before the rewards")

    monkeypatch.setattr(grpo, "load_trainable", load)
    monkeypatch.setattr(score_base, "sample_on_gpus", load)
    with pytest.raises(UserError, match=rf"'own.py:variety'.*{message}"):
        if stage == "grpo":
            grpo.train(
                recipe, grpo.Rows(tmp_path, tmp_path), tmp_path, SimpleNamespace(folder=tmp_path, checkpoints=tmp_path)
            )
        else:
            score_base.sample(recipe, [], None, SimpleNamespace(folder=tmp_path))
