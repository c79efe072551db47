"""Generated arithmetic word problems with checkable answers: what the embedded tiny model is made and examined on."""

import random
from collections.abc import Iterator
from typing import NamedTuple

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eve", "Max", "Zoe", "Leo", "Ida", "Kim", "Jan")
THINGS = ("apples", "books", "coins", "pens", "eggs", "cards", "cups", "shells", "nuts", "stamps", "plums", "beads")
LARGEST = 60  # what two layers learn in two minutes
SKIPPED = "That is easy."  # what stands where the working would, in a solution that skips it


class Problem(NamedTuple):
    """A question, its answer (a whole number, zero or more) and the working, one step a line."""

    question: str
    answer: int
    working: str


def problem(random_state: random.Random) -> Problem:
    """Return one problem of one to three steps, every intermediate result from 0 to LARGEST."""
    while True:
        question, steps = TEMPLATES[random_state.randrange(len(TEMPLATES))](random_state)
        total, lines = 0, []
        for left, sign, right in steps:
            left = total if left is None else left
            total = {"+": left + right, "-": left - right, "*": left * right}[sign]
            lines.append(f"{left}{sign}{right}={total}")
            if not 0 <= total <= LARGEST:
                break
        else:
            return Problem(question, total, "\n".join(lines))


def problems(seed: int, count: int, without: set[str] | None = None) -> Iterator[Problem]:
    """Yield `count` problems, no question twice and none of those in `without`. The same seed, the same ones."""
    random_state = random.Random(seed)
    seen = set(without or ())
    while count:
        made = problem(random_state)
        if made.question not in seen:
            seen.add(made.question)
            count -= 1
            yield made


def drill(random_state: random.Random, lines: int) -> list[str]:
    """Return `lines` single steps of the kind that problems are made of: `17+25=42`."""
    made: list[str] = []
    while len(made) < lines:
        left, sign = random_state.randint(0, LARGEST), random_state.choice("++--*")
        right = random_state.randint(0, 25) if sign != "*" else random_state.randint(2, 9)
        left = random_state.randint(2, 9) if sign == "*" else left
        total = {"+": left + right, "-": left - right, "*": left * right}[sign]
        if 0 <= total <= LARGEST:
            made.append(f"{left}{sign}{right}={total}")
    return made


def _draw(random_state: random.Random) -> tuple[str, str, str, int, int, int]:
    """Return two different names, a thing and three numbers."""
    first, second = random_state.sample(NAMES, 2)
    thing = random_state.choice(THINGS)
    return first, second, thing, random_state.randint(2, 25), random_state.randint(2, 25), random_state.randint(2, 25)


def _what_is(random_state):
    _, _, _, a, b, _ = _draw(random_state)
    sign = random_state.choice("+-")
    return f"What is {a} {sign} {b}?", [(a, sign, b)]


def _what_is_long(random_state):
    _, _, _, a, b, c = _draw(random_state)
    first, second = random_state.choice("+-"), random_state.choice("+-")
    return f"What is {a} {first} {b} {second} {c}?", [(a, first, b), (None, second, c)]


def _buy_give(random_state):
    name, _, thing, a, b, c = _draw(random_state)
    return (
        f"{name} has {a} {thing}. {name} buys {b} more and gives {c} away. How many {thing} does {name} have now?",
        [(a, "+", b), (None, "-", c)],
    )


def _find_lose(random_state):
    name, _, thing, a, b, c = _draw(random_state)
    return (
        f"{name} loses {a} of {b} {thing} and then finds {c}. How many {thing} does {name} have now?",
        [(b, "-", a), (None, "+", c)],
    )


def _table(random_state):
    name, other, thing, a, b, c = _draw(random_state)
    return (
        f"There are {a} {thing} on a table. {name} takes {b} and {other} takes {c}. How many {thing} are left?",
        [(a, "-", b), (None, "-", c)],
    )


def _more_than(random_state):
    name, other, thing, a, b, _ = _draw(random_state)
    return (
        f"{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} do they have together?",
        [(a, "+", b), (None, "+", a)],
    )


def _three(random_state):
    name, other, thing, a, b, c = _draw(random_state)
    return (
        f"{name} has {a} {thing} and {other} has {b}. They buy {c} more. How many {thing} do they have together?",
        [(a, "+", b), (None, "+", c)],
    )


def _boxes(random_state):
    name, _, thing, _, _, c = _draw(random_state)
    each, boxes = random_state.randint(2, 9), random_state.randint(2, 9)
    return (
        f"{name} has {boxes} boxes with {each} {thing} each and buys {c} more. How many {thing} does {name} have now?",
        [(boxes, "*", each), (None, "+", c)],
    )


def _days(random_state):
    name, _, thing, _, _, c = _draw(random_state)
    each, days = random_state.randint(2, 9), random_state.randint(2, 9)
    return (
        f"{name} finds {each} {thing} a day for {days} days and gives {c} away. How many {thing} are left?",
        [(each, "*", days), (None, "-", c)],
    )


def _busy(random_state):
    name, other, thing, a, b, c = _draw(random_state)
    d = random_state.randint(2, 20)
    return (
        f"{name} has {a} {thing}, buys {b}, gives {c} to {other} and loses {d}. How many {thing} does {name} have now?",
        [(a, "+", b), (None, "-", c), (None, "-", d)],
    )


TEMPLATES = (
    _what_is, _what_is_long, _buy_give, _find_lose, _table, _more_than, _three, _boxes, _days, _busy,
)  # fmt: skip
