"""The files of the user's own rewards: which count as their source, and that each is read once."""

from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.rewards.local import own_reward_files
from stages.lib.rewards.own import load_own


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_own_files_count_with_what_they_import_of_the_checkout_however_deep(tmp_path, monkeypatch):
    write(
        tmp_path,
        {
            "recipes/own.py": "import json\nfrom recipes import shared\nfrom stages.lib.answers import number\n",
            "recipes/shared.py": "def f():\n    import recipes.deep, recipes.own\n",
            "recipes/deep.py": "import this is no Python",
            "recipes/other.py": "",
            "stages/lib/answers/number.py": "",
        },
    )
    monkeypatch.setattr("stages.lib.rewards.local.ROOT", tmp_path)
    names = ["own.py:paid", "xmlcount", "gone.py:paid"]
    assert own_reward_files(names, tmp_path / "recipes") == {
        "own.py:paid": tmp_path / "recipes/own.py",
        "recipes/shared.py": tmp_path / "recipes/shared.py",
        "recipes/deep.py": tmp_path / "recipes/deep.py",
    }


def test_modules_and_packages_beside_a_reward_count_whatever_way_they_are_imported(tmp_path):
    write(
        tmp_path,
        {
            "own.py": "import helper\nfrom pack.sub import f\nimport bare.inner as inner\n",
            "helper.py": "def g():\n    from pack import late\n",
            "unused.py": "",
            "pack/__init__.py": "from . import first\nfrom .second import x\n",
            "pack/first.py": "",
            "pack/second.py": "from .sub.deep import y\n",
            "pack/late.py": "",
            "pack/unused.py": "",
            "pack/sub/__init__.py": "from .. import third\n",
            "pack/sub/deep.py": "",
            "pack/third.py": "",
            "bare/inner.py": "",
        },
    )
    assert sorted(own_reward_files(["own.py:f", "own.py:g"], tmp_path)) == [
        "bare/inner.py", "helper.py", "own.py:f", "own.py:g", "pack/__init__.py", "pack/first.py", "pack/late.py",
        "pack/second.py", "pack/sub/__init__.py", "pack/sub/deep.py", "pack/third.py",
    ]  # fmt: skip


def test_the_names_of_the_files_stay_when_the_folder_moves(tmp_path):
    files = {"recipes/r.toml": "", "shared/own.py": "import helper", "shared/helper.py": ""}
    names = []
    for place in ("here", "elsewhere/deeper"):
        write(tmp_path / place, files)
        names.append(list(own_reward_files(["../shared/own.py:f"], tmp_path / place / "recipes")))
    assert names[0] == names[1] == ["../shared/own.py:f", "../shared/helper.py"]


def test_a_file_is_run_once_for_two_rewards_and_for_those_that_import_it(tmp_path):
    source = (
        "calls = []\n\ndef {}(completions):\n    calls.append(1)\n    return [float(len(calls))] * len(completions)\n"
    )
    write(
        tmp_path,
        {
            "own.py": source.format("first") + source.partition("\n")[2].format("second"),
            "third.py": "import own, pack.inner\n\ndef third(completions): return pack.inner.own.first(completions)\n",
            "pack/__init__.py": "",
            "pack/inner.py": "import own\n",
        },
    )
    names = ["third.py:third", "own.py:first", "own.py:second"]
    rewards = load_own(names, tmp_path)
    assert [rewards[name](["a"]) for name in (*names, *names)] == [[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]


def test_files_are_read_anew_each_time_that_rewards_are_loaded(tmp_path):
    for value in (1, 2):
        write(
            tmp_path,
            {
                "own.py": "import helper\n\ndef f(completions):\n    return [helper.value]\n",
                "helper.py": f"value = {value}  #{'x' * value}\n",
            },
        )
        assert load_own(["own.py:f"], tmp_path)["own.py:f"](["a"]) == [float(value)]


def test_an_import_that_no_text_shows_is_refused(tmp_path):
    write(
        tmp_path,
        {
            "own.py": "import importlib\nhidden = importlib.import_module('hid' + 'den')\n\ndef f(completions): ...\n",
            "hidden.py": "",
        },
    )
    with pytest.raises(UserError, match=r"'own.py:f': .*hidden.py was imported in a way .* Write: import hidden$"):
        load_own(["own.py:f"], tmp_path)


@pytest.mark.parametrize("line", ["import colorsys", "from colorsys import mine"])
def test_a_module_that_has_the_name_of_an_installed_one_is_refused(line, tmp_path):
    write(tmp_path, {"own.py": f"{line}\n\ndef f(completions): ...\n", "colorsys.py": "mine = 1\n"})
    with pytest.raises(UserError, match=r"imports 'colorsys', and Python has another .*Rename .*/colorsys.py$"):
        load_own(["own.py:f"], tmp_path)


def test_an_error_names_the_line_of_the_file_that_raised_it(tmp_path):
    write(
        tmp_path,
        {
            "own.py": "import helper\n\ndef f(completions):\n    return helper.divide(completions)\n",
            "helper.py": "def divide(completions):\n    return [1 / 0]\n",
        },
    )
    with pytest.raises(UserError, match=r"'own.py:f': .*/helper.py, line 2: ZeroDivisionError: division by zero$"):
        load_own(["own.py:f"], tmp_path)["own.py:f"](["a"])
    write(tmp_path, {"helper.py": "def divide(:\n"})
    with pytest.raises(UserError, match=r"'own.py:f': .*/helper.py, line 1: SyntaxError"):
        load_own(["own.py:f"], tmp_path)
