"""The arithmetic of comparing two models, against values worked out by hand."""

import math

import numpy as np
import pytest

from stages.lib.distance import Text, compare_logits, kl_divergence, log_softmax, spread_positions, store_logits
from stages.lib.errors import UserError
from stages.lib.jsonl import first_rows

HALF, SKEWED = [0.0, 0.0], [math.log(3.0), 0.0]  # probabilities 1/2 1/2 and 3/4 1/4


def divergence(reference: list[float], other: list[float]) -> float:
    rows = [log_softmax(np.array([logits], np.float32)) for logits in (reference, other)]
    return float(kl_divergence(*rows)[0])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        (HALF, HALF, 0.0),
        (HALF, SKEWED, 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        (SKEWED, HALF, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ([5.0, 5.0], [-80.0, -80.0], 0.0),
        ([0.0, -math.inf], HALF, math.log(2)),
        ([0.0, -math.inf], [0.0, -math.inf], 0.0),
        (HALF, [0.0, -math.inf], math.inf),
        ([1e4, 0.0], [1e4, 0.0], 0.0),
        (HALF, [math.nan, 0.0], math.nan),
    ],
)
def test_kl_is_that_of_the_two_distributions(reference, other, expected):
    assert divergence(reference, other) == pytest.approx(expected, abs=1e-7, nan_ok=True)


@pytest.mark.torch
def test_kl_sees_a_difference_of_a_ten_millionth_in_a_large_vocabulary():
    chance = np.random.default_rng(0)
    reference = chance.normal(size=(1, 150_000)).astype(np.float32)
    noise = chance.normal(size=reference.shape).astype(np.float32) * np.float32(4e-4)
    found = float(kl_divergence(log_softmax(reference), log_softmax(reference + noise))[0])
    assert found == pytest.approx(8e-8, rel=0.05)  # half the variance of the noise


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (2, 2, [0]),
        (2, 99, [0]),
        (5, 4, [0, 1, 2, 3]),
        (5, 3, [0, 2, 3]),
        (5, 2, [0, 3]),
        (102, 5, [0, 25, 50, 75, 100]),
        (3, 2, [0, 1]),
    ],
)
def test_positions_are_spread_from_the_first_to_the_last_with_a_next_token(length, count, expected):
    assert spread_positions(length, count) == expected


@pytest.mark.parametrize("length", range(2, 40))
@pytest.mark.parametrize("count", [2, 3, 7, 32])
def test_positions_are_distinct_ascending_and_no_more_than_asked_for(length, count):
    positions = spread_positions(length, count)
    assert positions == sorted(set(positions))
    assert len(positions) == min(count, length - 1)
    assert (positions[0], positions[-1]) == (0, length - 2)


@pytest.mark.parametrize(("length", "count"), [(1, 5), (0, 5), (5, 1), (5, 0)])
def test_too_short_a_text_has_no_positions(length, count):
    with pytest.raises(ValueError, match="2 or more"):
        spread_positions(length, count)


TEXTS = [Text([0, 1, 0], [0, 1]), Text([1, 1], [0])]
REFERENCE = np.array([HALF, SKEWED, HALF], np.float32)


@pytest.mark.torch
def test_compare_gives_shares_and_perplexities_over_all_positions(tmp_path):
    path = tmp_path / "reference.npy"
    store_logits(path, TEXTS, 2, iter([REFERENCE[:2], REFERENCE[2:]]))
    other = np.array([SKEWED, SKEWED[::-1], HALF], np.float32)
    found = compare_logits(path, TEXTS, iter([other[:1], other[1:]]))
    divergences = [0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.75 * math.log(3) + 0.25 * math.log(1 / 3), 0.0]
    assert found["positions"] == 3
    assert found["mean_kl"] == pytest.approx(sum(divergences) / 3)
    assert found["max_kl"] == pytest.approx(divergences[1])
    assert found["same_top"] == pytest.approx(2 / 3)  # ties go to the first token
    assert found["reference_perplexity"] == pytest.approx((2 * 4 / 3 * 2) ** (1 / 3))  # of tokens 1, 0, 1
    assert found["perplexity"] == pytest.approx((4 * 4 * 2) ** (1 / 3))


@pytest.mark.torch
def test_chunks_change_nothing(tmp_path, monkeypatch):
    path = tmp_path / "reference.npy"
    store_logits(path, TEXTS, 2, [REFERENCE])
    other = REFERENCE[::-1].copy()
    whole = compare_logits(path, TEXTS, [other])
    monkeypatch.setattr("stages.lib.distance.CHUNK_VALUES", 2)
    assert compare_logits(path, TEXTS, [other[:1], other[1:1], other[1:]]) == whole


@pytest.mark.torch
@pytest.mark.parametrize("rows", [0, 2])
def test_a_model_that_gives_too_few_logits_is_refused(tmp_path, rows):
    path = tmp_path / "reference.npy"
    with pytest.raises(ValueError, match=f"{rows} rows of logits for 3 positions"):
        store_logits(path, TEXTS, 2, [REFERENCE[:rows]])
    store_logits(path, TEXTS, 2, [REFERENCE])
    with pytest.raises(ValueError, match=f"{rows} rows of logits for 3 positions"):
        compare_logits(path, TEXTS, [REFERENCE[:rows]])


def test_another_vocabulary_is_refused(tmp_path):
    path = tmp_path / "reference.npy"
    store_logits(path, TEXTS, 2, [REFERENCE])
    with pytest.raises(ValueError, match="a vocabulary of 3 against the reference's 2"):
        compare_logits(path, TEXTS, [np.zeros((3, 3), np.float32)])


def test_too_few_held_out_problems_are_refused_by_the_knobs_name(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n')
    assert first_rows(path, 1, "[gguf] prompts") == [{"id": "a"}]
    with pytest.raises(UserError, match=r"has 2 problems; \[gguf\] prompts = 3"):
        first_rows(path, 3, "[gguf] prompts")
