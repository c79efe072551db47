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

pytestmark = pytest.mark.slow

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
        ("stages/lib/answers/stats.py", ALL),
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


def test_subset_is_remembered_until_it_is_given_empty(copy):
    rest = ["infer", "merge", "gguf", "ollama_modelfile"]
    assert ran(copy, "all", "SUBSET=1") == [*ALL[:3], "score_base", *ALL[3:]]
    assert ran(copy, "all") == ran(copy, "all", "SUBSET=1") == []
    touch(copy / "stages/grpo.py")
    result = make(copy, "grpo")
    assert "--score-base" in (copy / "log").read_text().splitlines()[-1]
    assert result.stderr == "SUBSET=1, as the last time; SUBSET= takes all problems\n"
    assert ran(copy, "all", SUBSET="") == rest  # an empty one in the environment says nothing
    assert ran(copy, "all", "SUBSET=") == ["grpo", *rest]
    assert "--score-base" not in (copy / "log").read_text()
    assert ran(copy, "all") == ran(copy, "all", "SUBSET=") == []
    assert ran(copy, "all", "SUBSET=1") == ["grpo", *rest]  # the scores are older than what was trained on all
    assert "--score-base" in (copy / "log").read_text()


def test_a_killed_run_on_the_subset_goes_on_with_it(copy):
    assert ran(copy, "all") == ALL
    assert ran(copy, "score-base") == ["score_base"]
    assert ran(copy, "grpo", "SUBSET=1", code=2, BREAK="stages.grpo") == ["grpo"]
    assert "--score-base" in log_of(copy, "grpo")
    assert ran(copy, "score-base") == ["score_base"]  # asked by name, it says its verdict again


def test_two_recipes_share_nothing_and_only_one_with_the_table_makes_a_base_model(copy):
    assert ran(copy, "all") == ALL
    assert ran(copy, "all", "RECIPE=gemma3-1b-gsm8k") == ALL[1:]
    log = (copy / "log").read_text()
    assert "artifacts/tiny" not in log
    assert "--base-model" not in log
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
    assert "--data" not in log_of(copy, "all", recipe, "DATA=")
    assert ran(copy, "all", recipe) == ran(copy, "all", recipe, "DATA=") == []


def test_data_that_prepare_data_could_not_use_is_forgotten(copy):
    recipe = "RECIPE=tiny-gsm8k"
    stated = copy / "artifacts" / "tiny-gsm8k" / "data.path"
    for name in ("one", "two"):
        (copy / name).mkdir()
    broken = {"code": 2, "BREAK": "stages.prepare_data"}
    assert ran(copy, "all", recipe, "DATA=two", **broken) == ["base_model", "prepare_data"]
    assert not stated.exists()
    assert ran(copy, "all", recipe) == ALL[1:]
    assert "--data" not in (copy / "log").read_text()
    assert ran(copy, "all", recipe, "DATA=one") == ALL[1:]
    assert ran(copy, "all", recipe, "DATA=two", **broken) == ["prepare_data"]
    assert stated.read_text() == "one\n"
    assert ran(copy, "ask", recipe) == ["ask"]


def test_remembered_data_that_is_gone_is_named_once_it_is_needed(copy):
    recipe = "RECIPE=tiny-gsm8k"
    (copy / "one").mkdir()
    ran(copy, "all", recipe, "DATA=one")
    (copy / "one").rmdir()
    assert ran(copy, "ask", recipe) == ["ask"]
    touch(copy / "recipes" / "tiny-gsm8k.toml")
    result = make(copy, "prepare-data", recipe)
    assert result.returncode == 2
    assert "one, which artifacts/tiny-gsm8k/data.path names as DATA of the last time, is not there" in result.stderr
    assert "DATA= " in result.stderr
    assert "--data" not in log_of(copy, "all", recipe, "DATA=")


def test_data_is_handed_on_as_it_is_written(copy):
    odd = copy / "it's;a&b$(c)"
    odd.mkdir()
    given = f"DATA={odd.name.replace('$', '$$')}"
    assert f"--data {odd.name} " in log_of(copy, "prepare-data", "RECIPE=tiny-gsm8k", given)
    assert ran(copy, "prepare-data", "RECIPE=tiny-gsm8k") == []
    make(copy, "prepare-data", "RECIPE=tiny-gsm8k", given.replace("=", "=~/"), HOME=str(copy))
    assert f"--data {copy}/{odd.name} " in (copy / "log").read_text().splitlines()[-1]


def own_recipe(folder: Path, data: str, reward: str = "own.py:variety") -> None:
    """Write recipes/mine.toml, which takes `data` from this disk and names a reward of its own."""
    text = (folder / "recipes" / "gemma3-1b-gsm8k.toml").read_text()
    text = text.replace('name = "openai/gsm8k"', f'name = "{data}"', 1).replace('"xmlcount"', f'"{reward}"')
    assert data in text
    assert reward in text
    (folder / "recipes" / "mine.toml").write_text(text)
    (folder / "recipes" / reward.partition(":")[0]).write_text("")


