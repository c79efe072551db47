"""The grade of an answer, the same in rewards, infer, score-base, gguf, compare and `stages.grade`.

A row's `answer` is as its dataset writes it, to be taught and shown; here it is read and compared. A row's `kind` names
the rule, with the settings that the source states for it (`number decimal=, tolerance=0.01`):

    number   the same number: `number.py`
    math     mathematically equal: `math.py`
    text     the same words, or one of several if the answer is a JSON list of them: `text.py`
    choice   the same option, by letter, words or both: `text.py`
    python   a program that passes the row's tests, in a sandbox: `sandbox.py`
    scored   from 0 to 1, by the scorer that the kind names (`scored scorer=NAME`): `SCORERS`
"""

import functools
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from stages.lib.answers import gym
from stages.lib.answers.formats import Format
from stages.lib.answers.math import is_readable_math, same_math
from stages.lib.answers.number import FLOAT_TOLERANCE, MAX_TEXT_CHARACTERS, Number, read_number, same_number
from stages.lib.answers.sandbox import passes_tests, program_of
from stages.lib.answers.text import canonical_text, same_choice, same_text
from stages.lib.errors import UserError, nearest
from stages.lib.recipe.tables import Source

KINDS = ("number", "math", "text", "choice", "python", "scored")
# A task's own scorer by name: score(answer, given) is from 0, wrong, to 1, right. `answer` is the row's, as written.
SCORERS: dict[str, Callable[[str, str], float]] = {"reasoning_gym": gym.score}


class Kind(NamedTuple):
    """A row's `kind`: how its answer is graded."""

    name: str
    decimal: str = "."  # number: the sign before the decimals
    tolerance: Fraction = FLOAT_TOLERANCE  # number: of a float that does not end, as a share
    scorer: str = ""  # scored: of `SCORERS`

    def __str__(self) -> str:
        stated = [] if self.decimal == "." else [f"decimal={self.decimal}"]
        stated += [] if self.tolerance == FLOAT_TOLERANCE else [f"tolerance={float(self.tolerance)}"]
        stated += [f"scorer={self.scorer}"] if self.scorer else []
        return " ".join([self.name, *stated])


@functools.lru_cache(256)
def read_kind(text: str) -> Kind:
    """Return the kind that `text` names. Raises `UserError` for an unknown one, naming the nearest."""
    name, *parts = text.split() or [""]
    settings: dict[str, Any] = dict(each.partition("=")[::2] for each in parts)
    try:
        settings["tolerance"] = Fraction(settings.get("tolerance", FLOAT_TOLERANCE))
        kind = Kind(name, **settings)
    except (TypeError, ValueError):
        kind = Kind("")
    if kind.name not in KINDS or kind.decimal not in (".", ","):
        raise UserError(f"unknown kind of answer {text!r}{nearest(name, KINDS)}; known: {', '.join(KINDS)}")
    if kind.name == "scored" and kind.scorer not in SCORERS:
        known = ", ".join(SCORERS)
        raise UserError(f"kind of answer {text!r}: expected 'scored scorer=NAME' with one of the scorers: {known}")
    return kind


def kind_of(source: Source) -> Kind:
    """Return the kind of a source's answers."""
    return Kind(source.answers, source.decimal or ".", Fraction(str(source.tolerance)), source.scorer)


def accepted_answers(answer: str) -> list[str]:
    """Return the answers of which any is right: those of a JSON list of texts, else `answer` itself."""
    try:
        several = json.loads(answer) if answer.startswith("[") else None
    except ValueError:
        return [answer]
    return several if several and all(isinstance(each, str) for each in several) else [answer]


def shown_answer(kind: str, answer: str) -> str:
    """Return the answer to teach and to show: the first of several accepted ones, else the answer as written."""
    rule = read_kind(kind)
    if rule.scorer == "reasoning_gym":
        return gym.right_answer(answer)
    return accepted_answers(answer)[0] if rule.name in ("text", "choice") else answer


@functools.lru_cache(1 << 12)
def grade(kind: str, answer: str, given: str) -> float:
    """Return the grade of `given`, from 0.0, wrong, to 1.0, right, where `answer` is the right one.

    Raises `UserError` for an unknown kind, and where the machine gives no sandbox for one of `python`.
    """
    rule = read_kind(kind)
    if rule.name == "scored":
        score = SCORERS[rule.scorer](answer, given)
        return min(max(float(score), 0.0), 1.0) if math.isfinite(score) else 0.0
    if rule.name == "python":
        return float(passes_tests(answer, given))
    if given.strip() == answer.strip() or max(len(given), len(answer)) > MAX_TEXT_CHARACTERS:
        return float(given.strip() == answer.strip())
    if rule.name == "number":
        true, read = number_of(kind, answer), number_of(kind, given)
        return float(true is not None and read is not None and same_number(true, read, rule.tolerance))
    if rule.name == "math":
        return float(same_math(answer, given))
    same = same_choice if rule.name == "choice" else same_text
    return float(any(same(each, given) for each in accepted_answers(answer)))


def number_of(kind: str, text: str) -> Number | None:
    """Return the number in an answer, right or given; None if it has none, and for kinds other than `number`."""
    rule = read_kind(kind)
    return read_number(text, rule.decimal) if rule.name == "number" else None


def canonical(kind: str, answer: str) -> str | None:
    """Return a form that equal answers of a dataset share, or None for an answer that is none of this kind."""
    rule = read_kind(kind)
    if rule.name == "number":
        number = number_of(kind, answer)
        return None if number is None else str(number.value)
    if rule.name == "math":
        return "".join(answer.split()) if is_readable_math(answer) else None
    if rule.name == "python":
        return program_of(answer).strip() or None
    answer = shown_answer(kind, answer) if rule.name == "scored" else answer
    return (canonical_text(answer) if len(answer) <= MAX_TEXT_CHARACTERS else answer) or None


def mark(answer_format: Format, completion: str, answer: str, kind: str = "number") -> dict[str, Any]:
    """Return the marks of a completion: `well_formed`, `given` (None if it can't be read) and `right`."""
    parts = answer_format.read(completion)
    if parts is None:
        return {"well_formed": False, "given": None, "right": False}
    right = grade(kind, answer, parts.answer) == 1.0
    return {"well_formed": True, "given": canonical(kind, parts.answer), "right": right}
