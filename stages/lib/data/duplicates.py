"""Duplicates within a set and contamination by the eval set, found by fingerprints."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

MAX_PAIRS = 1 << 15  # compared at once; this and the next bound the memory
MAX_GRAMS = 1 << 21


def exact_duplicates(ids: np.ndarray) -> np.ndarray:
    """Return, for each id, the index of the first that equals it; its own if it is the first."""
    first = np.arange(len(ids))
    ordered = np.sort(ids)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    # These are few, so a search that keeps their places is cheap.
    several, _ = Known(repeated).find(ids)
    _, start, inverse = np.unique(ids[several], return_index=True, return_inverse=True)
    first[several] = several[start[inverse]]
    return first


class Known:
    """A sorted set of numbers, in which many others are looked up."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        self.mask = numbers.dtype.type((1 << max(16, (len(numbers) * 16).bit_length())) - 1)
        self.seen = np.zeros(int(self.mask) + 1, bool)  # by the lowest bits: rules most out before any search
        self.seen[numbers & self.mask] = True

    def find(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indexes of those `values` that are in the set, and each one's place there."""
        index = np.flatnonzero(self.seen[values & self.mask])
        place = np.minimum(np.searchsorted(self.numbers, values[index]), len(self.numbers) - 1)
        kept = self.numbers[place] == values[index]
        return index[kept], place[kept]


class Grams:
    """The n-grams of all rows, kept in files: `counts[row]` numbers (uint32) a row.

    `pieces` are, in order, the stretches of rows: (file, the byte where the stretch begins, how many rows it has).
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
        spans = (self.files[rows].tolist(), (self.counts[rows] * 4).tolist(), self.starts[rows].tolist())
        return np.frombuffer(b"".join(map(os.pread, *spans)), np.uint32)

    def chunks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield all rows in order, many at a time: (first row, row after the last, their n-grams)."""
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

    `rows` are ascending; `bands` holds the bands of all rows. Each row is returned once.
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
        part = slice(start, start + MAX_PAIRS)
        alike[part] = jaccard(grams, later[part], earlier[part])
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
    """Return how many of the `keys` that `distinct` gives each of `rows` rows has."""
    return np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=rows)


def contaminated(
    eval_rows: np.ndarray, train_rows: np.ndarray, grams: Grams, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, the one of `eval_rows` closest to it, their overlap) for the `train_rows` that reach `threshold`.

    The overlap is the number of n-grams in both over the number in the one that has fewer, so that an eval problem
    inside a longer training problem counts in full. The n-grams of the `eval_rows` are held in memory.
    """
    keys = distinct(grams, eval_rows)
    sizes = sizes_of(keys, len(eval_rows))
    order = np.argsort(keys.astype(np.uint32), kind="stable")
    owners = (keys >> np.uint64(32)).astype(np.int64)[order]
    numbers, first, owner_counts = np.unique(keys.astype(np.uint32)[order], return_index=True, return_counts=True)
    known = Known(numbers)
    is_train_row = np.zeros(len(grams.counts), bool)
    is_train_row[train_rows] = True
    matches = []
    for start, end, values in grams.chunks():
        index, place = known.find(values)
        row = start + np.searchsorted(np.cumsum(grams.counts[start:end]), index, "right")
        kept = is_train_row[row]
        pairs = np.unique(row[kept] << 32 | place[kept])  # an n-gram counts once, however often the question has it
        row, place = pairs >> 32, pairs & 0xFFFFFFFF
        # An n-gram may be in many eval problems: the rows are cut into parts whose matches fit into memory.
        ends = np.cumsum(owner_counts[place])
        cuts = np.searchsorted(ends, np.arange(MAX_GRAMS, ends[-1] if len(ends) else 0, MAX_GRAMS))
        cuts = np.unique(np.searchsorted(row, row[cuts]))  # never within a row
        for part in np.split(np.arange(len(row)), cuts):
            times = owner_counts[place[part]]
            nth = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
            owner = owners[np.repeat(first[place[part]], times) + nth]
            matches.append(closest(grams, np.repeat(row[part], times), owner, sizes, threshold))
    row, owner, overlap = (np.concatenate(column) for column in zip(*matches, strict=True))
    return row, eval_rows[owner], overlap


def closest(
    grams: Grams, row: np.ndarray, owner: np.ndarray, sizes: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (row, the owner that it overlaps most, overlap) for the rows whose overlap reaches `threshold`.

    `row` and `owner` hold a pair for every n-gram the two share; `sizes` are the owners' numbers of n-grams.
    """
    pairs, common = np.unique(row << 32 | owner, return_counts=True)
    row, owner = pairs >> 32, pairs & 0xFFFFFFFF
    rows, index = np.unique(row, return_inverse=True)
    overlap = common / np.minimum(sizes_of(distinct(grams, rows), len(rows))[index], sizes[owner])
    order = np.lexsort((-overlap, row))
    order = order[np.unique(row[order], return_index=True)[1]]
    order = order[overlap[order] >= threshold]
    return row[order], owner[order], overlap[order]
