"""The distance between two models: KL divergence of next-token distributions, against a reference on disk."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch

CHUNK_VALUES = 4 * 1024 * 1024  # logits compared at once: 32 MB as float64


@dataclass(frozen=True)
class Text:
    """A prompt with its completion as token ids, and the positions at which two models are compared."""

    tokens: list[int]
    positions: list[int]  # ascending; at position p the distribution of token p + 1 is compared


class Distance(TypedDict):
    """The distance of a model from the reference at `positions`; the share `same_top` of them has the same top token.

    KL divergence is from the reference, in nats; perplexity is of the tokens that follow.
    """

    positions: int
    mean_kl: float
    p99_kl: float
    max_kl: float
    same_top: float
    perplexity: float
    reference_perplexity: float


def spread_positions(length: int, count: int) -> list[int]:
    """Return at most `count` positions of `length` tokens, evenly spread from the first to the last but one.

    Raises `ValueError` for fewer than 2 tokens or a count below 2.
    """
    if length < 2 or count < 2:
        raise ValueError(f"{length} tokens and {count} positions; both must be 2 or more")
    last = length - 2
    if last < count:
        return list(range(last + 1))
    return [round(number * last / (count - 1)) for number in range(count)]


def store_logits(path: Path, texts: Sequence[Text], vocabulary_size: int, logits: Iterable["np.ndarray"]) -> None:
    """Write the reference's logits to `path` in float32, a row for each position of each of `texts`, in order.

    `logits` gives arrays of shape (rows, vocabulary). Raises `ValueError` unless their rows are as many as positions,
    and `OSError` on a full disk.
    """
    import numpy as np

    rows = sum(len(text.positions) for text in texts)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, vocabulary_size))
    with path.open("r+b") as file:  # or a full disk would end the process, by SIGBUS, at a write to memory
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    count = 0
    for chunk in logits:
        array[count : count + len(chunk)] = chunk
        count += len(chunk)
    array.flush()
    if count != rows:
        raise ValueError(f"{count} rows of logits for {rows} positions")


def compare_logits(path: Path, texts: Sequence[Text], logits: Iterable["np.ndarray"]) -> Distance:
    """Return the distance of the model that gave `logits` from the reference stored at `path`.

    `logits` is as in `store_logits`. Raises `ValueError` when the shapes differ, as for a vocabulary of another size.
    """
    import numpy as np

    reference_logits = np.load(path, mmap_mode="r")
    next_tokens = np.array([text.tokens[position + 1] for text in texts for position in text.positions])
    divergences, same, losses, reference_losses, count = [], 0, 0.0, 0.0, 0
    for chunk in logits:
        if chunk.shape[1] != reference_logits.shape[1]:
            raise ValueError(f"a vocabulary of {chunk.shape[1]} against the reference's {reference_logits.shape[1]}")
        step = max(1, CHUNK_VALUES // chunk.shape[1])
        for start in range(0, len(chunk), step):
            other = log_softmax(chunk[start : start + step])
            rows = slice(count, count + len(other))
            reference = log_softmax(reference_logits[rows])
            divergences.append(kl_divergence(reference, other).numpy())
            same += int((reference.argmax(dim=1) == other.argmax(dim=1)).sum())
            index = (np.arange(len(other)), next_tokens[rows])
            losses -= float(other[index].sum())
            reference_losses -= float(reference[index].sum())
            count += len(other)
    if count != len(reference_logits):
        raise ValueError(f"{count} rows of logits for {len(reference_logits)} positions")
    divergence = np.concatenate(divergences)
    return {
        "positions": count,
        "mean_kl": float(divergence.mean()),
        "p99_kl": float(np.quantile(divergence, 0.99)),
        "max_kl": float(divergence.max()),
        "same_top": same / count,
        "perplexity": float(np.exp(losses / count)),
        "reference_perplexity": float(np.exp(reference_losses / count)),
    }


def log_softmax(logits: "np.ndarray") -> "torch.Tensor":
    """Return log probabilities (nats) of `logits`, shape (rows, vocabulary), in float64.

    In float32 the rounding of a 152k-wide sum is as large as the divergence of an f16 file.
    """
    import torch

    return torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=1)


def kl_divergence(reference: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
    """Return KL(reference || other) in nats, shape (rows,), of two tensors of log probabilities, (rows, vocabulary)."""
    probabilities = reference.exp()
    difference = (reference - other).masked_fill_(probabilities == 0, 0.0)  # 0 x log 0 is 0; -inf - -inf would be nan
    return (probabilities * difference).sum(dim=1).clamp_(min=0.0)