@pytest.mark.parametrize("name", ["data/bakery.csv", "my data/it's.csv", "my data"])
def test_changed_data_on_this_disk_is_looked_at_again(copy, name):
    file = copy / name if name.endswith(".csv") else copy / name / "data" / "train.csv"
    file.parent.mkdir(parents=True)
    file.write_text("a")
    own_recipe(copy, name)
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    assert ran(copy, "all", "RECIPE=mine") == []
    time.sleep(0.02)
    file.write_text("b")
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    assert ran(copy, "all", "RECIPE=mine") == []
    time.sleep(0.02)
    other = copy / "other.csv"
    other.write_text("c")
    os.utime(other, (LONG_AGO, LONG_AGO))
    other.rename(file)  # moved there with the times it had
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    if not name.endswith(".csv"):
        time.sleep(0.02)
        file.unlink()
        assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    assert ran(copy, "all", "RECIPE=mine") == []


def test_other_weights_of_a_model_on_this_disk_are_looked_at(copy):
    file = copy / "my model" / "model.safetensors"
    file.parent.mkdir()
    file.write_text("a")
    text = (copy / "recipes" / "gemma3-1b-gsm8k.toml").read_text()
    assert 'name = "google/gemma-3-1b-it"' in text
    (copy / "recipes" / "mine.toml").write_text(text.replace('name = "google/gemma-3-1b-it"', 'name = "my model"'))
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    assert ran(copy, "all", "RECIPE=mine") == []
    touch(file)
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    assert ran(copy, "all", "RECIPE=mine") == []


@pytest.mark.parametrize("given", ["gsm8k", "gsm8k/train.jsonl"])
def test_changed_files_of_data_are_looked_at_again_also_when_it_is_remembered(copy, given):
    file = copy / "gsm8k" / "train.jsonl"
    file.parent.mkdir()
    file.write_text("a")
    assert ran(copy, "all", "RECIPE=tiny-gsm8k", f"DATA={given}") == ALL
    assert ran(copy, "all", "RECIPE=tiny-gsm8k") == []
    touch(file)
    assert ran(copy, "all", "RECIPE=tiny-gsm8k") == ALL[1:]
    assert ran(copy, "all", "RECIPE=tiny-gsm8k") == []


def test_caches_in_the_data_folder_are_no_data(copy):
    (copy / "data" / "cache").mkdir(parents=True)
    assert ran(copy, "all", "RECIPE=tiny-gsm8k", "DATA=data") == ALL
    touch(copy / "data" / "cache" / "compiled")
    assert ran(copy, "all", "RECIPE=tiny-gsm8k") == []


@pytest.mark.parametrize("reward", ["own.py:variety", "my own.py:variety", "../shared/own.py:variety"])
def test_a_changed_reward_of_ones_own_is_looked_at_again(copy, reward):
    (copy / "shared").mkdir()
    own_recipe(copy, "openai/gsm8k", reward)
    file = copy / "recipes" / reward.partition(":")[0]
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    assert ran(copy, "all", "RECIPE=mine") == []
    touch(file)
    assert ran(copy, "all", "RECIPE=mine") == ["grpo", "infer", "merge", "gguf", "ollama_modelfile"]
    assert ran(copy, "all", "RECIPE=mine") == []
    assert ran(copy, "grpo", "RECIPE=mine", "SUBSET=1") == ["score_base", "grpo"]
    touch(file)
    assert ran(copy, "grpo", "RECIPE=mine") == ["score_base", "grpo"]
    assert ran(copy, "grpo", "RECIPE=mine") == []


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
        (["RECIPE=tiny docs"], r"RECIPE=tiny docs: expected the name of one recipe\. Recipes: .*tiny"),
        (["RECIPE="], r"RECIPE=: expected the name of one recipe\. Recipes: .*tiny"),
        (["RECIPE=tiny%"], r"RECIPE=tiny%: there is no recipes/tiny%\.toml"),
        (["RECIPE=%"], r"RECIPE=%: there is no recipes/%\.toml"),
        (["DATA=no/such/folder"], r"DATA=no/such/folder: there is no such file or folder"),
        (["DATA=stages/*.py"], r"DATA=stages/\*\.py: there is no such file or folder"),
        (["DATA=stages docker"], r"DATA=stages docker: has a blank in it\. Rename it, or name a link to it: ln -s"),
        (["PUBLIC=0"], r"PUBLIC=0 is not known\. Expected 1, or leave it out"),
        (["YES=no"], r"YES=no is not known\. Expected 1, or leave it out"),
        (["SUBSET=0"], r"SUBSET=0 is not known\. Expected 1, or leave it out"),
    ],
)
@pytest.mark.parametrize("target", ["all", "help", "sft", "clean"])
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
    with_all = ["RECIPE=tiny-gsm8k", "DATA=tests/support/gsm8k", "SUBSET=1", "PUBLIC=1", "YES=1", "WHAT=gguf"]
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


@pytest.mark.parametrize(("given", "options"), [("1", ["--public", "--yes"]), ("", []), (" ", [])])
def test_a_model_becomes_public_only_by_1(given, options):
    push = asked(f"PUBLIC={given}", f"YES={given}")["push"]
    assert [option for option in push[0] if option in ("--public", "--yes")] == options


def test_a_question_reaches_the_stage_as_it_is_written(copy):
    ran(copy, "all")
    question = 'Tom\'s "12" * $3.50 ; $(shell touch x) $(touch x) `touch x` \\ %s?'
    make(copy, "ask", f"Q={question}")
    assert (copy / "log").read_text().splitlines()[-1].endswith(f"--question {question}")
    assert not (copy / "x").exists()
