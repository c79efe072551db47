"""Which questions are the same, nearly the same, or too close to one that is to be examined.

A question is compared as its words: letters and digits in a row, and every other sign by itself, whatever the case and
the white space ("What is 3+4?" is what, is, 3, +, 4, ?). Typographic and full-width signs count as the plain ones, and
in scripts that put no blanks between words (Chinese, Japanese, Thai, ...) every character is a word. Its identity is a
64-bit hash of all of them; its likeness to another is measured on the sets of their n-grams, runs of n words, each a
32-bit hash. All of a batch is hashed at once with numpy: the same bytes on every machine, about a tenth of the time of
a loop.

Near duplicates are looked for with MinHash (Broder 1997) in bands (Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, 3.4): two questions meet when all `BAND_ROWS` minima of one of `BANDS` bands agree. A pair with Jaccard index
s meets with probability 1 - (1 - s^3)^8: 0.997 at 0.8, 0.965 at 0.7, 0.66 at 0.5. Whether it is one is then counted,
not estimated. Of many that meet in one band each is held against the first, so the work grows with the rows, not with
their pairs.
"""

import os
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import BinaryIO

import numpy as np

BANDS, BAND_ROWS = 8, 3
MAX_CHARACTERS = 1 << 17  # hashed together: what the processor's cache can hold
MAX_PAIRS = 1 << 15  # looked at together; this and the next bound the memory
MAX_GRAMS = 1 << 21

_ODD = np.uint64(0x9E3779B97F4A7C15)
_ODD_INVERSE = np.uint64(pow(int(_ODD), -1, 1 << 64))
_WORD = np.uint64(0xD1342543DE82EF95)
_SPACE, _LETTER, _SIGN = 0, 1, 2
_SPACES = {0, *range(9, 14), *range(28, 33)}
_LETTERS = {*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), *range(128, 256)}
_KIND = bytes(_SPACE if byte in _SPACES else _LETTER if byte in _LETTERS else _SIGN for byte in range(256))
_VALUE = bytes(0 if byte in _SPACES else byte for byte in range(256))
_MULTIPLIERS = np.random.Generator(np.random.PCG64(0)).integers(0, 1 << 31, BANDS * BAND_ROWS, np.uint32) * 2 + 1


