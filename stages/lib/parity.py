"""How far one model's next-token distribution is from another's, and the reference side of that comparison.

The reference is a model in transformers, computed in float32 from the weights as they are stored. Its logits at chosen
positions go once into a file on disk (`store`), and every other model is held against that file in chunks, so that
memory is bounded by the model and by a chunk, never by prompts x positions x vocabulary.

KL divergence is KL(reference || other) in nats, after llama.cpp's perplexity tool (its tools/perplexity/README.md).
"""

import contextlib
import ctypes
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

M_MMAP_THRESHOLD, LARGE_BYTES = -3, 4 << 20  # of glibc's malloc.h
CHUNK_VALUES = 4 * 1024 * 1024  # logits in a chunk: 32 MB as float64, in which they are compared


@dataclass(frozen=True)
class Text:
    """A prompt with its completion as token ids, and the positions at which two models are compared."""

    tokens: list[int]
    positions: list[int]  # ascending; at position p the distribution of token p + 1 is compared


def first_rows(path: Path, count: int, knob: str) -> list[dict[str, Any]]:
    """Return the first `count` rows of a JSON-lines file. Raises `UserError`, naming `knob`, if it has fewer."""
    with path.open() as file:
        rows = [json.loads(line) for line in itertools.islice(file, count)]
    if len(rows) < count:
        raise UserError(f"{path}: has {len(rows)} problems; {knob} = {count}. Lower it, or prepare more")
    return rows


def spread(length: int, count: int) -> list[int]:
    """Return at most `count` positions, evenly spread over those of `length` tokens that have a next token.

    The first and the last are among them. Raises `ValueError` for fewer than 2 tokens or a count below 2.
    """
    if length < 2 or count < 2:
        raise ValueError(f"{length} tokens and {count} positions; both must be 2 or more")
    last = length - 2
    if last < count:
        return list(range(last + 1))
    return [round(number * last / (count - 1)) for number in range(count)]


def store(path: Path, texts: Sequence[Text], vocabulary_size: int, logits: Iterable["np.ndarray"]) -> None:
    """Write the reference's logits to `path`: float32, a row a position of each of `texts`, in order.

    `logits` gives arrays of shape (rows, vocabulary) whose rows add up to all positions. Raises `ValueError` if not.
    """
    import numpy as np

    rows = sum(len(text.positions) for text in texts)
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, vocabulary_size))
    done = 0
    for chunk in logits:
        stored[done : done + len(chunk)] = chunk
        done += len(chunk)
    stored.flush()
    if done != rows:
        raise ValueError(f"{done} rows of logits for {rows} positions")


def compare(path: Path, texts: Sequence[Text], logits: Iterable["np.ndarray"]) -> dict[str, float | int]:
    """Return how the model that gave `logits` differs from the reference stored at `path`.

    `logits` is as in `store`. The result: `positions`, `mean_kl`, `p99_kl` and `max_kl` (nats), `same_top` (share of
    positions with the same most likely token), `perplexity` and `reference_perplexity` of the tokens that follow.
    Raises `ValueError` when the shapes differ, as for a vocabulary of another size.
    """
    import numpy as np

    stored = np.load(path, mmap_mode="r")
    following = np.array([text.tokens[position + 1] for text in texts for position in text.positions])
    divergences, same, losses, reference_losses = [], 0, 0.0, 0.0
    done = 0
    for chunk in logits:
        if chunk.shape[1] != stored.shape[1]:
            raise ValueError(f"a vocabulary of {chunk.shape[1]} against the reference's {stored.shape[1]}")
        step = max(1, CHUNK_VALUES // chunk.shape[1])
        for start in range(0, len(chunk), step):
            other = log_softmax(chunk[start : start + step])
            rows = slice(done, done + len(other))
            reference = log_softmax(stored[rows])
            divergences.append(kl(reference, other).numpy())
            same += int((reference.argmax(dim=1) == other.argmax(dim=1)).sum())
            index = (np.arange(len(other)), following[rows])
            losses -= float(other[index].sum())
            reference_losses -= float(reference[index].sum())
            done += len(other)
    if done != len(stored):
        raise ValueError(f"{done} rows of logits for {len(stored)} positions")
    divergence = np.concatenate(divergences)
    return {
        "positions": done,
        "mean_kl": float(divergence.mean()),
        "p99_kl": float(np.quantile(divergence, 0.99)),
        "max_kl": float(divergence.max()),
        "same_top": same / done,
        "perplexity": float(np.exp(losses / done)),
        "reference_perplexity": float(np.exp(reference_losses / done)),
    }


def log_softmax(logits: "np.ndarray") -> "torch.Tensor":
    """Return log probabilities (nats) of `logits`, shape (rows, vocabulary), in float64.

    In float32 the rounding of a 152k-wide sum is as large as the divergence of an f16 file.
    """
    import torch

    return torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=1)


