"""What a model's greedy answers to the validation set come to, while it is trained."""

from collections.abc import Sequence
from typing import TypedDict


class Evaluated(TypedDict):
    """The model after a `step` of GRPO (0: before it) on the validation set. `right`: answers; `tokens`: mean."""

    step: int
    right: int
    accuracy: float
    tokens: float
    cut_off: float


class Validation(TypedDict):
    """The evaluations of a training run. `keep`: "best" or "last"; `kept`: that of the adapter that was kept."""

    problems: int
    keep: str
    kept: Evaluated
    evaluations: list[Evaluated]


def figures_of_answers(step: int, found: Sequence[tuple[bool, int, bool]]) -> Evaluated:
    """Return the figures of a step's answers: of each whether it is right, its tokens, and whether it ended."""
    right, total = sum(is_right for is_right, _, _ in found), len(found)
    return {
        "step": step,
        "right": right,
        "accuracy": right / total,
        "tokens": sum(tokens for _, tokens, _ in found) / total,
        "cut_off": sum(not has_end for _, _, has_end in found) / total,
    }


def best(evaluations: Sequence[Evaluated]) -> Evaluated:
    """Return the evaluation with the most right answers among those after the first step; of several, the earliest."""
    return max((each for each in evaluations if each["step"]), key=lambda each: (each["right"], -each["step"]))