class _Plain(dict):
    """What `str.translate` makes of each character, by its code, found when it is first met."""

    SIGNS = (
        dict.fromkeys((0x2018, 0x2019, 0x201A), "'")
        | dict.fromkeys((0xAB, 0xBB, 0x201C, 0x201D, 0x201E, 0x300C, 0x300D), '"')
        | dict.fromkeys((*range(0x2010, 0x2016), 0x2212), "-")
        | {0x3001: ",", 0x3002: "."}
    )
    # Thai to Myanmar, Khmer, kana, Chinese characters: scripts without blanks between words.
    UNSPACED = (
        (0x0E00, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
    )  # fmt: skip

    def __missing__(self, code: int) -> str:
        plain = chr(code)
        category = unicodedata.category(plain)
        if code in self.SIGNS:
            plain = self.SIGNS[code]
        elif 0xFF01 <= code <= 0xFF5E:  # full-width ASCII
            plain = chr(code - 0xFEE0).lower()
        elif category == "Cf":  # not seen
            plain = ""
        elif code > 127 and (
            any(first <= code <= last for first, last in self.UNSPACED)
            or not (plain.isalnum() or category.startswith("M"))  # M: the accents and vowels of the letter before
        ):
            plain = f" {plain} "
        self[code] = plain
        return plain


_PLAIN = _Plain()


@dataclass(frozen=True)
class Fingerprints:
    """Of each question: `ids` uint64 [rows], the number of n-grams `counts` int64 [rows], `bands` uint64 [rows, BANDS].

    `grams` uint32 [sum of counts] are the n-grams, row after row, in the order of the text.
    """

    ids: np.ndarray
    counts: np.ndarray
    bands: np.ndarray
    grams: np.ndarray


def fingerprint(questions: list[str], ngram_words: int) -> Fingerprints:
    """Return the fingerprints of `questions`, none of which may be empty or only white space."""
    pieces = -(-sum(map(len, questions)) // MAX_CHARACTERS)
    if pieces > 1 < len(questions):
        size = -(-len(questions) // pieces)
        parts = [fingerprint(questions[i : i + size], ngram_words) for i in range(0, len(questions), size)]
        return Fingerprints(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Fingerprints))
        )
    words, first, counts = hashed_words(questions)
    position = np.arange(len(words)) - np.repeat(first, counts)
    ids = _mixed(np.add.reduceat(words * _powers(_WORD, counts.max())[position], first) ^ counts.astype(np.uint64))

    # The hash of a run of words is sum(word * ODD^k), the last has k = 0: a difference of one running sum.
    windows = max(len(words) - ngram_words + 1, 0)
    sums = _sums(words * _powers(_ODD_INVERSE, len(words)))
    rolled = (sums[ngram_words:] - sums[:windows]) * _powers(_ODD, len(words))[ngram_words - 1 :]
    inside = position[:windows] + ngram_words <= np.repeat(counts, counts)[:windows]
    each = np.maximum(counts - ngram_words + 1, 1)
    grams = np.zeros(each.sum(), np.uint32)
    short = counts < ngram_words  # too short for a run: all of its words are its only n-gram
    filled = np.repeat(~short, each)
    grams[filled] = rolled[inside] >> np.uint64(32)
    grams[~filled] = ids[short] >> np.uint64(32)
    return Fingerprints(ids, each, _bands(grams, each), grams)


def hashed_words(questions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of all words, uint64, where each question's begin among them, and how many each has."""
    parts = [
        text.lower()
        if text.isascii()
        else " ".join(unicodedata.normalize("NFC", text).casefold().translate(_PLAIN).split())
        for text in questions
    ]
    joined = "\0".join(parts) + "\0"
    if joined.count("\0") > len(parts):
        joined = "\0".join(part.replace("\0", " ") for part in parts) + "\0"
    raw = joined.encode("utf-8")
    kind = np.frombuffer(raw.translate(_KIND), np.uint8)
    letters = kind == _LETTER
    begins = letters.copy()
    begins[1:] &= ~letters[:-1]
    starts = np.flatnonzero(begins | (kind == _SIGN))
    # The hash of a run of bytes is sum(byte * ODD^k), got from differences of one running sum; modulo 2^64 throughout.
    sums = _sums(np.frombuffer(raw.translate(_VALUE), np.uint8) * _powers(_ODD, len(raw)))
    words = _mixed(np.diff(sums[np.append(starts, len(raw))]) * _powers(_ODD_INVERSE, len(raw))[starts])
    first = np.searchsorted(starts, np.append(0, np.flatnonzero(np.frombuffer(raw, np.uint8) == 0) + 1))
    return words, first[:-1], np.diff(first)


def exact_duplicates(ids: np.ndarray) -> np.ndarray:
    """Return, for each id, the index of the first that is equal: its own where there is none before it."""
    first = np.arange(len(ids))
    ordered = np.sort(ids)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    # Seldom many: only these are worth an order that keeps track of the places.
    several, _ = Known(repeated).find(ids)
    _, start, inverse = np.unique(ids[several], return_index=True, return_inverse=True)
    first[several] = several[start[inverse]]
    return first


class Known:
    """Numbers, ascending, each once, among which many others are looked for."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        self.mask = numbers.dtype.type((1 << max(16, (len(numbers) * 16).bit_length())) - 1)
        self.seen = np.zeros(int(self.mask) + 1, bool)  # a small table that rules most out before any search
        self.seen[numbers & self.mask] = True

    def find(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of `values` are among the numbers, as indexes, and the place there of each."""
        index = np.flatnonzero(self.seen[values & self.mask])
        place = np.minimum(np.searchsorted(self.numbers, values[index]), len(self.numbers) - 1)
        kept = self.numbers[place] == values[index]
        return index[kept], place[kept]


class Grams:
    """The n-grams of all rows, kept in files: `counts[row]` numbers (uint32) a row.

    `pieces` says where the rows are, in order: (file, the byte at which a piece begins, its rows, one after the other).
    """

    def __init__(self, pieces: list[tuple[BinaryIO, int, int]], counts: np.ndarray) -> None:
        self.pieces, self.counts = pieces, counts
        self.ends = np.cumsum(counts)
        files, begins, rows = zip(*pieces, strict=True)
        before = self.ends - counts
        shift = begins - before[np.cumsum(rows) - rows] * 4
        self.starts = before * 4 + np.repeat(shift, rows)  # bytes
        self.files = np.repeat([file.fileno() for file in files], rows)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the n-grams of `rows`, one row after the other."""
        spans = zip(
            self.files[rows].tolist(), (self.counts[rows] * 4).tolist(), self.starts[rows].tolist(), strict=True
        )
        return np.frombuffer(b"".join([os.pread(file, size, start) for file, size, start in spans]), np.uint32)

    def chunks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (first row, row after the last, their n-grams) until every row was there, in order."""
        first = stop = 0
        for file, _, rows in self.pieces:
            stop += rows
            while first < stop:
                limit = self.ends[first] - self.counts[first] + MAX_GRAMS
                last = min(max(int(np.searchsorted(self.ends, limit, "right")), first + 1), stop)
                size = int(self.counts[first:last].sum()) * 4
                raw = os.pread(file.fileno(), size, int(self.starts[first]))
                yield first, last, np.frombuffer(raw, np.uint32)
                first = last


def near_duplicates(
    rows: np.ndarray, bands: np.ndarray, grams: Grams, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, an earlier row like it, their Jaccard index) for the `rows` whose index reaches `threshold`.

    `rows` are ascending; `bands` holds the bands of all rows. Each row is named once.
    """

    def met_in(band: int) -> np.ndarray:
        first = exact_duplicates(bands[rows, band])
        met = np.flatnonzero(first < np.arange(len(rows)))
        return met.astype(np.uint64) << np.uint64(32) | first[met].astype(np.uint64)

    with ThreadPoolExecutor(2) as threads:  # numpy sorts without holding Python's lock
        pairs = np.unique(np.concatenate(list(threads.map(met_in, range(bands.shape[1])))))
    later, earlier = rows[(pairs >> np.uint64(32)).astype(np.int64)], rows[pairs.astype(np.uint32)]
    alike = np.zeros(len(later))
    for start in range(0, len(later), MAX_PAIRS):
        alike[start : start + MAX_PAIRS] = jaccard(
            grams, later[start : start + MAX_PAIRS], earlier[start : start + MAX_PAIRS]
        )
    near = np.flatnonzero(alike >= threshold)
    near = near[np.unique(later[near], return_index=True)[1]]
    return later[near], earlier[near], alike[near]


def jaccard(grams: Grams, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the Jaccard index of the n-gram sets of each pair of rows."""
    sides = [distinct(grams, rows) for rows in (left, right)]
    keys = np.sort(np.concatenate(sides))
    both = keys[1:][keys[1:] == keys[:-1]]
    first, second, common = (sizes_of(keys, len(left)) for keys in (*sides, both))
    return common / (first + second - common)


def distinct(grams: Grams, rows: np.ndarray) -> np.ndarray:
    """Return the n-grams of `rows`, each once a row, sorted: the place in `rows` times 2^32, plus the n-gram."""
    place = np.repeat(np.arange(len(rows), dtype=np.uint64) << np.uint64(32), grams.counts[rows])
    return np.unique(place | grams.of(rows))


def sizes_of(keys: np.ndarray, rows: int) -> np.ndarray:
    """Return how many n-grams each of `rows` rows has among the `keys` that `distinct` gives."""
    return np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=rows)


def contaminated(
    evaluated: np.ndarray, trained: np.ndarray, grams: Grams, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, the `evaluated` row closest to it, their overlap) for the `trained` rows that reach `threshold`.

    The overlap is the number of n-grams in both over the number in the one that has fewer, so that an eval problem
    inside a longer training problem counts in full. The n-grams of the `evaluated` rows are held in memory.
    """
    keys = distinct(grams, evaluated)
    sizes = sizes_of(keys, len(evaluated))
    order = np.argsort(keys.astype(np.uint32), kind="stable")
    owners = (keys >> np.uint64(32)).astype(np.int64)[order]
    numbers, first, owned = np.unique(keys.astype(np.uint32)[order], return_index=True, return_counts=True)
    known = Known(numbers)
    is_trained = np.zeros(len(grams.counts), bool)
    is_trained[trained] = True
    found = []
    for start, end, values in grams.chunks():
        index, place = known.find(values)
        row = start + np.searchsorted(np.cumsum(grams.counts[start:end]), index, "right")
        kept = is_trained[row]
        met = np.unique(row[kept] << 32 | place[kept])  # an n-gram counts once, however often the question has it
        row, place = met >> 32, met & 0xFFFFFFFF
        # The same n-gram may be in many eval problems: take so many rows at once that all their matches fit.
        ends = np.cumsum(owned[place])
        cuts = np.searchsorted(ends, np.arange(MAX_GRAMS, ends[-1] if len(ends) else 0, MAX_GRAMS))
        cuts = np.unique(np.searchsorted(row, row[cuts]))  # never within a row
        for part in np.split(np.arange(len(row)), cuts):
            times = owned[place[part]]
            nth = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
            owner = owners[np.repeat(first[place[part]], times) + nth]
            found.append(closest(grams, np.repeat(row[part], times), owner, sizes, threshold))
    row, owner, overlap = (np.concatenate(column) for column in zip(*found, strict=True))
    return row, evaluated[owner], overlap


def closest(
    grams: Grams, row: np.ndarray, owner: np.ndarray, sizes: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, owner, overlap) for the rows that reach `threshold` with the owner they overlap most.

    `row` and `owner` name a pair for every n-gram the two share; `sizes` are the owners' numbers of n-grams.
    """
    pairs, common = np.unique(row << 32 | owner, return_counts=True)
    row, owner = pairs >> 32, pairs & 0xFFFFFFFF
    rows, index = np.unique(row, return_inverse=True)
    overlap = common / np.minimum(sizes_of(distinct(grams, rows), len(rows))[index], sizes[owner])
    order = np.lexsort((-overlap, row))
    order = order[np.unique(row[order], return_index=True)[1]]
    order = order[overlap[order] >= threshold]
    return row[order], owner[order], overlap[order]


def _bands(grams: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return a hash, uint64 [rows, BANDS], of the minima of each band."""
    starts = np.cumsum(counts) - counts
    minima = np.stack([np.minimum.reduceat(grams * odd, starts) for odd in _MULTIPLIERS], axis=1)
    folded = np.zeros((len(counts), BANDS), np.uint64)
    for column in minima.reshape(len(counts), BANDS, BAND_ROWS).transpose(2, 0, 1):
        folded = _mixed(folded * _ODD + column)
    return folded


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return `values` with every bit spread over all others (the finalizer of SplitMix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _sums(values: np.ndarray) -> np.ndarray:
    """Return the running sum of `values`, from 0, one longer than they are."""
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=sums[1:])
    return sums


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """Return base^0, base^1, ... modulo 2^64, at least `count` of them up to the next power of two."""
    return _table(int(base), 1 << max(int(count) - 1, 0).bit_length())[:count]


@lru_cache(maxsize=16)
def _table(base: int, size: int) -> np.ndarray:
    powers = np.full(size, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)
