"""Rewards for any format: right answers by kind (`math_correct`, `python_tests`, `reasoning_gym`) and two penalties."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stages.lib.answers.formats import Format
from stages.lib.rewards.judge import Completion, grades, texts_of


def math_correct(
    completions: Sequence[Completion],
    answer: Sequence[str],
    kind: Sequence[str] | None = None,
    *,
    format: Format,
    **columns: Any,
) -> list[float]:
    """Reward 1.0 for an answer mathematically equal to the true one (math-verify: LaTeX, fractions, sets), else 0.0.

    Rows of a kind are graded as that kind. Where the true answer is a number, so must the answer be: `17 + 25` is not
    an answer to 17 + 25. An answer that takes more than half a second of processor time is wrong.
    """
    parts = map(format.read, texts_of(completions))
    return grades((read.answer if read else None for read in parts), answer, kind or ["math"] * len(answer))


def python_tests(
    completions: Sequence[Completion],
    answer: Sequence[str],
    kind: Sequence[str] | None = None,
    *,
    format: Format,
    **columns: Any,
) -> list[float]:
    """Reward 1.0 for a program that passes all tests of its row, else 0.0. Each runs in a sandbox of its own.

    `answer` is the column of the tests. Rows of another kind are graded as that kind.
    """
    parts = [format.read(text) for text in texts_of(completions)]
    given = [read.answer if read else None for read in parts]
    kinds = kind or ["python"] * len(answer)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # grades wait for processes
        return list(
            pool.map(lambda row: grades([row[0]], [row[1]], [row[2]])[0], zip(given, answer, kinds, strict=True))
        )


def reasoning_gym(
    completions: Sequence[Completion],
    answer: Sequence[str],
    kind: Sequence[str] | None = None,
    *,
    format: Format,
    **columns: Any,
) -> list[float]:
    """Reward the score of the answer by its row's task of reasoning-gym, from 0.0 to 1.0, which alone is right.

    0.0 if the completion is not well formed, or if scoring takes more than half a second of processor time. Rows of
    another kind are graded as that kind.
    """
    parts = map(format.read, texts_of(completions))
    kinds = kind or ["scored scorer=reasoning_gym"] * len(answer)
    return grades((read.answer if read else None for read in parts), answer, kinds)


def length_penalty(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_tokens: int,
    length_cache_tokens: int,
    **columns: Any,
) -> list[float]:
    """Reward 0 up to `max_completion_tokens - length_cache_tokens` tokens, from there down to -1.0 at the maximum.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).
    """
    free_tokens = max_completion_tokens - length_cache_tokens
    return [max(min(free_tokens - len(ids), 0) / length_cache_tokens, -1.0) for ids in completion_ids]


def repetition_penalty(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    repetition_ngram_tokens: int,
    repetition_max_penalty: float,
    **columns: Any,
) -> list[float]:
    """Reward minus `repetition_max_penalty` times the share of a completion's token n-grams that it had before.

    The repetition penalty of arXiv 2502.03373, appendix C.2. A completion shorter than one n-gram costs nothing.
    """
    rewards = []
    for ids in completion_ids:
        ngrams = len(ids) - repetition_ngram_tokens + 1
        shifted = (ids[start : start + ngrams] for start in range(repetition_ngram_tokens))
        new = len(set(zip(*shifted, strict=True))) / ngrams if ngrams > 0 else 1.0
        rewards.append(repetition_max_penalty * (new - 1.0))
    return rewards
