"""Questions and answers come out of every shape that people's columns have; what reads two ways is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.lib.data.choices import with_options
from stages.lib.data.files import read_batches
from stages.lib.data.problem import problem_of
from stages.lib.data.rows import Rules, check_batch
from stages.lib.data.shapes import Unusable, last_boxed, marked_answer
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source

EVA = "Eva has 3 red and 4 blue marbles. How many has she?"
OPENAI = [
    {"role": "system", "content": "You are a tutor."},
    {"role": "user", "content": EVA},
    {"role": "assistant", "content": "3 + 4 = 7.\n#### 7"},
]
SHAREGPT = [{"from": "human", "value": EVA}, {"from": "gpt", "value": "3 + 4 = 7. The answer is 7."}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": EVA}]},
    {"role": "assistant", "content": [{"type": "text", "text": r"3 + 4 = 7, so $\boxed{7}$."}]},
]


def made(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> list[dict[str, Any]]:
    """Return the sft lines that a JSONL file of `rows` gives."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(name=str(path), use=["sft"], **keys)
    (piece,) = read_batches(source, [path])
    folder.joinpath("drafts").mkdir()
    check_batch(source, piece, Rules("xml", "Be brief.", 8, 10_000, 10_000), False, folder / "drafts")
    (draft,) = folder.joinpath("drafts").glob("sft.*")
    return [json.loads(line) for line in draft.read_text().splitlines()]


def taught(line: dict[str, Any]) -> tuple[str, str, str]:
    """Return question, answer and completion of an sft line."""
    return line["prompt"][1]["content"], line["answer"], line["completion"][0]["content"]


@pytest.mark.parametrize(
    ("conversation", "working"),
    [
        (OPENAI, "3 + 4 = 7."),
        (SHAREGPT, "3 + 4 = 7. The answer is 7."),
        (PARTS, r"3 + 4 = 7, so $\boxed{7}$."),
        (json.dumps(OPENAI), "3 + 4 = 7."),
    ],
)
def test_one_column_with_a_conversation_gives_question_answer_and_solution(
    tmp_path: Path, conversation: Any, working: str
) -> None:
    column = dict.fromkeys(("question", "answer", "solution"), "messages")
    (line,) = made(tmp_path, [{"messages": conversation}], **column)
    completion = f"<reasoning>\n{working}\n</reasoning>\n<answer>\n7\n</answer>"
    assert taught(line) == (EVA, "7", completion)
    assert len(line["prompt"]) == 2


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([*OPENAI, {"role": "user", "content": "Sure?"}], "a conversation of 2 questions and 1 replies"),
        ([OPENAI[0]], "a conversation of 0 questions and 0 replies"),
        ([{"role": "user", "content": " "}], "the user says nothing"),
        ([{"speaker": "user", "text": EVA}], "holds no text, but a list, [{'speaker'"),
        ({"text": EVA}, "holds no text, but a struct, {'text'"),
        (3, "holds no text, but a int, 3"),
    ],
)
def test_what_is_no_question_is_refused_with_what_it_is(conversation: Any, message: str) -> None:
    with pytest.raises(Unusable) as raised:
        problem_of(conversation, "7", None, "plain")
    assert message in str(raised.value)


def test_the_prompt_of_a_verl_row_is_its_question() -> None:
    row = {"prompt": [{"role": "user", "content": EVA}], "reward_model": {"style": "rule", "ground_truth": "7"}}
    assert problem_of(row["prompt"], row["reward_model"]["ground_truth"], None, "plain") == (EVA, "7", "")


def test_an_alpaca_row_has_its_input_below_the_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": "Add the numbers.", "input": "3, 4", "output": "3 + 4 = 7.\nAnswer: 7"}]
    (line,) = made(tmp_path, rows, question=["instruction", "input"], answer="output", style="marked")
    assert taught(line)[:2] == ("Add the numbers.\n3, 4", "7")


