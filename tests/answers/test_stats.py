"""Intervals and p values against published figures, and against a count of every case."""

import itertools
import math

import pytest

from stages.lib.answers.stats import holm, mcnemar, p_text, wilson


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # The four of R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (28, 29, 0.8282, 0.9939),  # the last one, mirrored
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_gives_the_published_interval(successes, total, low, high):
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_narrows_with_the_total_and_stays_within_0_and_1():
    for total in (1, 2, 10, 1000, 10**6):
        for successes in (0, 1, total // 2, total):
            low, high = wilson(successes, total)
            assert 0 <= low <= successes / total + 1e-12
            assert successes / total - 1e-12 <= high <= 1
            assert wilson(total - successes, total) == pytest.approx((1 - high, 1 - low))
            assert high - low < math.sqrt(2 / total) * 1.96


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (5, 0, 0.0625),  # 2 / 2^5
        (8, 1, 0.0390625),  # 2 (1 + 9) / 2^9
        (150, 86, 3.716e-05),  # the approval ratings of A. Agresti, Categorical Data Analysis
    ],
)
def test_mcnemar_gives_the_exact_two_sided_p(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-3)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@pytest.mark.parametrize("total", range(1, 11))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(total):
    for gained in range(total + 1):
        uneven = abs(2 * gained - total)
        tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=total)]
        assert mcnemar(gained, total - gained) == pytest.approx(
            sum(abs(2 * heads - total) >= uneven for heads in tosses) / 2**total
        )


def test_a_p_too_small_for_a_float_is_not_said_to_be_zero():
    assert [p_text(mcnemar(*pairs)) for pairs in ((5, 0), (655, 7), (1284, 0))] == [
        "p = 0.062", "p = 1.1e-183", "p < 1e-300",
    ]  # fmt: skip


@pytest.mark.parametrize(("values", "corrected"), [  # R 4.3: p.adjust(values, "holm")
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.02, 0.02], [0.04, 0.04]),
    ([0.9, 0.8, 0.001], [1.0, 1.0, 0.003]),
    ([0.2], [0.2]),
    ([], []),
])  # fmt: skip
def test_holm_corrects_for_the_number_of_tests(values, corrected):
    assert holm(values) == pytest.approx(corrected)
