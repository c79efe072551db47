"""The stage that grades JSON lines: each comes back with its score, and a bad one is named by its line."""

import json

import pytest
from click.testing import CliRunner

from stages.grade import main


def run(*lines: str):
    return CliRunner().invoke(main, [], input="\n".join(lines) + "\n")


def test_the_stage_writes_each_line_back_with_its_score():
    rows = [
        {"kind": "number", "answer": "$4.50", "given": "450 cents", "id": 7},
        {"kind": "text", "answer": ["UK", "United Kingdom"], "given": "uk"},
        {"kind": "choice", "answer": "B", "given": "C"},
        {"kind": "math", "answer": "2\\sqrt{2}", "given": "√8"},
    ]
    result = run(json.dumps(rows[0]), "", *map(json.dumps, rows[1:]))
    assert result.exit_code == 0, result.output
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {**row, "score": score} for row, score in zip(rows, (1.0, 1.0, 0.0, 1.0), strict=True)
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: no kind, answer, given; expected an object such as"),
        ('{"kind": "number", "answer": "1"}', "line 2: no given; expected an object such as"),
        ('{"kind": "number", "answer": 1, "given": "1"}', "line 2: answer is 1; expected text"),
        ('{"kind": "number", "answer": "1", "given": null}', "line 2: given is None; expected text"),
        ('{"kind": "number", "answer": ["1"], "given": "1"}', "line 2: answer is ['1']; expected text"),
        ('{"kind": "text", "answer": [], "given": "1"}', "line 2: answer is []; expected text"),
        ('{"kind": "nmber", "answer": "1", "given": "1"}', "line 2: unknown kind of answer 'nmber' (did you mean"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_the_stage_names_the_line_that_it_can_not_grade(line, message):
    result = run('{"kind": "number", "answer": "1", "given": "1"}', line)
    assert result.exit_code == 1
    assert message in result.output
    assert json.loads(result.stdout.splitlines()[0])["score"] == 1.0  # what came before is graded
