"""The Makefile is an exact graph: it runs what has to be run, in order, with the options that the stages have."""

import importlib
import json
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

# Stands for the virtual environment's python: notes what it is asked to run, and finishes the stage's folder as a stage
# does: with the time when it began on the manifest, and with what it read from outside, which the file outside-STAGE
# says. BREAK=stages.X ends that stage before, LATE=stages.X after its manifest is written; INTERRUPT=stages.X ends make
# too; EDIT=stages.X changes $EDITED while that stage runs.
FAKE_PYTHON = """\
#!/bin/bash
echo "$*" >> log
stage=$2
[[ $stage != "${BREAK:-}" ]] || exit 1
while (($#)); do [[ $1 != --out ]] || out=$2; shift; done
began=$(mktemp -p .)
[[ $stage != "${EDIT:-}" ]] || { sleep 0.05; touch "$EDITED"; }
if [[ -n ${out:-} ]]; then
    mkdir -p "$out"
    cat "outside-${stage#stages.}" > "$out/outside" 2> /dev/null
    echo '{}' > "$out/manifest.json"
    touch -r "$began" "$out/manifest.json"
fi
rm "$began"
[[ $stage != "${LATE:-}" ]] || exit 1
[[ $stage != "${INTERRUPT:-}" ]] || { kill -TERM $PPID; sleep 0.3; exit 143; }
exit 0
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
    for name in ("recipes", "stages", "docker", "make"):
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
    """Run make and return the stages it ran, in order, without the look at the result that `make all` ends with."""
    (folder / "log").unlink(missing_ok=True)
    result = make(folder, *arguments, **variables)
    assert result.returncode == code, result.stderr
    log = (folder / "log").read_text() if (folder / "log").is_file() else ""
    found = re.findall(r"^-m stages\.(\w+)", log, flags=re.MULTILINE)
    assert all(found.count(after) == (code == 0 and "all" in arguments) for after in ("verify", "report"))
    return [stage for stage in found if stage not in ("verify", "report")]


def reads(folder: Path, stage: str, *paths: Path) -> None:
    """Let the stage say, whenever it runs, that it read these files from outside."""
    (folder / f"outside-{stage}").write_bytes(b"".join(os.fsencode(path) + b"\0" for path in paths))


def touch(path: Path) -> None:
    time.sleep(0.02)  # a file system's clock ticks every few milliseconds
    path.touch()


def test_the_first_run_sets_up_and_runs_every_stage_in_order_and_the_second_runs_nothing(copy):
    assert ran(copy, "all") == ALL
    assert (copy / "log").read_text().splitlines()[0] == "docker/install .venv"
    assert all((copy / DONE[stage]).is_file() for stage in ALL)
    assert ran(copy, "all") == []
    assert (copy / "log").read_text().splitlines() == [
        "-m stages.verify --recipe recipes/tiny.toml --artifacts artifacts/tiny --quick",
        "-m stages.report --recipe recipes/tiny.toml --artifacts artifacts/tiny",
    ]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, {"HF_HUB_DISABLE_TELEMETRY": "1"}),
        ({"HF_ENDPOINT": ""}, {"HF_ENDPOINT": "", "HF_HUB_DISABLE_TELEMETRY": "1"}),
        (
            {"HF_ENDPOINT": "http://mirror"},
            {"HF_ENDPOINT": "http://mirror", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"},
        ),
        (
            {"HF_ENDPOINT": "http://mirror", "HF_HUB_DISABLE_XET": "0", "HF_HUB_DISABLE_TELEMETRY": "0"},
            {"HF_ENDPOINT": "http://mirror", "HF_HUB_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_XET": "0"},
        ),
    ],
)
def test_a_mirror_turns_xet_off_and_no_stage_sends_telemetry(copy, monkeypatch, given, seen):
    for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    fake = copy / "fake-python"
    fake.write_text(fake.read_text().replace("#!/bin/bash", "#!/bin/bash\nenv | grep -E '^HF_(E|HUB_D)' > seen", 1))
    assert make(copy, "all", **given).returncode == 0
    assert dict(line.split("=", 1) for line in (copy / "seen").read_text().splitlines()) == seen


def test_what_is_not_whole_gets_no_summary(copy):
    assert make(copy, "all", BREAK="stages.verify").returncode == 2
    assert "stages.verify" in (copy / "log").read_text()
    assert "stages.report" not in (copy / "log").read_text()
    assert make(copy, "all").returncode == 0
    assert "-m stages.report" in (copy / "log").read_text().splitlines()[-1]


def test_verify_looks_at_the_whole_of_a_recipes_artifacts_and_runs_no_stage(copy):
    assert make(copy, "verify", "RECIPE=tiny-gsm8k").returncode == 0
    assert (copy / "log").read_text().splitlines() == [
        "docker/install .venv",
        "-m stages.verify --recipe recipes/tiny-gsm8k.toml --artifacts artifacts/tiny-gsm8k",
    ]


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


@pytest.mark.parametrize("left", [b"", b"\0" * 700, None], ids=["empty", "NUL", "a folder"])
def test_a_stage_whose_manifest_a_power_cut_left_empty_is_run_again(copy, left):
    assert ran(copy, "all") == ALL
    manifest = copy / DONE["sft"]
    manifest.unlink()
    manifest.mkdir() if left is None else manifest.write_bytes(left)
    assert ran(copy, "sft", BREAK="stages.sft", code=2) == ["sft"]
    if left is not None:
        assert ran(copy, "all") == ALL[2:]
        assert ran(copy, "all") == []


def test_what_is_remembered_of_data_and_subset_is_never_half_written(copy):
    recipe = "RECIPE=tiny-gsm8k"
    (copy / "one").mkdir()
    ran(copy, "all", recipe, "DATA=one", "SUBSET=1")
    folder = copy / "artifacts" / "tiny-gsm8k"
    for name in ("data.path", "subset"):  # as when the disk is full: nothing can be written beside it
        (folder / f"{name}.new").mkdir()
    assert ran(copy, "prepare-data", recipe, "DATA=", code=2) == []  # it would be forgotten what it was made of
    assert make(copy, "grpo", recipe, "DATA=one", "SUBSET=").returncode == 2
    assert ((folder / "data.path").read_text(), (folder / "subset").read_text()) == ("one\n", "1\n")


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


@pytest.mark.parametrize("before", [[], ["DATA=two"]])
def test_data_is_remembered_also_when_make_is_killed_as_prepare_data_ends(copy, before):
    recipe = "RECIPE=tiny-gsm8k"
    for name in ("one", "two"):
        (copy / name).mkdir()
    ran(copy, "prepare-data", recipe, *before)
    assert ran(copy, "all", recipe, "DATA=one", code=-15, INTERRUPT="stages.prepare_data") == ["prepare_data"]
    assert ran(copy, "all", recipe) == ALL[2:]
    assert (copy / "artifacts" / "tiny-gsm8k" / "data.path").read_text() == "one\n"
    assert not (copy / "artifacts" / "tiny-gsm8k" / "data.path.began").exists()
    touch(copy / "recipes" / "tiny-gsm8k.toml")
    assert "--data one" in log_of(copy, "prepare-data", recipe)


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


@pytest.mark.parametrize(
    ("name", "handed"),
    [
        ("it's;a&b$(c)", "it's;a&b$(c)"),
        ("my  data ", "my  data "),
        ("-delete", "./-delete"),
        ("-f of mine", "./-f of mine"),
        ("$(touch made)`touch made`", "$(touch made)`touch made`"),
        ("data,with:all*", "data,with:all*"),
    ],
)
def test_data_is_handed_on_as_it_is_written_and_never_as_an_option(copy, name, handed):
    (copy / name).mkdir()
    given = f"DATA={name.replace('$', '$$')}"
    assert f"--data {handed} --out" in log_of(copy, "prepare-data", "RECIPE=tiny-gsm8k", given)
    assert ran(copy, "prepare-data", "RECIPE=tiny-gsm8k") == []
    touch(copy / "recipes" / "tiny-gsm8k.toml")
    assert f"--data {handed} --out" in log_of(copy, "prepare-data", "RECIPE=tiny-gsm8k")
    make(copy, "prepare-data", "RECIPE=tiny-gsm8k", given.replace("=", "=~/"), HOME=str(copy))
    assert f"--data {copy}/{name} --out" in (copy / "log").read_text().splitlines()[-1]
    assert not (copy / "made").exists()


# ---- what a stage read from outside -------------------------------------------------------------------------------

ODD = ["my data/it's.csv", "-delete", "-exec touch made ;", "$(touch made)", "a\nb", "[x]*?.csv", "größe"]


@pytest.mark.parametrize(("stage", "again"), [("prepare_data", ALL[1:]), ("grpo", ALL[3:])])
def test_a_stage_is_looked_at_again_when_a_file_that_it_read_changed_or_is_gone(copy, stage, again):
    file, other = copy / "train.csv", copy / "other"
    file.write_text("a")
    other.write_text("b")
    os.utime(other, (LONG_AGO, LONG_AGO))
    reads(copy, stage, ROOT / "README.md", file)
    assert ran(copy, "all") == ALL
    assert ran(copy, "all") == []
    time.sleep(0.02)
    other.rename(file)  # with the times it had
    assert ran(copy, "all") == again
    assert ran(copy, "all") == []
    file.unlink()
    reads(copy, stage)
    assert ran(copy, "all") == again
    assert ran(copy, "all") == []


def test_a_file_from_outside_may_have_any_name(copy):
    (copy / "my data").mkdir()
    for name in ODD:
        (copy / name).write_text("a")
    reads(copy, "prepare_data", *(copy / name for name in ODD))
    assert ran(copy, "prepare-data") == ALL[:2]
    for name in ODD:
        touch(copy / name)
        assert ran(copy, "prepare-data") == ["prepare_data"], name
    assert ran(copy, "prepare-data") == []
    assert not (copy / "made").exists()


def test_a_link_from_outside_that_leads_elsewhere_now_is_a_change(copy):
    for name in ("one", "two"):
        (copy / name).write_text(name)
        os.utime(copy / name, (LONG_AGO, LONG_AGO))
    (copy / "link").symlink_to("one")
    reads(copy, "prepare_data", copy / "link", copy / "one")
    assert ran(copy, "prepare-data") == ALL[:2]
    time.sleep(0.02)
    (copy / "link").unlink()
    (copy / "link").symlink_to("two")
    assert ran(copy, "prepare-data") == ["prepare_data"]
    assert ran(copy, "prepare-data") == []


@pytest.mark.parametrize("stated", [b"-fprint\0victim\0", b"victim\0", b"-exec\0touch\0made\0;\0", b"\0", None])
def test_a_list_of_files_that_no_stage_wrote_is_no_command_and_has_the_stage_looked_at(copy, stated):
    (copy / "victim").write_text("kept")
    ran(copy, "all")
    outside = copy / "artifacts" / "tiny" / "merge" / "outside"
    if stated is None:
        outside.unlink()
    else:
        outside.write_bytes(stated)
    assert ran(copy, "all") == ["merge", "gguf", "ollama_modelfile"]
    assert ran(copy, "all") == []
    assert (copy / "victim").read_text() == "kept"
    assert not (copy / "made").exists()


@pytest.mark.parametrize(
    ("command", "file", "again"),
    [
        ("mv {old} {new}", "recipes/tiny.toml", ALL),
        ("cp -p {old} {new}", "recipes/tiny.toml", ALL),
        ("tar -cf - {old} | tar -xf - --transform s=.*={new}=", "recipes/tiny.toml", ALL),
        ("mv {old} {new}", "stages/lib/answers/number.py", ALL),
        ("tar -cf - {old} | tar -xf - --transform s=.*={new}=", "stages/infer.py", ["infer"]),
        ("cp -p {old} {new}", "own.py", ALL[3:]),
    ],
)
def test_an_older_copy_put_back_is_a_change(copy, command, file, again):
    (copy / "own.py").write_text("new")
    reads(copy, "grpo", copy / "own.py")
    older = copy / "older"
    shutil.copy(copy / file, older)
    os.utime(older, (LONG_AGO, LONG_AGO))
    os.utime(copy / file, (LONG_AGO + 9, LONG_AGO + 9))
    assert ran(copy, "all") == ALL
    time.sleep(0.02)
    subprocess.run(["bash", "-euo", "pipefail", "-c", command.format(old="older", new=file)], cwd=copy, check=True)
    assert (copy / file).stat().st_mtime == LONG_AGO
    assert ran(copy, "all") == again
    assert ran(copy, "all") == []


@pytest.mark.parametrize(
    ("edited", "again"),
    [
        ("recipes/tiny.toml", ALL),
        ("stages/lib/jsonl.py", ALL),
        ("stages/sft.py", ALL[2:]),
        ("stages/grpo.py", []),
        ("own.csv", ALL[2:]),
    ],
)
def test_what_is_edited_while_a_stage_runs_is_seen_the_next_time(copy, edited, again):
    (copy / "own.csv").write_text("")
    reads(copy, "sft", copy / "own.csv")
    assert ran(copy, "all", EDIT="stages.sft", EDITED=edited) == ALL
    assert ran(copy, "all") == again
    assert ran(copy, "all") == []


def test_a_recipe_that_is_a_link_is_looked_at_when_either_end_changes(copy):
    (copy / "recipes" / "mine.toml").symlink_to("../far.toml")
    for name in ("far.toml", "farther.toml"):
        shutil.copy(copy / "recipes" / "gemma3-1b-gsm8k.toml", copy / name)
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    touch(copy / "far.toml")
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    time.sleep(0.02)
    (copy / "recipes" / "mine.toml").unlink()
    (copy / "recipes" / "mine.toml").symlink_to("../farther.toml")
    assert ran(copy, "all", "RECIPE=mine") == ALL[1:]
    assert ran(copy, "all", "RECIPE=mine") == []


def test_what_python_compiles_beside_the_code_is_no_change(copy):
    ran(copy, "all")
    time.sleep(0.02)
    compiled = copy / "stages" / "lib" / "__pycache__"
    compiled.mkdir()
    (compiled / "jsonl.cpython-311.pyc").write_text("")
    assert ran(copy, "all") == []


def test_a_stage_reads_and_writes_utf_8_in_every_locale(copy):
    (copy / "fake-python").write_text("#!/bin/bash\nexec python3 -c 'print(open(0).encoding)'")
    assert "utf-8" in make(copy, "verify", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0").stdout.lower()


def test_no_stage_imports_another_one():
    files = sorted((ROOT / "stages").rglob("*.py"))
    assert len(files) > 50
    for path in files:  # make/changed looks at a stage's own file and at stages/lib
        found = re.findall(r"^\s*(?:from|import) stages(?:\.(?!lib\b)| import)", path.read_text(), re.MULTILINE)
        assert found == [], path


# ---- what a recipe may say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "sources", "rewards"),
    [
        ("-fprint", ["victim"], ["xmlcount"]),
        ("x/y", ["-fprint", "victim"], ["xmlcount"]),
        ("-exec", ["touch", "made", ";"], ["xmlcount"]),
        ("x/y", ["victim"], ["-fprint.py:f", "victim.py:f"]),
        ("x/y", ["victim"], ["-fprint.py:f", "../victim.py:f"]),
        ("x/y", ["-execdir", "sh", "-c", "touch made", "+"], ["-exec.py:f", "touch made.py:f"]),
        ("$(touch made)", ["`touch made`", "; touch made #", "$(shell touch made)"], ["$(shell touch made).py:f"]),
        ("' ; touch made ; '", ['" ; touch made ; "', "\n\ttouch made\n"], ["x'; touch made.py:f"]),
    ],
)
def test_no_text_of_a_recipe_is_a_command_or_an_option(copy, model, sources, rewards):
    text = (copy / "recipes" / "gemma3-1b-gsm8k.toml").read_text()
    named = ", ".join(json.dumps(reward) for reward in rewards)
    text = text.replace('"google/gemma-3-1b-it"', json.dumps(model)).replace('"xmlcount"', named)
    text = text.replace('name = "openai/gsm8k"', f"name = {json.dumps(sources[0])}")
    text += "".join(f"\n[[data.sources]]\nname = {json.dumps(name)}\n" for name in sources)
    (copy / "recipes" / "mine.toml").write_text(text)
    victims = [copy / "victim", copy / "victim.py", copy / "recipes" / "victim.py"]
    for victim in victims:
        victim.write_text("kept")
    before = set(copy.rglob("*"))
    for target in ("help", "clean", "doctor"):
        make(copy, target, "RECIPE=mine", PYTHON="true")
    assert set(copy.rglob("*")) == before
    assert ran(copy, "grpo", "RECIPE=mine") == ALL[1:4]
    touch(copy / "recipes" / "mine.toml")
    assert ran(copy, "grpo", "RECIPE=mine") == ALL[1:4]
    assert ran(copy, "help", "RECIPE=mine") == []
    assert [victim.read_text() for victim in victims] == ["kept"] * 3
    assert list(copy.rglob("made")) == []


@pytest.mark.parametrize(
    ("text", "makes"),
    [
        ("[base_model]\nseed = 0\n", True),
        ("[ base_model ]\nseed = 0\n", True),
        ("\t[\tbase_model\t]\nseed = 0\n", True),
        ('["base_model"]\nseed = 0\n', True),
        ("['base_model'] # here\nseed = 0\n", True),
        ("base_model = { seed = 0 }\n", True),
        ("base_model.seed = 0\n", True),
        ("[model]\nname = 'x/y'\n", False),
        ("# such as\n#[base_model]\n", False),
        ('note = """\n[base_model]\n"""\n', False),
        ("[other.base_model]\n", False),
        ("[base_model\n", False),  # not TOML: the first stage says so
        ("", False),
    ],
)
def test_a_base_model_is_made_for_a_recipe_with_that_table_however_it_is_written(copy, text, makes):
    (copy / "recipes" / "mine.toml").write_text(text)
    assert ran(copy, "sft", "RECIPE=mine") == (ALL[:3] if makes else ALL[1:3])
    assert ("--base-model" in (copy / "log").read_text()) == makes


def test_a_python_that_reads_no_recipe_is_named_before_anything_is_done(copy):
    result = make(copy, "all", "PYTHON=no-python")
    assert result.returncode == 2
    assert "no-python can't read a recipe: expected Python 3.11 or newer. Run: make PYTHON=python3.12" in result.stderr
    assert not (copy / "log").exists()
    assert make(copy, "help", "PYTHON=no-python").returncode == 0


ODD_RECIPES = [
    "my recipe",
    "it's",
    "-rf",
    "--version",
    "$(touch made)",
    "`touch made`",
    "a\nb",
    "x;touch made",
    "%",
    '"',
]


def test_help_lists_recipes_whatever_their_files_are_called_and_they_are_refused_by_name(copy):
    for name in ODD_RECIPES:
        (copy / "recipes" / f"{name}.toml").write_text("# Odd\n")
    (copy / "recipes" / "folder.toml").mkdir()
    result = make(copy, "help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("(make can't work with this name: rename the file)\n") == len(ODD_RECIPES)
    assert re.search(r"^  tiny +A network", result.stdout, re.MULTILINE)
    for name in ODD_RECIPES:
        result = make(copy, "all", f"RECIPE={name.replace('$', '$$')}")
        assert result.returncode == 2, name
        assert re.search("make can't work with this name|there is a line break in it", result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (copy / "made").exists()
    assert not (copy / "log").exists()


def log_of(folder: Path, *arguments: str) -> str:
    ran(folder, *arguments)
    return (folder / "log").read_text()


def test_a_changed_lock_sets_up_again_and_runs_no_stage(copy):
    ran(copy, "all")
    touch(copy / "docker" / "cpu.lock")
    assert ran(copy, "all") == []
    assert (copy / "log").read_text().splitlines()[:-2] == ["docker/install .venv"]


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
        (["DATA=stages docker"], r"DATA=stages docker: there is no such file or folder"),
        (["DATA=sta\nges"], r"DATA=sta ges: there is a line break in it, which make can't hand on"),
        (["VENV=my venv"], r"VENV=my venv: make can't work with this name; expected a folder without blanks"),
        (["VENV="], r"VENV=: make can't work with this name"),
        (["VENV=-x"], r"VENV=-x: make can't work with this name"),
        (["VENV=a:b"], r"VENV=a:b: make can't work with this name"),
        (["VENV=a%b"], r"VENV=a%b: make can't work with this name"),
        (["VENV=$$(touch made)"], r"VENV=\$\(touch made\): make can't work with this name"),
        (["CA_BUNDLE=a\nb"], r"CA_BUNDLE=a b: there is a line break in it"),
        (["PORT=http"], r"PORT=http is not known\. Expected a number, such as 8000"),
        (['GPUS="; touch made; "'], r'GPUS="; touch made; " is not known'),
        (["NODES=two"], r"NODES=two is not known\. Expected a number, such as 2"),
        (["NODE_RANK=-1"], r"NODE_RANK=-1 is not known\. Expected a number, such as 2"),
        (["NODES=2"], r"NODES=2 needs the address of node 0 as well: MASTER=10\.0\.0\.1:29400"),
        (["NODES=2", "MASTER=10.0.0.1"], r"MASTER=10\.0\.0\.1 is not known\. Expected address and port of node 0"),
        (["NODES=2", "MASTER=$$(touch made):1"], r"MASTER=\$\(touch made\):1 is not known"),
        (["MAKE_VERSION=3.81"], r"this is GNU make 3\.81; expected 4\.2 or newer\. On macOS: brew install make"),
        (["MAKE_VERSION=4.1"], r"this is GNU make 4\.1; expected 4\.2 or newer"),
        (["TASKS=--help"], r"TASKS=--help is not known\. Expected names of lm-eval's tasks with commas between them"),
        (["TASKS=gsm8k --device=x"], r"TASKS=gsm8k --device=x is not known"),
        (["TASKS=gsm8k'; touch made; '"], r"is not known\. Expected names of lm-eval's tasks"),
        (["TASKS=tasks/mine.yaml"], r"is not known\. Expected names of lm-eval's tasks"),
        (["LIMIT=0"], r"LIMIT=0 is not known\. Expected a number of problems, such as 200"),
        (["LIMIT=5 --of gguf"], r"LIMIT=5 --of gguf is not known"),
        (["OF=ggml"], r"OF=ggml is not known\. Expected merged or gguf"),
        (["BENCHMARKS=nowhere"], r"BENCHMARKS=nowhere: there is no such folder"),
        (["CHAT=yes"], r"CHAT=yes is not known\. Expected 1, or leave it out"),
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


def test_help_shows_every_variable_that_make_goes_by_with_its_default(copy):
    shown = dict(re.findall(r"^  ([A-Z_]+)=(\S*)", make(copy, "help").stdout, re.MULTILINE))
    used = set()
    for path in [ROOT / "Makefile", *(ROOT / "make").glob("*.mk")]:
        used |= set(re.findall(r"\$\((?:value |call kept,)?([A-Z_]+)\)", path.read_text()))
    own = {"HF_ENDPOINT", "HOME", "MAKE", "MAKECMDGOALS", "MAKEFLAGS", "MAKEFILE_LIST", "MAKE_VERSION"}
    assert used - own <= shown.keys()
    assert (shown["RECIPE"], shown["VENV"], shown["PORT"], shown["DATA"]) == ("tiny", ".venv", "8000", "")


def test_the_graph_is_on_the_makefiles_first_screen():
    lines = (ROOT / "Makefile").read_text().splitlines()
    assert max(number for number, line in enumerate(lines, 1) if ".reads " in line) <= 46


def test_the_first_lines_are_of_a_kind_that_an_older_make_reads_up_to_its_refusal():
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("ifneq ($(filter 1.% 2.% 3.% ")
    assert "$(error " in lines[1]
    assert lines[2] == "endif"


def test_the_preamble_is_strict():
    text = (ROOT / "make" / "variables.mk").read_text()
    for line in (".DELETE_ON_ERROR:", ".NOTPARALLEL:", ".SHELLFLAGS := -euo pipefail -c", "SHELL := /bin/bash"):
        assert line in text.splitlines()


def asked(*variables: str) -> dict[str, list[list[str]]]:
    """Return the options that the Makefile gives each stage, a list a call."""
    targets = ["all", "verify", "score-base", "grpo", "ask", "chat", "serve", "report", "compare", "sweep"]
    targets += ["push", "ollama", "doctor", "benchmark", "node"]
    given = ["HUB=user/name", "RECIPES=tiny tiny-gsm8k", "SET=grpo.seed=1", "TASKS=gsm8k"]
    result = make(ROOT, "-n", "-B", *targets, *given, *variables)
    assert result.returncode == 0, result.stderr
    calls: dict[str, list[list[str]]] = {}
    for line in result.stdout.replace("\\\n", "").splitlines():
        if match := re.search(r" -m stages\.(\w+) (.*)", line):
            options = [word for word in shlex.split(match[2]) if word.startswith("--")]
            calls.setdefault(match[1], []).append(options)
    return calls


def test_the_makefiles_options_are_exactly_the_stages():
    every: dict[str, set[str]] = {}
    with_all = [
        "RECIPE=tiny-gsm8k",
        "DATA=tests/support/gsm8k",
        "SUBSET=1",
        "PUBLIC=1",
        "YES=1",
        "WHAT=gguf",
        "PRICE=2.5",
        "LIMIT=20",
        "OF=gguf",
        "CHAT=1",
        "BENCHMARKS=tests/support",
        "NODES=2",
        "MASTER=10.0.0.1:29400",
    ]
    with_all += ["RUNTIME=docker", "GPUS=none"]
    for variables in (["RECIPE=tiny"], ["RECIPE=gemma3-1b-gsm8k"], with_all):
        for stage, calls in asked(*variables).items():
            for options in calls:
                assert len(set(options)) == len(options) or stage == "compare"  # of several recipes
                every.setdefault(stage, set()).update(options)
                parameters = importlib.import_module(f"stages.{stage}").main.params
                needed = {option.opts[0] for option in parameters if option.required}
                assert needed <= set(options) <= {option.opts[0] for option in parameters}, stage
    # grade reads rows from standard input, and is no part of the pipeline
    stages = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__", "grade"}
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
