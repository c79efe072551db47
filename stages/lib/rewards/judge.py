"""The judgement of a completion, made once for all rewards of a suite, and the grade of its answer."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from stages.lib.answers.formats import THINK, XML, Format
from stages.lib.answers.grade import grade
from stages.lib.answers.number import read_number

Completion = str | list[dict[str, Any]]
Reward = Callable[..., Any]  # list[float]; of the user's own list[float | None]


class Judgement(NamedTuple):
    """What the rewards of a suite need to know of one completion."""

    answer: str | None  # what the format reads; None: not well formed
    written: str  # the answer with the white space around it
    integer: bool  # the answer is one bare integer
    exact: bool  # well formed, and the tags as `write` puts them
    tags_in_place: int
    trailing_characters: int


def judge(format: Format, text: str) -> Judgement:
    """Return the judgement of the completion `text`, as `format` reads it."""
    trailing = _count_trailing_characters(format, text)
    parts = format.split(text)
    if parts is None:
        return Judgement(None, "", False, False, _count_tags_in_place(format, text), trailing)
    answer = parts.answer.strip()
    number = read_number(answer)
    integer = number is not None and number.bare and number.value.denominator == 1
    return Judgement(answer, parts.answer, integer, format.is_exact(parts), len(format.tags), trailing)


def _count_tags_in_place(format: Format, text: str) -> int:
    """Count the tags that occur once, after all tags that come before them, and next to a block that is not blank."""
    tags = format.tags
    in_place = 0
    for number, tag in enumerate(tags):
        start, end = text.find(tag), text.find(tag) + len(tag)
        if text.count(tag) != 1 or any(earlier in text[end:] for earlier in tags[:number]):
            continue
        if tag in (format.reasoning_open, format.answer_open):
            closing = text.find(tags[number + 1], end)
            block = text[end:] if closing < 0 else text[end:closing]
        else:
            opening = text.rfind(tags[number - 1], 0, start) if number else -1
            block = text[:start] if opening < 0 else text[opening + len(tags[number - 1]) : start]
        in_place += not (block == "" or block.isspace())
    return in_place


def _count_trailing_characters(format: Format, text: str) -> int:
    """Count what follows the answer, one line break apart; an answer that never closes counts as what follows."""
    for tag in (format.answer_close, format.answer_open):
        position = text.rfind(tag)
        if position >= 0:
            end = position + len(tag)
            return len(text) - end - text.startswith("\n", end)
    return 0


# More completions than this in one batch are judged again by each function: slower, not different.
_CACHED_COMPLETIONS = 4096
judge_xml = functools.lru_cache(_CACHED_COMPLETIONS)(functools.partial(judge, XML))
judge_think = functools.lru_cache(_CACHED_COMPLETIONS)(functools.partial(judge, THINK))


def texts_of(completions: Sequence[Completion]) -> list[str]:
    """Return the text of each completion: a string itself, or the last message of a conversation."""
    return [c if isinstance(c, str) else c[-1]["content"] or "" for c in completions]


def grades(given: Iterable[str | None], answers: Sequence[str], kinds: Sequence[str] | None) -> list[float]:
    """Return from 0.0 to 1.0 the grade of each answer `given`; 0.0 for None, of a completion that is not well formed.

    `kinds` are those of the rows; without them the answers are numbers, and what is none must be the same text.
    """
    rows = zip(given, answers, kinds or ["number"] * len(answers), strict=True)
    return [0.0 if answer is None else grade(kind, true, answer) for answer, true, kind in rows]
