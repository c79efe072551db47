"""The tasks of reasoning-gym that Temper takes: the table of docs/reasoning-gym.md, and their scores."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.lib.answers.formats import XML, Answer
from stages.lib.answers.grade import canonical, grade, shown_answer
from stages.lib.answers.gym import MAX_CHARACTERS, TASKS
from stages.lib.answers.worker import Worker
from stages.lib.errors import UserError
from tests.support.gym_table import load_patience
from tests.support.rewards import load_rewards

ROOT = Path(__file__).parents[2]
KIND = "scored scorer=reasoning_gym"
ROW = {"task": "chain_sum", "question": "What is 40 + 2?", "answer": "42", "metadata": {}}


def tables() -> list[dict[str, Any]]:
    """Return what two processes print that hash texts differently."""
    made = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "tests.support.gym_table"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr[-2000:]
        made.append(json.loads(printed.stdout))
    return made


@pytest.mark.slow
def test_every_task_passes_the_table_that_its_page_shows():
    first, second = tables()
    assert list(first) == list(TASKS)
    failed = {
        task: found
        for task, found in first.items()
        if not found["texts"]
        or found["right"] != 1.0
        or found["right_after_json"] != 1.0
        or len(found["cheats"]) != 8
        or max(found["cheats"].values()) >= 0.1
        or found["hostile"] >= 1.0
        or found["evaluated"]
    }
    assert failed == {}
    assert {task: found["digest"] for task, found in first.items()} == {
        task: found["digest"] for task, found in second.items()
    }
    page = (ROOT / "docs" / "reasoning-gym.md").read_text()
    shown = {task: float(worth) for task, worth in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.MULTILINE)}
    assert shown == {task: max(found["cheats"].values()) for task, found in first.items()}


@pytest.mark.parametrize(
    ("given", "worth"),
    [("42", 1.0), (" 42 ", 1.0), ("+042.0", 1.0), ("41", 0.0), ("40 + 2", 0.0), ("", 0.0), ("\ud800", 0.0)],
)
def test_the_score_of_a_task_is_the_grade(given, worth):
    assert grade(KIND, json.dumps(ROW), given) == pytest.approx(worth, abs=0.05)


@pytest.mark.parametrize(
    "row",
    ["42", "[]", "{}", '{"task": "os", "answer": "42"}', json.dumps({**ROW, "task": "codeio"}), "[" * 100_000],
)
def test_an_answer_that_is_no_row_of_a_known_task_makes_nothing_right(row):
    assert grade(KIND, row, "42") == 0.0


def test_an_answer_that_is_too_long_is_wrong():
    assert grade(KIND, json.dumps(ROW), "0" * (MAX_CHARACTERS - 2) + "42") == 1.0
    assert grade(KIND, json.dumps(ROW), "0" * (MAX_CHARACTERS - 1) + "42") == 0.0


def test_a_scorer_that_does_not_end_is_killed_and_the_next_answer_is_scored():
    worker = Worker("patience", load_patience)
    assert [worker.ask("", given) for given in ("ends", "never ends", "ends")] == [1.0, 0.0, 1.0]


def test_a_worker_starts_also_when_the_server_that_forks_it_was_killed():
    from multiprocessing.forkserver import _forkserver

    assert Worker("patience", load_patience).ask("", "ends") == 1.0
    os.kill(_forkserver._forkserver_pid, signal.SIGKILL)
    assert Worker("patience", load_patience).ask("", "ends") == 1.0


def load_death() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_while_it_loads_says_by_what():
    with pytest.raises(UserError, match=r"the process that grades \(death\) could not start: it was ended by SIGKILL"):
        Worker("death", load_death).start()


def test_the_right_answer_is_shown_and_compared_without_its_entry():
    other = {**ROW, "metadata": {"source_index": 7}}
    assert shown_answer(KIND, json.dumps(ROW)) == "42"
    assert canonical(KIND, json.dumps(ROW)) == canonical(KIND, json.dumps(other)) == "42"


def test_the_reward_reads_the_answer_by_the_format(tmp_path):
    [reward] = load_rewards(["reasoning_gym"], XML, tmp_path)
    completions = [XML.write(Answer("t", "42")), XML.write(Answer("t", "43")), "42"]
    assert reward(completions, answer=[json.dumps(ROW)] * 3, kind=[KIND] * 3)[::2] == [1.0, 0.0]
    assert reward(completions, answer=[json.dumps(ROW)] * 3)[1] < 0.1
