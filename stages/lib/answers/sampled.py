"""What several sampled answers to each problem come to: pass@k, and the accuracy of the majority of k."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from stages.lib.answers.stats import wilson


class Vote(NamedTuple):
    """A sampled answer: its canonical form, None where none could be read, and whether it is right."""

    given: str | None
    right: bool


class Share(TypedDict):
    """A mean over problems, and Wilson's interval at 95% of it, which is wide for values between 0 and 1."""

    share: float
    interval: list[float]


class Sampled(TypedDict):
    """A model's `samples` answers to each problem: `pass_at` and `majority_at`, by k as a text."""

    problems: int
    samples: int
    pass_at: dict[str, Share]
    majority_at: dict[str, Share]


def counts_of(samples: int) -> list[int]:
    """Return the k that are stated: the powers of two below `samples`, and that."""
    return [*(1 << place for place in range((samples - 1).bit_length())), samples] if samples > 1 else [1]


def pass_at(right: int, samples: int, k: int) -> float:
    """Return the probability that of `k` answers, drawn without repetition out of `samples`, one or more is right.

    The unbiased estimator of M. Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at(votes: Sequence[Vote], k: int) -> float:
    """Return the share of right majorities of `k` answers, over whole runs of k `votes` in their order.

    The answer that was given most often wins; of several, each with the same probability. An answer that could not be
    read does not vote, and without any vote the answer is wrong. X. Wang et al., Self-Consistency (arXiv 2203.11171).
    """
    runs = [votes[first : first + k] for first in range(0, len(votes) - k + 1, k)]
    return sum(map(majority, runs)) / len(runs)


def majority(votes: Sequence[Vote]) -> float:
    """Return the probability that the winner of `votes` is right."""
    counts = Counter(vote.given for vote in votes if vote.given is not None)
    winners = [given for given, count in counts.items() if count == max(counts.values())]
    rights = [[vote.right for vote in votes if vote.given == winner] for winner in winners]
    return sum(sum(own) / len(own) for own in rights) / len(winners) if winners else 0.0


def figures_of_samples(problems: Sequence[Sequence[Vote]]) -> Sampled:
    """Return the figures of equally many answers to each problem."""
    samples, total = len(problems[0]), len(problems)
    rights = [sum(vote.right for vote in votes) for votes in problems]

    def mean(values: Sequence[float]) -> Share:
        return {"share": sum(values) / total, "interval": list(wilson(sum(values), total))}

    counts = counts_of(samples)
    return {
        "problems": total,
        "samples": samples,
        "pass_at": {str(k): mean([pass_at(right, samples, k) for right in rights]) for k in counts},
        "majority_at": {str(k): mean([majority_at(votes, k) for votes in problems]) for k in counts},
    }
