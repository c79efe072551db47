"""The reward `math_correct`: 1 for an answer that is mathematically equal to the true one."""

from collections.abc import Sequence
from typing import Any

from stages.lib.answers.formats import Format
from stages.lib.answers.grade import grade
from stages.lib.rewards.judge import Completion, texts_of


def math_correct(
    completions: Sequence[Completion],
    answer: Sequence[str],
    kind: Sequence[str] | None = None,
    *,
    format: Format,
    **columns: Any,
) -> list[float]:
    """Pay 1.0 for an answer mathematically equal to the true one (math-verify: LaTeX, fractions, sets), else 0.0.

    Rows of a kind are graded as that kind. Where the true answer is a number, so must the answer be: `17 + 25` is not
    an answer to 17 + 25. An answer that takes more than half a second of processor time is wrong.
    """
    rewards = []
    for text, true, rule in zip(texts_of(completions), answer, kind or ["math"] * len(answer), strict=True):
        read = format.read(text)
        rewards.append(0.0 if read is None else grade(rule, true, read.answer))
    return rewards
