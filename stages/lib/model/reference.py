"""The reference model, with whose next-token distribution every other model is compared.

It runs in transformers, in float32 from its stored weights. Its logits at chosen positions are written once to a file
on disk (`distance.store_logits`). Every other model is compared with that file in chunks: memory holds a model and a
chunk, never prompts x positions x vocabulary.

KL divergence is KL(reference || other) in nats, after llama.cpp's perplexity tool (its tools/perplexity/README.md).
"""

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.distance import Text
from stages.lib.gguf.library import processors_at_once
from stages.lib.model.network import network_class

if TYPE_CHECKING:
    import numpy as np

M_MMAP_THRESHOLD, LARGE_BYTES = -3, 4 << 20  # of glibc's malloc.h


def load_reference(folder: str | Path, revision: str | None = None) -> Any:
    """Return the causal language model at `folder` in float32, for comparison, on the GPU where it has room."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar a tensor, and no line of its own
    give_back_freed_memory()
    torch.set_num_threads(min(torch.get_num_threads(), processors_at_once()))  # torch does not see a container's quota
    with read_weights():
        model = network_class(folder, revision).from_pretrained(
            folder,
            revision=revision,
            dtype=torch.float32,
            attn_implementation="eager",  # one attention for prompt and generation, the same on every device
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model.to(device_for(model)).eval()


def device_for(model: Any) -> str:
    """Return "cuda" where the GPU has room for the float32 `model` and a quarter more for activations; else "cpu"."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    free_bytes, _ = torch.cuda.mem_get_info()
    return "cuda" if free_bytes > 5 * sum(parameter.numel() for parameter in model.parameters()) else "cpu"


def give_back_freed_memory() -> None:
    """Have glibc give freed weights back to the system at once.

    By default it keeps blocks of up to 32 MB: a freed model can take as much memory as a loaded one. This maps each
    block of LARGE_BYTES or more by itself (mallopt(3)).
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


@contextlib.contextmanager
def read_weights() -> Iterator[None]:
    """Have transformers read the weights' files instead of mapping them, as it does on Windows.

    Every page of a mapped file stays resident until the last tensor is loaded: half as much again as the model in
    float32.
    """
    from transformers import modeling_utils

    safe_open = modeling_utils.safe_open

    def read(file: str, **options: Any) -> Any:
        return safe_open(file, **options | {"backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open


def model_logits(model: Any, texts: Iterable[Text]) -> Iterator["np.ndarray"]:
    """Yield the logits at each text's positions, float32, (positions, vocabulary), one text at a time, unpadded."""
    import torch

    for text in texts:
        tokens = torch.tensor([text.tokens], device=model.device)
        with torch.inference_mode():
            output = model(input_ids=tokens, logits_to_keep=torch.tensor(text.positions, device=model.device))
        yield output.logits[0].float().cpu().numpy()
