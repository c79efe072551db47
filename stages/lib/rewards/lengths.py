"""Rewards for any format that go by length: `length_penalty` (DAPO) and `repetition_penalty`."""

from collections.abc import Sequence
from typing import Any

from stages.lib.rewards.judge import Completion

# --- for any format -------------------------------------------------------------------------------------------------


def length_penalty(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_completion_tokens: int,
    length_cache_tokens: int,
    **columns: Any,
) -> list[float]:
    """Pay 0 up to `max_completion_tokens - length_cache_tokens` tokens, from there down to -1.0 at the maximum.

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
    """Pay minus `repetition_max_penalty` times the share of a completion's token n-grams that it had before.

    The repetition penalty of arXiv 2502.03373, appendix C.2. A completion shorter than one n-gram costs nothing.
    """
    rewards = []
    for ids in completion_ids:
        ngrams = len(ids) - repetition_ngram_tokens + 1
        shifted = (ids[start : start + ngrams] for start in range(repetition_ngram_tokens))
        new = len(set(zip(*shifted, strict=True))) / ngrams if ngrams > 0 else 1.0
        rewards.append(repetition_max_penalty * (new - 1.0))
    return rewards
