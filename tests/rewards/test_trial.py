"""The user's own rewards are tried on rows of the grpo set before the training."""

import json
from pathlib import Path

import pytest

from stages.lib.answers.formats import XML
from stages.lib.errors import UserError
from stages.lib.jsonl import write_rows
from stages.lib.rewards.trial import batch_of, telling_rows, try_rewards
from tests.support.rewards import recipe_of

COLUMNS = [
    {"level": 1, "tags": ["a"]},
    {"level": 2, "tags": ["b"]},
    {"level": None, "tags": ["c"]},
    {"other": {"x": 1}},
]


def problems(folder: Path, columns=COLUMNS) -> Path:
    rows = [
        {
            "id": f"{number:016x}", "prompt": [{"role": "user", "content": f"What is {number} + 1?"}],
            "answer": str(number + 1), "kind": "number", "row": json.dumps(own),
        }
        for number, own in enumerate(columns)
    ]  # fmt: skip
    write_rows(folder / "grpo.jsonl", rows)
    return folder / "grpo.jsonl"


def test_rows_are_chosen_that_show_every_type_of_value_and_name_every_column(tmp_path):
    rows, columns = telling_rows(problems(tmp_path))
    assert [json.loads(row["row"]) for row in rows] == [COLUMNS[0], COLUMNS[2], COLUMNS[3]]
    assert columns == ["kind", "level", "other", "tags"]


def test_of_many_types_at_most_32_rows_are_tried_and_all_columns_are_known(tmp_path):
    rows, columns = telling_rows(problems(tmp_path, [{f"c{number:02}": 1} for number in range(50)]))
    assert (len(rows), len(columns)) == (32, 51)


def test_each_row_has_a_completion_with_its_answer_and_an_empty_one(tmp_path):
    rows, _ = telling_rows(problems(tmp_path))
    batch = batch_of(recipe_of(["xmlcount"], XML, tmp_path), [row for row in rows[:1] for _ in range(2)])
    whole = "<reasoning>\nThe working.\n</reasoning>\n<answer>\n1\n</answer>"
    assert [completion[0]["content"].strip() for completion in batch["completions"]] == [whole, ""]
    assert (batch["answer"], batch["id"]) == (["1", "1"], ["0" * 16] * 2)
    assert bytes(batch["completion_ids"][0]).decode().strip() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def f(completions, level):\n    return [value / 1 for value in level]",
            r"own.py, line 2: TypeError: unsupported operand .*'NoneType' and 'int'. It was tried before the training, "
            r"on 3 rows of the grpo set with two completions each, one of them empty$",
        ),
        (
            "def f(completions, levle):\n    return [0.0 for _ in completions]",
            r"asks for levle; expected names of columns: .*kind.*, level, other, tags$",
        ),
        (
            "import os\n\ndef f(completions):\n    os._exit(3)",
            r"ended the process that tried them on rows of .*grpo.jsonl",
        ),
        (
            "def f(completions, level):\n    return [float('nan') if v == 1 else v for v in level]",
            r"returned nan \(float\) for completion 0 of row 0{16} \('What is 0 \+ 1\?'\); expected a finite number",
        ),
    ],
)
def test_what_fails_on_a_real_row_is_found(source, message, tmp_path):
    (tmp_path / "own.py").write_text(source)
    with pytest.raises(UserError, match=message):
        try_rewards(recipe_of(["xmlcount", "own.py:f"], XML, tmp_path), problems(tmp_path))


@pytest.mark.slow
def test_a_reward_that_takes_each_row_as_it_is_passes_and_keeps_nothing_in_this_process(tmp_path):
    source = """\
import pathlib

def f(completions, level, tags, other, row, answer, kind, prompts, completion_ids, id):
    pathlib.Path(__file__).with_name("seen").write_text(repr((level, tags, other, row[-1], answer, kind[0])))
    return [None] * len(completions)
"""
    (tmp_path / "own.py").write_text(source)
    try_rewards(recipe_of(["own.py:f"], XML, tmp_path), problems(tmp_path))
    assert (tmp_path / "seen").read_text() == repr(
        (
            [1, 1, None, None, None, None],
            [["a"], ["a"], ["c"], ["c"], None, None],
            [None, None, None, None, {"x": 1}, {"x": 1}],
            {"other": {"x": 1}},
            ["1", "1", "3", "3", "4", "4"],
            "number",
        )
    )


@pytest.mark.torch
@pytest.mark.slow
def test_a_reward_may_ask_for_the_trainer(tmp_path):
    source = (
        "def f(completions, trainer_state, log_extra, log_metric):\n    log_extra('a', [1])\n    log_metric('b', 1.0)\n"
        "    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)"
    )
    (tmp_path / "own.py").write_text(source)
    try_rewards(recipe_of(["own.py:f"], XML, tmp_path), problems(tmp_path))
    (tmp_path / "own.py").write_text(source + " + [0.0]")
    with pytest.raises(UserError, match="returned 7 rewards for 6 completions"):
        try_rewards(recipe_of(["own.py:f"], XML, tmp_path), problems(tmp_path))


def test_rewards_of_the_library_are_not_tried(tmp_path):
    try_rewards(recipe_of(["xmlcount"], XML, tmp_path), tmp_path / "no such file")
