"""What counts as the same question, as nearly the same and as too close; each checked against a plain loop."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from stages.lib.data.duplicates import Grams, contaminated, exact_duplicates, jaccard, near_duplicates
from stages.lib.data.fingerprint import Fingerprints, fingerprint

WORDS = [f"w{i}" for i in range(500)]


def ids(*questions: str) -> list[int]:
    return fingerprint(list(questions), 3).ids.tolist()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is 3+4?", "what IS  3 + 4 ?"),
        ("a\nb\tc", " a b c "),
        ("Stra\u00dfe", "STRASSE"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\u00a0b", "a b"),
        ("nul\0byte", "nul byte"),
    ],
)
def test_case_and_white_space_do_not_make_another_question(left: str, right: str) -> None:
    assert len(set(ids(left, right))) == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is 3+4?", "What is 3-4?"),
        ("What is 34?", "What is 3 4?"),
        ("x^2", "x_2"),
        ("3.5", "35"),
        ("a b", "b a"),
        ("a", "a a"),
        ("ab c", "a bc"),
        ("\u4e94", "\u516d"),
        ("x\u00b2", "x2"),
    ],
)
def test_any_other_sign_digit_or_order_does(left: str, right: str) -> None:
    assert len(set(ids(left, right))) == 2


def test_a_fingerprint_does_not_depend_on_what_is_in_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(0)
    questions = [
        " ".join(dice.choices(WORDS, k=dice.randint(1, 30))) + dice.choice(["", "\u00e9\0", " ?"]) for _ in range(50)
    ]
    alone = [fingerprint([question], 4) for question in questions]
    together = fingerprint(questions, 4)
    monkeypatch.setattr("stages.lib.data.fingerprint.MAX_CHARACTERS", 100)
    for whole in (together, fingerprint(questions, 4)):
        assert whole.ids.tolist() == [one.ids[0] for one in alone]
        assert whole.counts.tolist() == [one.counts[0] for one in alone]
        assert whole.bands.tolist() == [one.bands[0].tolist() for one in alone]
        assert whole.grams.tolist() == [gram for one in alone for gram in one.grams]


def test_the_hash_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Sets are split by it: another value would move problems from one set to another.
    assert [f"{number:016x}" for number in ids("What is 3+4?", "Caf\u00e9")] == ["04889993c01c7dfb", "77d7b445108733f9"]


def test_hashes_are_spread_evenly() -> None:
    found = np.array(ids(*(f"What is {a} + {b}?" for a in range(100) for b in range(100))))
    assert len(set(found.tolist())) == 10_000
    shares = np.bincount((found / 2.0**64 * 10).astype(int), minlength=10) / len(found)
    assert shares.min() > 0.09
    assert shares.max() < 0.11


def table(questions: list[str], tmp_path: Path, words: int = 3) -> tuple[Fingerprints, Grams]:
    prints = fingerprint(questions, words)
    files = [(tmp_path / name).open("w+b") for name in ("one", "other")]
    pieces = []
    first = 0
    for number, rows in enumerate(np.array_split(prints.counts, min(3, len(questions)))):  # as three batches
        file = files[number % 2]
        pieces.append((file, file.tell(), len(rows)))
        file.write(prints.grams[first : first + rows.sum()].tobytes())
        first += rows.sum()
    for file in files:
        file.flush()
    return prints, Grams(pieces, prints.counts)


def grams_of(question: str, words: int) -> set[tuple[str, ...]]:
    parts = re.findall(r"[a-z0-9]+|[^a-z0-9\s]", question.lower())
    return {tuple(parts[i : i + words]) for i in range(max(len(parts) - words + 1, 1))}


def some_questions(count: int) -> list[str]:
    """Random questions, of which about every third is an earlier one with at most three words changed."""
    dice = random.Random(1)
    made: list[list[str]] = []
    for _ in range(count):
        if made and dice.random() < 0.35:
            words = list(dice.choice(made))
            for _ in range(dice.randint(0, 3)):
                words[dice.randrange(len(words))] = dice.choice(WORDS)
        else:
            words = dice.choices(WORDS, k=dice.randint(2, 60)) * dice.choice((1, 1, 1, 2))
        made.append(words)
    return [" ".join(words) for words in made]


def test_the_jaccard_index_is_that_of_the_sets_of_n_grams(tmp_path: Path) -> None:
    questions = some_questions(60)
    _, grams = table(questions, tmp_path)
    left, right = (side.ravel() for side in np.meshgrid(np.arange(60), np.arange(60)))
    sets = [grams_of(question, 3) for question in questions]
    expected = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in zip(left, right, strict=True)]
    assert jaccard(grams, left, right).tolist() == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_near_duplicates_are_what_a_loop_over_all_pairs_finds(tmp_path: Path, threshold: float) -> None:
    questions = some_questions(600)
    prints, grams = table(questions, tmp_path)
    sets = [grams_of(question, 3) for question in questions]
    expected = {
        later
        for later in range(600)
        if any(len(sets[later] & sets[first]) / len(sets[later] | sets[first]) >= threshold for first in range(later))
    }
    row, other, alike = near_duplicates(np.arange(600), prints.bands, grams, threshold)
    assert len(expected) > 20
    assert set(row.tolist()) <= expected
    assert len(set(row.tolist())) >= 0.95 * len(expected)
    assert len(set(row.tolist())) == len(row)
    assert (other < row).all()
    assert (alike >= threshold).all()


def test_near_duplicates_looks_only_at_the_rows_it_is_given(tmp_path: Path) -> None:
    questions = ["one two three four five six"] * 4
    prints, grams = table(questions, tmp_path)
    row, other, alike = near_duplicates(np.array([1, 3]), prints.bands, grams, 0.8)
    assert (row.tolist(), other.tolist(), alike.tolist()) == ([3], [1], [1.0])


@pytest.mark.parametrize("limit", [1, 50, 1 << 21])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
def test_contamination_is_what_a_loop_over_all_pairs_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, limit: int
) -> None:
    monkeypatch.setattr("stages.lib.data.duplicates.MAX_GRAMS", limit)
    questions = some_questions(200)
    _, grams = table(questions, tmp_path)
    sets = [grams_of(question, 3) for question in questions]
    evaluated, trained = np.arange(0, 200, 4), np.array([i for i in range(200) if i % 4])
    expected = {}
    for i in trained.tolist():
        best = max(len(sets[i] & sets[j]) / min(len(sets[i]), len(sets[j])) for j in evaluated.tolist())
        if best >= threshold:
            expected[i] = pytest.approx(best)
    row, like, overlap = contaminated(evaluated, trained, grams, threshold)
    assert len(expected) > 5
    assert dict(zip(row.tolist(), overlap.tolist(), strict=True)) == expected
    for i, j, value in zip(row.tolist(), like.tolist(), overlap.tolist(), strict=True):
        assert j % 4 == 0
        assert len(sets[i] & sets[j]) / min(len(sets[i]), len(sets[j])) == pytest.approx(value)


def test_an_eval_problem_inside_a_longer_one_counts_in_full(tmp_path: Path) -> None:
    inner = "a train leaves at nine and arrives at noon"
    _, grams = table([inner, f"Once upon a time {inner} and so on and so forth until the end of the day"], tmp_path)
    row, like, overlap = contaminated(np.array([0]), np.array([1]), grams, 1.0)
    assert (row.tolist(), like.tolist(), overlap.tolist()) == ([1], [0], [1.0])


EVALUATED = "小明有12个苹果，他给了小红5个，又买了8个，请问小明现在一共有多少个苹果？"


@pytest.mark.parametrize(
    ("evaluated", "trained"),
    [
        (EVALUATED, "请解答下面的问题。" + EVALUATED),
        (EVALUATED, EVALUATED.replace("，", ", ").replace("？", "?")),
        (EVALUATED, EVALUATED.replace("12", "\uff11\uff12")),
        (
            "Zack's locker is half as big as Timothy's \"red\" locker.",
            "Zack’s locker is half as big as Timothy’s “red” locker.",
        ),
        ("How many apples has Tom? He bought 3 - 1.", "How\u200b many apples has Tom?\u200b He bought 3 − 1."),
        ("รถไฟวิ่งด้วยความเร็ว 60 กิโลเมตรต่อชั่วโมง", "โจทย์: รถไฟวิ่งด้วยความเร็ว 60 กิโลเมตรต่อชั่วโมง"),
    ],
)
def test_other_spellings_and_scripts_without_blanks_hide_no_eval_problem(
    evaluated: str, trained: str, tmp_path: Path
) -> None:
    _, grams = table(
        [evaluated, trained, "An altogether other question of some 12 words and signs, is it not?"], tmp_path, 8
    )
    row, like, overlap = contaminated(np.array([0]), np.array([1, 2]), grams, 0.5)
    assert (row.tolist(), like.tolist()) == ([1], [0])
    assert overlap[0] > 0.7


def test_signs_that_are_not_ascii_tell_questions_apart_and_stand_alone() -> None:
    assert len(set(ids("3×4?", "3÷4?", "3 4?"))) == 3
    assert len(set(ids("3×4?", "3 × 4?"))) == 1
    assert len(set(ids("3² = 9?", "32 = 9?"))) == 2


def test_grams_are_read_back_row_by_row_and_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints, grams = table(some_questions(30), tmp_path)
    ends = np.cumsum(prints.counts)
    expected = [prints.grams[end - count : end].tolist() for end, count in zip(ends, prints.counts, strict=True)]
    order = np.array([5, 0, 29, 5])
    assert grams.of(order).tolist() == [value for row in order for value in expected[row]]
    monkeypatch.setattr("stages.lib.data.duplicates.MAX_GRAMS", 40)
    seen = list(grams.chunks())
    assert [first for first, _, _ in seen][1:] == [last for _, last, _ in seen][:-1]
    assert seen[-1][1] == 30
    assert [value for _, _, values in seen for value in values.tolist()] == [value for row in expected for value in row]


def test_exact_duplicates_point_to_the_first() -> None:
    assert exact_duplicates(np.array([7, 3, 7, 7, 3], np.uint64)).tolist() == [0, 1, 0, 0, 1]
