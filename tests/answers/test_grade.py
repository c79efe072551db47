"""The one judgement: all that asks whether an answer is right gets the same reply, and a kind says what it means."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.answers.formats import THINK, XML, Answer
from stages.lib.answers.grade import SCORERS, Kind, canonical, grade, mark, read_kind, shown_answer
from stages.lib.errors import UserError
from stages.lib.model.parity import grade_completions
from tests.answers.test_answers import CASES
from tests.support.rewards import load_rewards

KINDS = ["number", "number decimal=,", "math", "text", "choice"]
WORDS = st.sampled_from(
    "42 43 -5 1,200 1200 3,5 3.5 1/2 0.5 50% $ km apples B (B) yes no x = \\frac{1}{2} The is".split()
)
TEXTS = st.one_of(st.sampled_from(sorted({text for case in CASES for text in case[1:3]})),
                  st.lists(WORDS, min_size=1, max_size=4).map(" ".join))  # fmt: skip


def scores(kind: str, answer: str, given: str, tmp_path) -> dict[str, float]:
    """Give what each that judges says: 1.0 for right, 0.0 for wrong."""
    said = {}
    for answer_format, names in ((XML, ["correctness", "math_correct"]), (THINK, ["check_answer", "math_correct"])):
        completion = answer_format.write(Answer("a", given))
        for reward in load_rewards(names, answer_format, tmp_path):
            [paid] = reward([completion], answer=[answer], kind=[kind])
            said[f"{answer_format.name} {reward.__name__}"] = float(paid > 0 and paid not in (1.5,)) * min(paid, 1.0)
        said[f"{answer_format.name} mark"] = float(mark(answer_format, completion, answer, kind)["right"])
        rows = [{"answer": answer, "kind": kind}]
        tokenizer = SimpleNamespace(decode=lambda tokens, text=completion, **_: text)
        found = grade_completions([[1]], [2], tokenizer, rows, answer_format.name)
        said[f"{answer_format.name} gguf"] = float(found.right[0])
    return said


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(KINDS), answer=TEXTS, text=TEXTS)
def test_no_two_that_judge_an_answer_disagree(kind, answer, text, tmp_path_factory):
    if not text.strip():
        return
    said = scores(kind, answer, text, tmp_path_factory.getbasetemp())
    near = said.pop("think check_answer")  # which also pays a wrong number that is near: 2.0 or 1.5
    expected = grade(kind, answer, text.strip())
    assert set(said.values()) == {expected}
    assert expected <= near


@given(kind=st.sampled_from(KINDS), answer=TEXTS)
def test_an_answer_is_right_as_the_dataset_writes_it(kind, answer):
    assert grade(kind, answer, answer) == 1.0


@pytest.mark.parametrize(
    ("kind", "answer", "form"),
    [
        ("number", "$1,200.00", "1200"), ("number", "x", None), ("number decimal=,", "1.200", "1200"),
        ("text", "**Yes.**", "yes"), ("text", " ", None), ("choice", "(B)", "b"), ("math", "x^2 + 1", "x^2+1"),
        ("math", "x^{2", None), ("math", "9" * 501, None),
    ],
)  # fmt: skip
def test_equal_answers_of_a_dataset_share_a_form(kind, answer, form):
    assert canonical(kind, answer) == form


@pytest.mark.parametrize(
    ("kind", "answer", "shown"),
    [
        ("number", "$19.25", "$19.25"), ("number", "33.333333333333336", "33.333333333333336"),
        ("text", '["UK", "United Kingdom"]', "UK"), ("text", "[1, 2]", "[1, 2]"), ("text", "[]", "[]"),
        ("math", "[0, 1]", "[0, 1]"),
    ],
)  # fmt: skip
def test_an_answer_is_shown_as_the_dataset_writes_it(kind, answer, shown):
    assert shown_answer(kind, answer) == shown


@pytest.mark.parametrize("text", ["number", "number decimal=,", "number decimal=, tolerance=0.001", "text", "choice"])
def test_a_kind_is_written_as_it_is_read(text):
    assert str(read_kind(text)) == text
    assert isinstance(read_kind(text), Kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("numbers", r"unknown kind of answer 'numbers' \(did you mean 'number'\?\); known: number, math, text"),
        ("", "unknown kind of answer ''"),
        ("number colour=red", "unknown kind of answer 'number colour=red'"),
        ("number tolerance=wide", "unknown kind of answer 'number tolerance=wide'"),
        ("number decimal=;", "unknown kind of answer 'number decimal=;'"),
        ("scored", "expected 'scored scorer=NAME' with one of the scorers: reasoning_gym"),
        ("scored scorer=mine", "expected 'scored scorer=NAME'"),
    ],
)
def test_a_kind_that_is_not_known_is_refused(kind, message):
    with pytest.raises(UserError, match=message):
        grade(kind, "42", "42")


@pytest.mark.parametrize(("score", "worth"), [(0.25, 0.25), (1, 1.0), (2.0, 1.0), (-1.0, 0.0), (float("nan"), 0.0)])
def test_a_scorer_says_from_0_to_1_what_an_answer_is_worth(score, worth, monkeypatch, tmp_path):
    monkeypatch.setitem(SCORERS, "half", lambda answer, given: score if (answer, given) == ("a b", "a") else 0)
    kind = f"scored scorer={'half'}"
    grade.cache_clear()
    assert grade(kind, "a b", "a") == worth
    [correctness] = load_rewards(["correctness"], XML, tmp_path)
    assert correctness([XML.write(Answer("t", "a"))], answer=["a b"], kind=[kind]) == [2.0 * worth]
    [check_answer] = load_rewards(["check_answer"], THINK, tmp_path)
    assert check_answer([THINK.write(Answer("t", "a"))], answer=["a b"], kind=[kind]) == [3.5 * worth or -2.5]
    grade.cache_clear()