def test_a_question_in_two_columns_has_both_and_an_empty_one_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"Body": "Mia had 8 pens and lost 3.", "Question": "How many are left?", "A": 5.0, "E": "8 - 3"},
        {"Body": "", "Question": "What is 2 + 2?", "A": 4, "E": "2 + 2"},
    ]
    lines = made(tmp_path, rows, question=["Body", "Question"], answer="A", solution="E")
    assert [taught(line)[:2] for line in lines] == [
        ("Mia had 8 pens and lost 3.\nHow many are left?", "5.0"),
        ("What is 2 + 2?", "4"),
    ]


def test_an_answer_in_the_solution_s_column_is_its_last_box(tmp_path: Path) -> None:
    text = r"First \boxed{3}? No: 3 + 4 = \boxed{\frac{14}{2}}."
    rows = [{"problem": EVA, "solution": text}]
    (line,) = made(tmp_path, rows, question="problem", answer="solution", solution="solution", answers="math")
    assert taught(line)[1] == r"\frac{14}{2}"
    assert taught(line)[2].startswith(f"<reasoning>\n{text}\n</reasoning>")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"So \boxed{a{b}c}.", "a{b}c"),
        (r"\boxed 7", "7"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("no box", ""),
    ],
)
def test_the_last_box_that_closes_counts(text: str, found: str) -> None:
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 + 4 = 7.\n#### 7\n", ("3 + 4 = 7.", "7")),
        ("3 + 4 = 7. The final answer is 7.", "7"),
        ("The answer is 8?\nNo. Answer: 7", "7"),
        ("So the **answer is: 7**", "7"),
        ("The answer is 7. Or is it?\nNo.", None),
        ("3 + 4 = 7.", None),
        ("####", None),
    ],
)
def test_a_marked_answer_is_at_the_end(text: str, found: Any) -> None:
    assert marked_answer(text) == ((text, found) if isinstance(found, str) else found)


def test_style_marked_takes_working_and_answer_of_one_column() -> None:
    assert problem_of("q", "3 + 4 = 7.\n#### 7", None, "marked") == ("q", "7", "3 + 4 = 7.")
    assert problem_of("q", "The answer is 7.", "3 + 4.", "marked") == ("q", "7", "3 + 4.")


@pytest.mark.parametrize(
    ("answer", "style", "message"),
    [
        ("3 + 4 = 7. The final answer is 7.", "plain", "state style = \"marked\", which takes '7'"),
        ("3 + 4 = 7. The answer is 7", "gsm8k", 'State style = "marked", which reads this one'),
        ("3 + 4 = 7", "marked", "marks no answer; expected \\boxed{...}, a line '#### N', or 'the answer is N'"),
        ({"text": ["7"], "start": [1]}, "plain", "a struct with text, start; name one after a dot: COLUMN.text"),
        (["7", "8"], "plain", "a list, ['7', '8']. Is any of them right? State answers = \"text\""),
    ],
)
def test_an_answer_in_another_shape_is_refused_with_the_line_to_write(answer: Any, style: str, message: str) -> None:
    with pytest.raises(Unusable) as raised:
        problem_of("q", answer, None, style)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (["7"], "number", "7"),
        ([7], "number", "7"),
        (["7", "7.0"], "number", "7"),
        (["six", "6"], "text", '["six", "6"]'),
        ([6, "six"], "text", '["6", "six"]'),
    ],
)
def test_a_list_of_answers_is_one_or_several_accepted(answer: Any, kind: str, text: str) -> None:
    assert problem_of("q", answer, None, "plain", kind)[1] == text


def test_carriage_returns_are_taught_as_line_breaks() -> None:
    assert problem_of("a\r\nb", "7", "First.\r\nThen.\rLast.", "plain") == ("a\nb", "7", "First.\nThen.\nLast.")


LIST = ["5", "seven", "12"]
SHAPES: list[tuple[list[str], list[Any]]] = [
    (["choices"], [LIST]),
    (["choices"], [json.dumps(LIST)]),
    (["choices"], [{"label": ["A", "B", "C"], "text": LIST}]),
    (["choices"], [{"text": LIST, "label": ["1", "2", "3"]}]),
    (["options"], [[{"label": "A", "text": "5"}, {"label": "B", "text": "seven"}, {"label": "C", "text": "12"}]]),
    (["options"], [{"A": "5", "B": "seven", "C": "12", "D": None}]),
    (["A", "B", "C", "D"], [*LIST, ""]),
    (["opa", "opb", "opc"], LIST),
]


