"""The generated problems are right: every line of working is checked by another reading, every number is in range."""

import random
import re

import pytest

from stages.lib.data import word_problems
from stages.lib.data.word_problems import LARGEST, NAMES, TEMPLATES, THINGS, drill, problems

STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")


def check_step(line: str, left: int | None) -> int:
    """Return the result of the step `line`; it must go on from `left`, and be right."""
    match = STEP.fullmatch(line)
    assert match, line
    first, sign, second, result = int(match[1]), match[2], int(match[3]), int(match[4])
    assert left is None or first == left, line
    if sign == "*":
        assert sum([first] * second) == result, line
    elif sign == "+":
        assert result - second == first, line
    else:
        assert result + second == first, line
    assert 0 <= result <= LARGEST, line
    return result


def test_every_line_of_working_is_right_goes_on_from_the_one_before_and_ends_in_the_answer():
    templates = set()
    for question, answer, working in problems(0, 5000):
        total = None
        for line in working.splitlines():
            total = check_step(line, total)
        assert total == answer
        templates.add(re.sub(r"\d+|[+-]", "#", re.sub("|".join(NAMES + THINGS), "@", question)))
    assert len(templates) == len(TEMPLATES)


def test_the_working_uses_every_number_of_the_question():
    for question, _, working in problems(1, 2000):
        asked = sorted(re.findall(r"\d+", question), key=int)
        steps = [STEP.fullmatch(line) for line in working.splitlines()]
        used = [steps[0][1], *(step[3] for step in steps)]
        if "more than" in question:  # the first number counts for both people
            asked = sorted([*asked, steps[0][1]], key=int)
        assert sorted(used, key=int) == asked, question


# Written out by hand, a template each: the questions themselves say what the sum must be.
@pytest.mark.parametrize(
    ("pattern", "meaning"),
    [
        (r"What is (\d+) \+ (\d+)\?", lambda a, b: a + b),
        (r"What is (\d+) - (\d+)\?", lambda a, b: a - b),
        (r"What is (\d+) - (\d+) \+ (\d+)\?", lambda a, b, c: a - b + c),
        (r"has (\d+) \w+\. \w+ buys (\d+) more and gives (\d+) away\.", lambda a, b, c: a + b - c),
        (r"loses (\d+) of (\d+) \w+ and then finds (\d+)\.", lambda a, b, c: b - a + c),
        (r"There are (\d+) \w+ on a table\. \w+ takes (\d+) and \w+ takes (\d+)\.", lambda a, b, c: a - b - c),
        (r"has (\d+) \w+\. \w+ has (\d+) more than", lambda a, b: a + a + b),
        (r"has (\d+) \w+ and \w+ has (\d+)\. They buy (\d+) more\.", lambda a, b, c: a + b + c),
        (r"has (\d+) boxes with (\d+) \w+ each and buys (\d+) more\.", lambda a, b, c: a * b + c),
        (r"finds (\d+) \w+ a day for (\d+) days and gives (\d+) away\.", lambda a, b, c: a * b - c),
        (r"has (\d+) \w+, buys (\d+), gives (\d+) to \w+ and loses (\d+)\.", lambda a, b, c, d: a + b - c - d),
    ],
)
def test_the_answer_is_what_the_question_asks_for(pattern, meaning):
    found = [(re.search(pattern, problem.question), problem) for problem in problems(2, 2000)]
    found = [(match, problem) for match, problem in found if match]
    assert len(found) > 20
    for match, problem in found:
        assert meaning(*map(int, match.groups())) == problem.answer, problem.question


def test_no_question_comes_twice_and_none_that_is_left_out():
    first = [problem.question for problem in problems(0, 3000)]
    assert len(set(first)) == 3000
    second = {problem.question for problem in problems(0, 3000, without=set(first))}
    assert len(second) == 3000
    assert not second & set(first)


def test_what_is_left_out_is_not_changed():
    without = {"What is 1 + 1?"}
    assert len(list(problems(0, 10, without))) == 10
    assert without == {"What is 1 + 1?"}


def test_a_seed_stands_for_its_problems_and_more_of_them_begin_with_the_same():
    assert list(problems(7, 50)) == list(problems(7, 100))[:50]
    assert list(problems(7, 50)) != list(problems(8, 50))
    random.seed(99)  # the global state must not count
    again = list(problems(7, 50))
    random.seed(1)
    assert list(problems(7, 50)) == again
    assert [problem.answer for problem in problems(0, 5)] == [49, 20, 9, 29, 23]


def test_no_one_gives_to_themselves():
    for question, _, _ in problems(3, 2000):
        people = [word for word in re.findall(r"[A-Z][a-z]+", question) if word in NAMES]
        assert len(set(people)) <= 2
        if " to " in question or "They" in question or "more than" in question:
            assert len(set(people)) == 2, question


def test_every_line_of_a_drill_is_right():
    lines = drill(random.Random(0), lines=3000)
    assert len(lines) == 3000
    for line in lines:
        check_step(line, None)
    assert {STEP.fullmatch(line)[2] for line in lines} == {"+", "-", "*"}
    assert drill(random.Random(5), 20) == drill(random.Random(5), 20)


def test_a_skipped_working_holds_no_number():
    assert not re.search(r"\d", word_problems.SKIPPED)
