"""Statistics of shares: intervals and paired comparisons."""

import math
from collections.abc import Sequence


def wilson(successes: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a share; z = 1.96 is 95%. With a total of 0 it is (0, 1).

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test: `gained` against `lost` among the pairs that differ.

    Q. McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12 (1947).
    """
    total = gained + lost
    tail = sum(math.comb(total, count) for count in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / 2**total))


def p_text(p: float) -> str:
    """Return "p = 0.062", or "p < 1e-300" where the exact value is too small for a float, which then holds 0."""
    return "p < 1e-300" if p < 1e-300 else f"p = {p:.2g}"


def holm(values: Sequence[float]) -> list[float]:
    """Return the p `values` of several tests, each corrected for their number, in the same order.

    S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected
