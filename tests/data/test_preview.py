"""What the first rows of a source show: rows before and after, the instruction that all share, a column left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib.data import preview
from stages.lib.data.choices import shuffled
from stages.lib.data.place import files_of_source
from stages.lib.data.rows import without
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
VERL = '{} Let\'s think step by step and output the final answer after "####".'
NAMES = "Ann Bob Cleo Dan Eva Finn Gus Hana Ida Jon".split()
PROBLEMS = [f"{name} has {10 + place} figs. What has {name}?" for place, name in enumerate(NAMES)]


def seen(folder: Path, rows: list[dict[str, Any]], count: int = 3, **keys: Any) -> preview.Preview:
    """Return the preview of a JSONL file of `rows`."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(**{"name": str(path), "use": ["sft"], "question": "question", "answer": "answer", **keys})
    return preview.preview(source, [path], "xml", count)


@pytest.mark.parametrize(
    ("template", "instructions"),
    [
        (DAPO, tuple(DAPO.split("\n\n{}\n\n"))),
        (VERL, (VERL.removeprefix("{} "),)),
        ("请一步一步地思考。{}", ()),  # one word, as blanks count
        ("Please do think step by step\uff01{}", ("Please do think step by step\uff01",)),
        ("{}", ()),
        ("Q: {}", ()),
        ("{} How many are left?", ()),
    ],
)
def test_an_instruction_that_all_questions_share_is_found(template: str, instructions: tuple[str, ...]) -> None:
    assert preview.instructions_of([template.format(problem) for problem in PROBLEMS]) == instructions
    assert without([template.format(PROBLEMS[0])], instructions) == [
        PROBLEMS[0] if instructions else template.format(PROBLEMS[0])
    ]


@pytest.mark.parametrize(
    "questions",
    [
        [f"What is {count} + {count * 3}?" for count in range(20)],  # no sentence ends in what they share
        [f"Solve this problem step by step. {problem}" for problem in PROBLEMS[:7]],  # so few may be alike by chance
        ["Solve this problem step by step. It is 5."] * 20,
        [f"Solve this problem step by step. {problem}" for problem in PROBLEMS] + ["What is 3 + 4?"],
        [None, 3, {"a": 1}] * 10,
    ],
)
def test_what_not_all_of_many_different_questions_share_is_no_instruction(questions: list[Any]) -> None:
    assert preview.instructions_of(questions) == ()


def test_an_instruction_is_cut_only_where_something_is_left() -> None:
    assert without(["Think it over. ", "Think it over. 3?"], ["Think it over."]) == ["Think it over. ", "3?"]


@pytest.mark.parametrize("name", ["Body", "context", "input", "Passage"])
def test_a_column_that_by_its_name_belongs_to_the_question_is_named(tmp_path: Path, name: str) -> None:
    rows = [
        {name: f"Ann had {count} pens.", "question": "How many now?", "answer": 1, "Type": "-"} for count in range(9)
    ]
    assert seen(tmp_path, rows).lost_columns == [name]
    assert seen(tmp_path, rows, question=[name, "question"]).lost_columns == []
    for row in rows[:6]:
        row[name] = ""
    assert seen(tmp_path, rows).lost_columns == []  # most rows have nothing there


def test_rows_are_shown_as_the_file_has_them_and_as_they_are_read(tmp_path: Path) -> None:
    rows = [
        {"question": "What is 3 + 4?", "answer": "It is 7.\n#### 7", "note": "x"},
        {"question": "What is 3 + 5?", "answer": "It is 8."},
        {"question": "\u4e09\u52a0\u56db" * 60 + "\x1b[31m", "answer": "#### 7"},
    ]
    shown = seen(tmp_path, rows, style="gsm8k")
    lines = list(preview.rows_as_read([shown]))
    assert lines[1:6] == [
        "  column question       What is 3 + 4?",
        "  column answer         It is 7.\\n#### 7",
        "  read: question        What is 3 + 4?",
        "  read: answer          7",
        "  read: sft completion  <reasoning>\\nIt is 7.\\n</reaso ... answer>\\n7\\n</answer>",
    ]
    assert any(line.startswith("  read: left out   unreadable answer: ") for line in lines)
    assert any(line.startswith("  read: left out   no solution: ") for line in lines)
    assert all(line.isprintable() and preview.wide(line) <= 80 for line in lines)


@pytest.mark.parametrize(("sources", "rows"), [(1, 3), (2, 2), (3, 1), (9, 1)])
def test_at_least_three_rows_are_shown(sources: int, rows: int) -> None:
    assert preview.rows_each(sources) == rows


def test_the_right_option_of_a_column_of_its_own_stands_at_any_place(tmp_path: Path) -> None:
    names = ["correct_answer", "distractor1", "distractor2", "distractor3"]
    rows = [
        {"question": f"Which is {count}?", **dict(zip(names, (f"it {count}", "b", "c", "d"), strict=True))}
        for count in range(200)
    ]
    shown = seen(tmp_path, rows, 200, answer=names[0], choices=names, answers="choice", use=["grpo"])
    letters = [row.answer[0] for row in shown.rows]
    assert {letter: letters.count(letter) > 30 for letter in "ABCD"} == dict.fromkeys("ABCD", True)
    for count, row in enumerate(shown.rows):
        assert row.answer[1:] == f") it {count}"
        assert row.answer in row.question.splitlines()
    assert shuffled("Which?", ["a", "b", "c"]) == shuffled("Which?", ["c", "a", "b"])


def test_a_file_that_is_not_there_is_looked_for_beside(tmp_path: Path) -> None:
    (tmp_path / "problems.jsonl").write_text("{}")
    source = Source(name=str(tmp_path / "problem.jsonl"), use=["sft"], question="q", answer="a")
    with pytest.raises(UserError, match=r"there is no such file or folder \(did you mean 'problems\.jsonl'\?\)"):
        files_of_source(source, None, None)
