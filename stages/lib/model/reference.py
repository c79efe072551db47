"""How far one model's next-token distribution is from another's, and the reference side of that comparison.

The reference is a model in transformers, computed in float32 from the weights as they are stored. Its logits at chosen
positions go once into a file on disk (`store`), and every other model is held against that file in chunks, so that
memory is bounded by the model and by a chunk, never by prompts x positions x vocabulary.

KL divergence is KL(reference || other) in nats, after llama.cpp's perplexity tool (its tools/perplexity/README.md).
"""

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.distance import Text

if TYPE_CHECKING:
    import numpy as np

M_MMAP_THRESHOLD, LARGE_BYTES = -3, 4 << 20  # of glibc's malloc.h


def load_reference(folder: str | Path, revision: str | None = None) -> Any:
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