@pytest.mark.parametrize(("names", "values"), SHAPES)
def test_options_in_every_shape_are_put_below_the_question(names: list[str], values: list[Any]) -> None:
    assert with_options("How many?", "seven", values, names, "") == ("How many?\nA) 5\nB) seven\nC) 12", "B) seven")


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "B) seven", "seven", "Seven", 1, "1", 1.0])
def test_the_right_option_is_named_by_letter_text_or_number(answer: Any) -> None:
    assert with_options("q", answer, [LIST], ["choices"], "")[1] == "B) seven"


def test_the_dataset_s_own_labels_count_and_not_the_place() -> None:
    values = [{"text": LIST, "label": ["1", "2", "3"]}]
    assert with_options("q", "2", values, ["choices"], "")[1] == "B) seven"
    assert with_options("q", "1", values, ["choices"], "")[1] == "A) 5"


@pytest.mark.parametrize(("by", "option"), [("from 0", "C) 1"), ("from 1", "B) 3"), ("text", "A) 2")])
def test_chosen_by_settles_what_reads_two_ways(by: str, option: str) -> None:
    values = [["2", "3", "1"]]
    assert with_options("q", 2, values, ["choices"], by)[1] == option
    with pytest.raises(Unusable, match=r"'2' reads two ways: A\) by 'text', C\) by 'from 0'. State chosen_by"):
        with_options("q", 2, values, ["choices"], "")


@pytest.mark.parametrize(
    ("answer", "values", "message"),
    [
        (3, [LIST], "'3' is none of the options A) 5, B) seven, C) 12. Numbers from 1? State chosen_by = \"from 1\""),
        ("nine", [LIST], "'nine' is none of the options"),
        (None, [LIST], "no answer: None"),
        ("A", [None], "expected two options or more in choices; found a NoneType, None"),
        ("A", ["['5', '7']"], "choices hold a text that is no JSON"),
    ],
)
def test_a_row_without_a_right_option_is_refused(answer: Any, values: list[Any], message: str) -> None:
    with pytest.raises(Unusable) as raised:
        with_options("q", answer, values, ["choices"], "")
    assert message in str(raised.value)


@pytest.mark.parametrize("options", [["7", "both A and C", "5"], ["x", "y", "y"]])
def test_an_option_whose_words_could_mislead_is_graded_by_its_letter(options: list[str]) -> None:
    assert with_options("q", "B", [options], ["choices"], "")[1] == "B"


def test_a_row_with_choices_is_of_kind_choice_and_graded_by_letter_or_words(tmp_path: Path) -> None:
    from stages.lib.answers.grade import grade

    rows = [{"q": "How many?", "options": LIST, "right": "B", "why": "3 + 4."}]
    (line,) = made(tmp_path, rows, question="q", answer="right", solution="why", choices="options", answers="choice")
    assert taught(line)[:2] == ("How many?\nA) 5\nB) seven\nC) 12", "B) seven")
    given = ("B", "(b)", "seven", "B) seven", "A", "A) seven", "5")
    assert [grade(line["kind"], line["answer"], each) for each in given] == [1, 1, 1, 1, 0, 0, 0]


def test_a_struct_of_parquet_has_options_and_answer(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "mine.parquet"
    rows = [{"q": "How many?", "choices": {"label": ["A", "B"], "text": ["5", "7"]}, "key": {"right": "B"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    source = Source(str(path), ["grpo"], question="q", answer="key.right", choices="choices", answers="choice")
    (batch,) = read_batches(source, [path])
    check_batch(source, batch, Rules("xml", "Be brief.", 8, 10_000, 10_000), False, tmp_path)
    (draft,) = tmp_path.glob("grpo.*")
    line = json.loads(draft.read_text())
    assert (line["prompt"][1]["content"], line["answer"]) == ("How many?\nA) 5\nB) 7", "B) 7")


def test_a_column_of_choices_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'choises'"):
        made(tmp_path, [{"q": "x", "a": "B", "choices": LIST}], question="q", answer="a", choices="choises")
