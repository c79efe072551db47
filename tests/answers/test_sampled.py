"""pass@k and the majority of k: right by hand and by counting every choice, and what does not vote."""

import itertools
import random
from collections import Counter

import pytest

from stages.lib.answers.sampled import Vote, counts_of, figures_of_samples, majority, majority_at, pass_at


@pytest.mark.parametrize(
    ("samples", "counts"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])],
)
def test_the_powers_of_two_are_stated_and_all_samples(samples: int, counts: list[int]) -> None:
    assert counts_of(samples) == counts


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_right_one(samples: int) -> None:
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        chosen = list(itertools.combinations([place < right for place in range(samples)], k))
        assert pass_at(right, samples, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_is_known_where_it_is_known() -> None:
    assert pass_at(0, 8, 8) == 0
    assert pass_at(1, 8, 8) == 1
    assert pass_at(2, 8, 1) == pytest.approx(0.25)
    assert pass_at(1, 200, 100) == pytest.approx(0.5)  # of the paper's size


def test_pass_at_k_is_unbiased_where_one_minus_a_power_is_not() -> None:
    """Eight answers, each right with probability 0.3: on average pass@4 is 1 - 0.7^4."""
    chance = random.Random(0)
    drawn = [sum(chance.random() < 0.3 for _ in range(8)) for _ in range(20_000)]
    assert sum(pass_at(right, 8, 4) for right in drawn) / len(drawn) == pytest.approx(1 - 0.7**4, abs=0.006)
    naive = sum(1 - (1 - right / 8) ** 4 for right in drawn) / len(drawn)
    assert abs(naive - (1 - 0.7**4)) > 0.03


def votes(*texts: str | None, right: str = "7") -> list[Vote]:
    return [Vote(text, text == right) for text in texts]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("7",), 1),
        (("8",), 0),
        ((None,), 0),
        (("7", "7", "8"), 1),
        (("7", "8", "8"), 0),
        (("7", "8"), 0.5),  # a tie goes to either alike
        (("7", "8", "9"), 1 / 3),
        (("7", None, None, None), 1),  # what can't be read does not vote
        ((None, None), 0),
        (("7", "7", "8", "8", "9"), 0.5),
    ],
)
def test_the_answer_given_most_often_wins(given: tuple[str | None, ...], expected: float) -> None:
    assert majority(votes(*given)) == pytest.approx(expected)
    assert majority(votes(*reversed(given))) == pytest.approx(expected)


def test_a_majority_of_k_is_over_whole_runs_of_k_in_their_order() -> None:
    own = votes("7", "7", "8", "8", "8", "7", "7")
    assert majority_at(own, 1) == pytest.approx(4 / 7)
    assert majority_at(own, 2) == pytest.approx((1 + 0 + 0.5) / 3)  # 7 7, 8 8, 8 7; the last is left over
    assert majority_at(own, 3) == pytest.approx((1 + 0) / 2)
    assert majority_at(own, 7) == 1


def test_the_majority_of_k_has_the_expectation_of_k_independent_answers() -> None:
    chance = random.Random(1)
    drawn = [votes(*chance.choices(["7", "8", "9"], [0.5, 0.3, 0.2], k=8)) for _ in range(20_000)]
    found = sum(majority_at(own, 4) for own in drawn) / len(drawn)
    exact = 0.0
    for four in itertools.product([("7", 0.5), ("8", 0.3), ("9", 0.2)], repeat=4):
        counts = Counter(text for text, _ in four)
        winners = [text for text, count in counts.items() if count == max(counts.values())]
        weight = 1.0
        for _, probability in four:
            weight *= probability
        exact += weight * ("7" in winners) / len(winners)
    assert found == pytest.approx(exact, abs=0.006)


def test_means_are_over_problems_with_their_interval() -> None:
    found = figures_of_samples([votes("7", "8"), votes("8", "8"), votes("7", "7"), votes(None, None)])
    assert (found["problems"], found["samples"]) == (4, 2)
    assert {k: each["share"] for k, each in found["pass_at"].items()} == {"1": 3 / 8, "2": 0.5}
    assert {k: each["share"] for k, each in found["majority_at"].items()} == {"1": 3 / 8, "2": 3 / 8}
    assert found["pass_at"]["2"]["interval"] == pytest.approx([0.1500, 0.8500], abs=1e-4)  # Wilson, 2 of 4
