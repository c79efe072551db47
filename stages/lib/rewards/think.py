"""Rewards of the suite `think`: shape and answer of `<think>` and `<SOLUTION>`."""

from collections.abc import Iterator, Sequence
from typing import Any

from stages.lib.answers.formats import THINK
from stages.lib.answers.grade import number_of
from stages.lib.answers.number import Number, canonical_number
from stages.lib.rewards.judge import Completion, Judgement, grades, judge_think, texts_of


def match_format_exactly(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 3.0 for a well-formed completion."""
    return [0.0 if j.answer is None else 3.0 for j in map(judge_think, texts_of(completions))]


def match_format_approximately(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 0.5 for each of the three tags in its place, -1.0 for each that is not and for a second `<think>`."""
    texts = texts_of(completions)
    return [1.5 * judge_think(t).tags_in_place - len(THINK.tags) - (THINK.reasoning_open in t) for t in texts]


def check_answer(
    completions: Sequence[Completion], answer: Sequence[str], kind: Sequence[str] | None = None, **columns: Any
) -> list[float]:
    """Reward by how near the answer is.

    5.0 the true answer to the letter; 3.5 the same written differently; 2.0 within 10% and 1.5 within 20% of it; -2.5
    another number; -4.5 not one number; -2.0 not well formed. Where the answer is no number: 3.5 times a score, if
    there is one, and -2.5 for a wrong answer.
    """
    rewards = []
    for judgement, true, rule, score in _graded(completions, answer, kind):
        if judgement.answer is None:
            rewards.append(-2.0)
        elif score and judgement.written in (true, canonical_number(true)):
            rewards.append(5.0)
        elif score:
            rewards.append(3.5 * score)
        elif not rule.startswith("number"):
            rewards.append(-2.5)
        else:
            rewards.append(_reward_nearness(number_of(rule, judgement.answer), number_of(rule, true)))
    return rewards


def check_numbers(
    completions: Sequence[Completion], answer: Sequence[str], kind: Sequence[str] | None = None, **columns: Any
) -> list[float]:
    """Reward 3.5 for the right number, -1.5 for a wrong one, -2.5 for none or several; 0.0 if the true one is none."""
    rewards = []
    for judgement, true, rule, score in _graded(completions, answer, kind):
        if number_of(rule, true) is None:
            rewards.append(0.0)
        elif score == 1.0:
            rewards.append(3.5)
        else:
            rewards.append(-2.5 if number_of(rule, judgement.answer or "") is None else -1.5)
    return rewards


def _graded(
    completions: Sequence[Completion], answers: Sequence[str], kinds: Sequence[str] | None
) -> Iterator[tuple[Judgement, str, str, float]]:
    """Return, of each completion, its judgement, the true answer, its kind and the grade."""
    judgements = list(map(judge_think, texts_of(completions)))
    rules = kinds or ["number"] * len(answers)
    return zip(judgements, answers, rules, grades((j.answer for j in judgements), answers, rules), strict=True)


def _reward_nearness(number: Number | None, true: Number | None) -> float:
    """Return the reward of a wrong answer. Nothing is divided, so a true answer of 0 has no near miss."""
    if number is None or true is None:
        return -4.5 if number is None else -2.5
    (above, below), (true_above, true_below) = number.value.as_integer_ratio(), true.value.as_integer_ratio()
    miss, size = abs(above * true_below - true_above * below), abs(true_above * below)
    if miss == 0 or miss * 5 > size:  # 0: the right number of something else
        return -2.5
    return 2.0 if miss * 10 <= size else 1.5
