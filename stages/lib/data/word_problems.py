"""Generated arithmetic word problems with checkable answers, for the training and evaluation of the tiny model."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eve", "Max", "Zoe", "Leo", "Ida", "Kim", "Jan")
THINGS = ("apples", "books", "coins", "pens", "eggs", "cards", "cups", "shells", "nuts", "stamps", "plums", "beads")
LARGEST = 60  # what two layers learn in two minutes
SKIPPED = "That is easy."  # the solution's text where the working is skipped

# The question, the steps from left to right, and what is drawn besides two names, a thing and a, b, c from 2 to 25.
_FACTORS = range(2, 10)
TEMPLATES: tuple[tuple[str, str, dict[str, Sequence[Any]]], ...] = (
    ("What is {a} {sign} {b}?", "{a} {sign} {b}", {"sign": "+-"}),
    ("What is {a} {sign} {b} {then} {c}?", "{a} {sign} {b} {then} {c}", {"sign": "+-", "then": "+-"}),
    ("{name} has {a} {thing}. {name} buys {b} more and gives {c} away. How many {thing} does {name} have now?",
     "{a} + {b} - {c}", {}),
    ("{name} loses {a} of {b} {thing} and then finds {c}. How many {thing} does {name} have now?",
     "{b} - {a} + {c}", {}),
    ("There are {a} {thing} on a table. {name} takes {b} and {other} takes {c}. How many {thing} are left?",
     "{a} - {b} - {c}", {}),
    ("{name} has {a} {thing}. {other} has {b} more than {name}. How many {thing} do they have together?",
     "{a} + {b} + {a}", {}),
    ("{name} has {a} {thing} and {other} has {b}. They buy {c} more. How many {thing} do they have together?",
     "{a} + {b} + {c}", {}),
    ("{name} has {n} boxes with {each} {thing} each and buys {c} more. How many {thing} does {name} have now?",
     "{n} * {each} + {c}", {"each": _FACTORS, "n": _FACTORS}),
    ("{name} finds {each} {thing} a day for {days} days and gives {c} away. How many {thing} are left?",
     "{each} * {days} - {c}", {"each": _FACTORS, "days": _FACTORS}),
    ("{name} has {a} {thing}, buys {b}, gives {c} to {other} and loses {d}. How many {thing} does {name} have now?",
     "{a} + {b} - {c} - {d}", {"d": range(2, 21)}),
)  # fmt: skip


class Problem(NamedTuple):
    """A question, its answer (a whole number, zero or more) and the working, one step a line."""

    question: str
    answer: int
    working: str


def problem(random_state: random.Random) -> Problem:
    """Return one problem of one to three steps, every intermediate result from 0 to LARGEST."""
    while True:
        question, steps, extra = random_state.choice(TEMPLATES)
        name, other = random_state.sample(NAMES, 2)
        values: dict[str, Any] = {"name": name, "other": other, "thing": random_state.choice(THINGS)}
        values |= {letter: random_state.randint(2, 25) for letter in "abc"}
        values |= {key: random_state.choice(choices) for key, choices in extra.items()}
        first, *rest = steps.format(**values).split()
        total, lines = int(first), []
        for sign, right in zip(rest[::2], rest[1::2], strict=True):
            result = _result(total, sign, int(right))
            lines.append(f"{total}{sign}{right}={result}")
            total = result
            if not 0 <= total <= LARGEST:
                break
        else:
            return Problem(question.format(**values), total, "\n".join(lines))


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
        if 0 <= _result(left, sign, right) <= LARGEST:
            made.append(f"{left}{sign}{right}={_result(left, sign, right)}")
    return made


def _result(left: int, sign: str, right: int) -> int:
    """Return `left` plus, minus or times `right`."""
    return {"+": left + right, "-": left - right, "*": left * right}[sign]
