"""The Makefile is an exact graph: it runs what has to be run, in order, with the options that the stages have."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
ALL = ["base_model", "prepare_data", "sft", "grpo", "infer", "merge", "gguf", "ollama_modelfile"]
DONE = {stage: f"artifacts/tiny/{stage.replace('_', '-')}/manifest.json" for stage in [*ALL, "score_base"]}
LONG_AGO = 1_000_000_000

# Stands for the virtual environment's python: notes what it is asked to run, and finishes the stage's folder.
# BREAK=stages.X ends that stage before, LATE=stages.X after its manifest is written; INTERRUPT=stages.X ends make too.
FAKE_PYTHON = """\
#!/bin/bash
echo "$*" >> log
stage=$2
[[ $stage != "${BREAK:-}" ]] || exit 1
while (($#)); do [[ $1 != --out ]] || out=$2; shift; done
[[ -z ${out:-} ]] || { mkdir -p "$out"; echo '{}' > "$out/manifest.json"; }
[[ $stage != "${LATE:-}" ]] || exit 1
[[ $stage != "${INTERRUPT:-}" ]] || { kill -TERM $PPID; sleep 0.3; exit 143; }
"""
FAKE_INSTALL = """\
#!/bin/bash
echo "docker/install $*" >> log
mkdir -p "$1/bin"; cp fake-python "$1/bin/python"; touch "$1/installed"
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the repository, all of it long ago, in which nothing was run yet and every stage is fake."""
    folder = tmp_path / "copy"
    for name in ("recipes", "stages", "docker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", folder)
    for name, text in (("fake-python", FAKE_PYTHON), ("docker/install", FAKE_INSTALL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return folder


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in ("RECIPE", "DATA", "MAKEFLAGS")}
    kept["RUNTIME"] = "local"  # where a stage runs is the matter of test_docker.py
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=kept | variables, capture_output=True, text=True, check=False
    )


def ran(folder: Path, *arguments: str, code: int = 0, **variables: str) -> list[str]:
    """Run make and return the stages it ran, in order."""
    (folder / "log").unlink(missing_ok=True)
    result = make(folder, *arguments, **variables)
    assert result.returncode == code, result.stderr
    log = (folder / "log").read_text() if (folder / "log").is_file() else ""
    return re.findall(r"^-m stages\.(\w+)", log, flags=re.MULTILINE)


def touch(path: Path) -> None:
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    path.touch()


def test_the_first_run_sets_up_and_runs_every_stage_in_order_and_the_second_runs_nothing(copy):
    assert ran(copy, "all") == ALL
    assert (copy / "log").read_text().splitlines()[0] == "docker/install .venv"
    assert all((copy / DONE[stage]).is_file() for stage in ALL)
    assert ran(copy, "all") == []
    assert not (copy / "log").exists()


@pytest.mark.parametrize(
    ("touched", "again"),
    [
        ("stages/infer.py", ["infer"]),
        ("stages/merge.py", ["merge", "gguf", "ollama_modelfile"]),
        ("stages/gguf.py", ["gguf", "ollama_modelfile"]),
        ("stages/ollama_modelfile.py", ["ollama_modelfile"]),
        ("stages/grpo.py", ["grpo", "infer", "merge", "gguf", "ollama_modelfile"]),
        ("stages/ask.py", []),
        ("stages/lib/stats.py", ALL),
        ("recipes/tiny.toml", ALL),
        ("recipes/gemma3-1b-gsm8k.toml", []),
        ("Makefile", []),
        (".venv/installed", []),
        (DONE["base_model"], ALL[1:]),
        (DONE["prepare_data"], ALL[2:]),
        (DONE["sft"], ["grpo", "infer", "merge", "gguf", "ollama_modelfile"]),
        (DONE["grpo"], ["infer", "merge", "gguf", "ollama_modelfile"]),
        (DONE["infer"], []),
        (DONE["merge"], ["gguf", "ollama_modelfile"]),
        (DONE["gguf"], ["ollama_modelfile"]),
    ],
)
def test_what_changed_reruns_what_depends_on_it_and_nothing_else(copy, touched, again):
    assert ran(copy, "all") == ALL
    touch(copy / touched)
    assert ran(copy, "all") == again
    assert ran(copy, "all") == []


@pytest.mark.parametrize("stage", ALL)
def test_a_lost_folder_is_made_again_with_what_depends_on_it(copy, stage):
    ran(copy, "all")
    shutil.rmtree((copy / DONE[stage]).parent)
    again = ran(copy, "all")
    assert again[0] == stage
    assert ran(copy, "all") == []


@pytest.mark.parametrize("how", ["BREAK", "LATE", "INTERRUPT"])
@pytest.mark.parametrize("stage", ["prepare_data", "grpo", "merge"])
def test_a_stage_that_fails_or_is_interrupted_is_where_the_next_make_goes_on(copy, how, stage):
    first = ran(copy, "all", code=-15 if how == "INTERRUPT" else 2, **{how: f"stages.{stage}"})
    assert first[-1] == stage
    # A manifest that was written is whole; deleting it would leave a folder that no stage would touch again.
    assert (copy / DONE[stage]).is_file() == (how != "BREAK")
    rest = ran(copy, "all")
    assert sorted(first + rest) == sorted(ALL + ([stage] if how == "BREAK" else []))
    assert ran(copy, "all") == []


def test_each_stage_is_a_target_that_runs_what_it_needs(copy):
    assert ran(copy, "prepare-data") == ["base_model", "prepare_data"]
    assert ran(copy, "sft") == ["sft"]
    assert ran(copy, "score-base") == ["score_base"]
    assert ran(copy, "merge") == ["grpo", "merge"]
    assert ran(copy, "ollama-modelfile") == ["gguf", "ollama_modelfile"]
    assert ran(copy, "infer") == ["infer"]
    assert ran(copy, "all") == []


def test_subset_makes_grpo_depend_on_score_base(copy):
    assert ran(copy, "grpo", "SUBSET=1") == ["base_model", "prepare_data", "sft", "score_base", "grpo"]
    assert "--score-base artifacts/tiny/score-base" in (copy / "log").read_text().splitlines()[-1]


def test_two_recipes_share_nothing_and_only_one_with_the_table_makes_a_base_model(copy):
    assert ran(copy, "all") == ALL
    assert ran(copy, "all", "RECIPE=gemma3-1b-gsm8k") == ALL[1:]
    log = (copy / "log").read_text()
    assert "artifacts/tiny" not in log and "--base-model" not in log
    assert ran(copy, "all") == []
    assert ran(copy, "all", "RECIPE=gemma3-1b-gsm8k") == []
    assert make(copy, "clean", "RECIPE=gemma3-1b-gsm8k").returncode == 0
    assert sorted(path.name for path in (copy / "artifacts").iterdir()) == ["tiny"]
    assert ran(copy, "all") == []


def test_other_data_is_new_input_and_the_same_or_none_is_not(copy):
    recipe = "RECIPE=tiny-gsm8k"
    for name in ("one", "two"):
        (copy / name).mkdir()
    assert "--data one" in log_of(copy, "all", recipe, "DATA=one")
    assert ran(copy, "all", recipe, "DATA=one") == []
    assert ran(copy, "all", recipe) == []
    again = ran(copy, "all", recipe, "DATA=two")
    assert again == ALL[1:]
    assert "--data two" in (copy / "log").read_text()
    assert ran(copy, "all", recipe, "DATA=two") == []


def log_of(folder: Path, *arguments: str) -> str:
    ran(folder, *arguments)
    return (folder / "log").read_text()


def test_a_changed_lock_sets_up_again_and_runs_no_stage(copy):
    ran(copy, "all")
    touch(copy / "docker" / "cpu.lock")
    assert ran(copy, "all") == []
    assert (copy / "log").read_text() == "docker/install .venv\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RECIPE=tyni"], r"RECIPE=tyni: there is no recipes/tyni\.toml\. Recipes: .*tiny"),
        (["RUNTIME=podman"], r"RUNTIME=podman is not known\. Expected local or docker"),
        (["DATA=no/such/folder"], r"DATA=no/such/folder: there is no such file or folder"),
    ],
)
@pytest.mark.parametrize("target", ["all", "help", "sft"])
def test_a_wrong_value_is_refused_by_name_with_2_before_anything_is_done(copy, arguments, message, target):
    before = sorted(copy.rglob("*"))
    result = make(copy, target, *arguments)
    assert result.returncode == 2
    assert re.search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(copy.rglob("*")) == before


def test_a_target_that_is_none_is_refused_with_2(copy):
    result = make(copy, "gguff")
    assert result.returncode == 2
    assert "gguff" in result.stderr


def test_help_lists_every_target_and_every_recipe_with_its_first_line(copy):
    shown = make(copy).stdout  # what `make` alone does
    assert shown == make(copy, "help").stdout
    database = make(copy, "-p", "-n", "help").stdout
    targets = set(re.search(r"^\.PHONY: (.*)$", database, flags=re.MULTILINE)[1].split()) - {"FORCE"}
    assert len(targets) > 14
    for target in targets:
        assert re.search(rf"^  {re.escape(target)} +[A-Z]\w", shown, flags=re.MULTILINE), target
    assert {"tiny", "tiny-gsm8k"} <= set(RECIPES)
    for recipe in RECIPES:
        first = (ROOT / "recipes" / f"{recipe}.toml").read_text().splitlines()[0].removeprefix("# ")
        assert re.search(rf"^  {re.escape(recipe)} +{re.escape(first)}$", shown, flags=re.MULTILINE), recipe


def test_the_preamble_is_strict():
    text = (ROOT / "Makefile").read_text()
    for line in (".DELETE_ON_ERROR:", ".NOTPARALLEL:", ".SHELLFLAGS := -euo pipefail -c", "SHELL := /bin/bash"):
        assert line in text.splitlines()


def asked(*variables: str) -> dict[str, list[list[str]]]:
    """Return the options that the Makefile gives each stage, a list a call."""
    targets = ["all", "score-base", "grpo", "ask", "chat", "serve", "push", "ollama", "doctor"]
    result = make(ROOT, "-n", "-B", *targets, "HUB=user/name", *variables)
    assert result.returncode == 0, result.stderr
    calls: dict[str, list[list[str]]] = {}
    for line in result.stdout.replace("\\\n", "").splitlines():
        if match := re.search(r" -m stages\.(\w+) (.*)", line):
            options = [word for word in shlex.split(match[2]) if word.startswith("--")]
            calls.setdefault(match[1], []).append(options)
    return calls


def test_the_makefiles_options_are_exactly_the_stages():
    every: dict[str, set[str]] = {}
    with_all = ["RECIPE=tiny-gsm8k", "DATA=tests/data/gsm8k", "SUBSET=1", "PUBLIC=1", "YES=1", "WHAT=gguf"]
    with_all += ["RUNTIME=docker", "GPUS=none"]
    for variables in (["RECIPE=tiny"], ["RECIPE=gemma3-1b-gsm8k"], with_all):
        for stage, calls in asked(*variables).items():
            for options in calls:
                assert len(set(options)) == len(options)
                every.setdefault(stage, set()).update(options)
                parameters = importlib.import_module(f"stages.{stage}").main.params
                needed = {option.opts[0] for option in parameters if option.required}
                assert needed <= set(options) <= {option.opts[0] for option in parameters}, stage
    stages = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert set(every) == stages
    for stage, options in every.items():
        known = {option.opts[0] for option in importlib.import_module(f"stages.{stage}").main.params}
        assert known - options <= ({"--question"} if stage == "ollama" else set()), stage


def test_a_question_reaches_the_stage_as_it_is_written(copy):
    ran(copy, "all")
    question = 'Tom\'s "12" * 3 ; $(touch x) `touch x` \\ %s?'
    make(copy, "ask", f"Q={question.replace('$', '$$')}")
    assert (copy / "log").read_text().splitlines()[-1].endswith(f"--question {question}")
    assert not (copy / "x").exists()
