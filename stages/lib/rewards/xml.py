"""Rewards of the suite `xml`: tags, shape and answer of `<reasoning>` and `<answer>`."""

from collections.abc import Sequence
from typing import Any

from stages.lib.rewards.judge import Completion, grades, judge_xml, texts_of


def xmlcount(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 0.125 for each of the four tags that is in its place, less 0.001 for each character after the answer."""
    return [0.125 * j.tags_in_place - 0.001 * j.trailing_characters for j in map(judge_xml, texts_of(completions))]


def soft_format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 0.5 for a well-formed completion, however its lines are broken."""
    return [0.0 if j.answer is None else 0.5 for j in map(judge_xml, texts_of(completions))]


def strict_format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 0.5 for a well-formed completion with each tag on a line of its own."""
    return [0.5 if j.exact else 0.0 for j in map(judge_xml, texts_of(completions))]


def integer(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 0.5 for an answer that is one integer and nothing else, right or wrong. Recipes and logs call it `int`."""
    return [0.5 if j.integer else 0.0 for j in map(judge_xml, texts_of(completions))]


integer.__name__ = "int"


def correctness(
    completions: Sequence[Completion], answer: Sequence[str], kind: Sequence[str] | None = None, **columns: Any
) -> list[float]:
    """Reward 2.0 for the right answer of a well-formed completion, in any form; 2.0 times the score if it has one."""
    judgements = map(judge_xml, texts_of(completions))
    return [2.0 * score for score in grades((j.answer for j in judgements), answer, kind)]
