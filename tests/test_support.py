"""What the tests stand on: the writer of recipes, and what is made once a run."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stages.lib.recipe.write import as_toml
from tests.support.recipes import RECIPES, read_tables

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_shipped_recipe_reads_the_same_when_it_is_written(name):
    assert tomllib.loads(as_toml(read_tables(name))) == read_tables(name)


@pytest.mark.parametrize(
    "tables",
    [
        {"text": "\"quoted\" \\ back, 'single', é, 😀, \t, \n, \x00, \x1f"},
        {"numbers": [1e-05, -0.0, 1e300, 3], "flags": [True, False], "none": []},
        {"a": {"b": {"c": {"deep": 1}}, "after": 2}, "last": 3},
        {"rows": [{"x": 1, "inner": {"y": 2}}, {"x": 3}], "z": 4},
        {"a key with = and ]": 1, "table.with dots": {"q4_k_m": 0.1}, "text": "\x7f"},
    ],
)
def test_what_is_written_reads_back_the_same(tables):
    assert tomllib.loads(as_toml(tables)) == tables


def test_what_is_made_once_a_run_is_made_by_one_of_many_processes(tmp_path):
    program = (
        "import os, time\n"
        "from tests.support.once import once_a_run, run_folder\n"
        "@once_a_run\n"
        "def made():\n"
        "    with open(run_folder() / 'calls', 'a') as file:\n"
        "        file.write('x')\n"
        "    time.sleep(0.2)\n"
        "    return run_folder() / 'made'\n"
        "print(made(), made())\n"
    )
    environment = os.environ | {"TEMPER_TEST_RUN": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = {process.communicate(timeout=60)[0] for process in started}
    assert said == {f"{tmp_path}/made {tmp_path}/made\n"}
    assert (tmp_path / "calls").read_text() == "x"


def test_the_folder_of_a_run_goes_with_the_process_that_asked_first():
    program = "import json; from tests.support.once import run_folder; print(json.dumps(str(run_folder())))"
    environment = {name: value for name, value in os.environ.items() if name != "TEMPER_TEST_RUN"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    folder = Path(json.loads(done.stdout))
    assert folder.name.startswith("temper-test-")
    assert not folder.exists()