def kl(reference: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
    """Return KL(reference || other) in nats, shape (rows,), of two tensors of log probabilities, (rows, vocabulary)."""
    probabilities = reference.exp()
    difference = (reference - other).masked_fill_(probabilities == 0, 0.0)  # 0 x log 0 is 0; -inf - -inf would be nan
    return (probabilities * difference).sum(dim=1).clamp_(min=0.0)


def load(folder: str | Path, revision: str | None = None) -> Any:
    """Return the causal language model at `folder` in float32, for comparison, on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a tensor, and no line of its own
    give_back_freed_memory()
    with weights_read():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=revision,
            dtype=torch.float32,
            attn_implementation="eager",  # one attention for prompt and generation, the same on every device
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model.to(device_for(model)).eval()


def device_for(model: Any) -> str:
    """Return "cuda" where a GPU has room for the float32 `model` and a quarter more, for what it computes; else "cpu".

    An 8 B model trained on a 24 GB GPU takes 32 GB here.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    free_bytes, _ = torch.cuda.mem_get_info()
    return "cuda" if free_bytes > 5 * sum(parameter.numel() for parameter in model.parameters()) else "cpu"


def give_back_freed_memory() -> None:
    """Let weights that are freed go back to the system at once, where the C library is glibc.

    It keeps blocks of up to 32 MB for the next use, and with so many of them a model that is gone can take as much
    memory as one that is there. Blocks of LARGE_BYTES and more are then mapped one by one (mallopt(3)).
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


@contextlib.contextmanager
def weights_read() -> Iterator[None]:
    """Let transformers read weights instead of mapping their files, as it does on Windows.

    Mapped, every page of the files stays resident until the last tensor is loaded: half as much again as the model
    itself in float32.
    """
    from transformers import modeling_utils

    mapped = modeling_utils.safe_open

    def read(file: str, **options: Any) -> Any:
        return mapped(file, **options | {"backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def end_tokens(generation_config: Any) -> list[int]:
    """Return the ids at which a transformers generation_config ends a generation; it may state one, several or none."""
    stated = generation_config.eos_token_id
    return [stated] if isinstance(stated, int) else list(stated or [])


def model_logits(model: Any, texts: Iterable[Text]) -> Iterator["np.ndarray"]:
    """Yield the logits of a transformers model at each text's positions: float32, (positions, vocabulary).

    Only the chosen positions go through the output layer: one text at a time, with no padding to get wrong.
    """
    import torch

    for text in texts:
        tokens = torch.tensor([text.tokens], device=model.device)
        with torch.inference_mode():
            output = model(input_ids=tokens, logits_to_keep=torch.tensor(text.positions, device=model.device))
        yield output.logits[0].float().cpu().numpy()


def model_greedy(
    model: Any, prompts: Sequence[list[int]], max_tokens: int, ends: Sequence[int], batch_size: int = 16
) -> list[list[int]]:
    """Return the greedy completion of each prompt as token ids, the end token (one of `ends`) included if reached."""
    import torch

    completions: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # little padding
    for start in range(0, len(by_length), batch_size):
        numbers = by_length[start : start + batch_size]
        width = max(len(prompts[number]) for number in numbers)
        padded = [[ends[0]] * (width - len(prompts[number])) + prompts[number] for number in numbers]
        mask = [[0] * (width - len(prompts[number])) + [1] * len(prompts[number]) for number in numbers]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=list(ends),
                pad_token_id=ends[0],
                # not greedy's to use; a base's generation_config may set them, and transformers then warns
                temperature=None,
                top_p=None,
                top_k=None,
            )
        for number, row in zip(numbers, output[:, width:].tolist(), strict=True):
            completions[number] = cut_after(row, ends)
    return [completions[number] for number in range(len(prompts))]


def cut_after(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return `tokens` up to and with the first end token; all of them if there is none."""
    first = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]
