"""Fingerprints of questions: hashes that find the same question, a near duplicate, or one close to an eval problem.

A question is compared by its words: runs of letters and digits, and every other sign by itself, without case and white
space ("What is 3+4?" is what, is, 3, +, 4, ?). Typographic and full-width signs count as the plain ones. In scripts
without blanks between words (Chinese, Japanese, Thai, ...) every character is a word. A question's identity is a 64-bit
hash of all its words. Its likeness to another is measured on the sets of their n-grams, runs of n words, each a 32-bit
hash. A batch is hashed at once with numpy: the same bytes on every machine, in about a tenth of a loop's time.

MinHash (Broder 1997) in bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4) finds candidates for near
duplicates: two questions whose `BAND_ROWS` minima all agree in one of `BANDS` bands. A pair with Jaccard index s is a
candidate with probability 1 - (1 - s^3)^8: 0.997 at 0.8, 0.965 at 0.7, 0.66 at 0.5. Its index is then counted, not
estimated. Of many candidates in one band each is compared with the first, so the work grows with the rows, not with
their pairs.
"""

import unicodedata
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

BANDS, BAND_ROWS = 8, 3
MAX_CHARACTERS = 1 << 17  # hashed together: what the processor's cache can hold

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
    """The plain form of each character, by its code, for `str.translate`; computed at its first use."""

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
        columns = ([getattr(part, field.name) for part in parts] for field in fields(Fingerprints))
        return Fingerprints(*map(np.concatenate, columns))
    words, first, counts = hashed_words(questions)
    position = np.arange(len(words)) - np.repeat(first, counts)
    ids = mixed(np.add.reduceat(words * _powers(_WORD, counts.max())[position], first) ^ counts.astype(np.uint64))

    # The hash of a run of words is sum(word * ODD^k), the last has k = 0: a difference of one running sum.
    windows = max(len(words) - ngram_words + 1, 0)
    sums = _sums(words * _powers(_ODD_INVERSE, len(words)))
    window_hashes = (sums[ngram_words:] - sums[:windows]) * _powers(_ODD, len(words))[ngram_words - 1 :]
    inside = position[:windows] + ngram_words <= np.repeat(counts, counts)[:windows]
    each = np.maximum(counts - ngram_words + 1, 1)
    grams = np.zeros(each.sum(), np.uint32)
    short = counts < ngram_words  # too short for an n-gram: one of all its words
    has_window = np.repeat(~short, each)
    grams[has_window] = window_hashes[inside] >> np.uint64(32)
    grams[~has_window] = ids[short] >> np.uint64(32)
    return Fingerprints(ids, each, _bands(grams, each), grams)


def hashed_words(questions: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of all words, uint64, the place where each question's words begin, and their number."""
    parts = [
        text.lower()
        if text.isascii()
        else " ".join(unicodedata.normalize("NFC", text).casefold().translate(_PLAIN).split())
        for text in questions
    ]
    text_of_all = "\0".join(parts) + "\0"
    if text_of_all.count("\0") > len(parts):
        text_of_all = "\0".join(part.replace("\0", " ") for part in parts) + "\0"
    raw = text_of_all.encode("utf-8")
    kind = np.frombuffer(raw.translate(_KIND), np.uint8)
    letters = kind == _LETTER
    begins = letters.copy()
    begins[1:] &= ~letters[:-1]
    starts = np.flatnonzero(begins | (kind == _SIGN))
    # The hash of a run of bytes is sum(byte * ODD^k), got from differences of one running sum; modulo 2^64 throughout.
    sums = _sums(np.frombuffer(raw.translate(_VALUE), np.uint8) * _powers(_ODD, len(raw)))
    words = mixed(np.diff(sums[np.append(starts, len(raw))]) * _powers(_ODD_INVERSE, len(raw))[starts])
    first = np.searchsorted(starts, np.append(0, np.flatnonzero(np.frombuffer(raw, np.uint8) == 0) + 1))
    return words, first[:-1], np.diff(first)


def _bands(grams: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return a hash, uint64 [rows, BANDS], of the minima of each band."""
    starts = np.cumsum(counts) - counts
    minima = np.stack([np.minimum.reduceat(grams * odd, starts) for odd in _MULTIPLIERS], axis=1)
    folded = np.zeros((len(counts), BANDS), np.uint64)
    for column in minima.reshape(len(counts), BANDS, BAND_ROWS).transpose(2, 0, 1):
        folded = mixed(folded * _ODD + column)
    return folded


def mixed(values: np.ndarray) -> np.ndarray:
    """Return `values` with every bit mixed into all others (the finalizer of SplitMix64)."""
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
