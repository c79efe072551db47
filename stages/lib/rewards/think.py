"""Rewards of the suite `think`: shape and answer of `<think>` and `<SOLUTION>`."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from stages.lib.answers.formats import THINK
from stages.lib.answers.number import canonical_number
from stages.lib.rewards.judge import _CACHED_COMPLETIONS, Completion, is_right, judge_think, texts_of

# --- suite think ----------------------------------------------------------------------------------------------------


def match_format_exactly(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 3.0 for a well-formed completion."""
    return [0.0 if j.answer is None else 3.0 for j in map(judge_think, texts_of(completions))]


def match_format_approximately(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Pay 0.5 for each of the three tags that is in its place, -1.0 for each that is not and for a second `<think>`."""
    rewards = []
    for text in texts_of(completions):
        in_place = judge_think(text).tags_in_place
        rewards.append(1.5 * in_place - len(THINK.tags) - (THINK.reasoning_open in text))
    return rewards


def check_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """Pay by how near the answer is.

    5.0 the canonical answer to the letter; 3.5 the same after stripping white space, commas, units and words; 2.0
    within 10% and 1.5 within 20% of it; -2.5 another number; -4.5 not one number; -2.0 not well formed.
    """
    rewards = []
    for text, true in zip(texts_of(completions), answer, strict=True):
        judgement = judge_think(text)
        if judgement.answer is None:
            rewards.append(-2.0)
        elif judgement.written == true:
            rewards.append(5.0)
        elif is_right(judgement, true):
            rewards.append(3.5)
        elif judgement.canonical is None:
            rewards.append(-4.5)
        else:
            rewards.append(_nearness(judgement.canonical, canonical_number(true)))
    return rewards


def check_numbers(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> list[float]:
    """Pay 3.5 for the right number, -1.5 for a wrong one, -2.5 for none or several, 0.0 if the true answer is none."""
    rewards = []
    for text, true in zip(texts_of(completions), answer, strict=True):
        number, true_number = judge_think(text).canonical, canonical_number(true)
        if true_number is None:
            rewards.append(0.0)
        elif number is None:
            rewards.append(-2.5)
        else:
            rewards.append(3.5 if number == true_number else -1.5)
    return rewards


def _nearness(number: str, true: str | None) -> float:
    """Give the part payment for a wrong number. Exact: nothing is divided, so a true answer of 0 has no near miss."""
    if true is None:
        return -2.5
    above, below = _ratio(number)
    true_above, true_below = _ratio(true)
    miss, size = abs(above * true_below - true_above * below), abs(true_above * below)
    if miss * 10 <= size:
        return 2.0
    if miss * 5 <= size:
        return 1.5
    return -2.5


@functools.lru_cache(_CACHED_COMPLETIONS)
def _ratio(canonical: str) -> tuple[int, int]:
    return Fraction(canonical).as_integer_ratio()
