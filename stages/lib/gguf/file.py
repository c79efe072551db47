"""A loaded GGUF file: logits and greedy completions of token ids."""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.distance import Text
from stages.lib.errors import UserError
from stages.lib.gguf.library import fastest_threads, llama_said, threads_for
from stages.lib.gguf.tokens import Vocabulary

if TYPE_CHECKING:
    import numpy as np

BATCH_TOKENS = 256  # a decode call; their logits take 156 MB at a vocabulary of 152k
TRIAL_TOKENS = 8  # a decode call of the trial of threads: as many as completions at once


class Loaded(Vocabulary):
    """A GGUF file, loaded on the CPU: logits and greedy completions of token ids.

    `threads`: their number, tried when it is loaded. It changes the time and no byte of a result.
    """

    def __init__(self, path: Path, context_tokens: int, sequences: int = 1, adapter: Path | None = None) -> None:
        """Load `path`, with the GGUF LoRA `adapter`, for `sequences` texts at once of `context_tokens` each.

        Raises `UserError` as `Vocabulary` does, without memory for the context, and for an adapter that does not fit.
        """
        super().__init__(path, with_weights=True)
        parameters = self.llama_cpp.llama_context_default_params()
        parameters.n_ctx = context_tokens * sequences
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = max(BATCH_TOKENS, sequences)
        parameters.no_perf = True
        self.sequences = sequences
        self.batch_tokens = parameters.n_batch
        self.context = self.llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            super().close()
            raise UserError(f"{path}: no room for {context_tokens:,} x {sequences} tokens of context:\n{llama_said()}")
        self.batch = self.llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)
        if adapter:
            self.apply(adapter)
        self.threads = fastest_threads(threads_for(path), self.trial)
        self.take_threads(self.threads)

    def apply(self, adapter: Path) -> None:
        """Put the GGUF LoRA `adapter` on the model. Raises `UserError`, all freed, when it does not fit."""
        lora = self.llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(adapter))  # freed with the model
        adapters, scales = (self.llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora), (ctypes.c_float * 1)(1.0)
        if not lora or self.llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales):
            reason = llama_said(1)  # before close, which logs too
            self.close()
            raise UserError(
                f"{adapter}: llama.cpp can't put it on {self.path.name}; expected an adapter of that very base, on "
                f"none of its tied embeddings ([lora] target_modules). To go on without it, take 'lora' out of save. "
                f"llama.cpp said:\n{reason}"
            )

    def trial(self, threads: int) -> None:
        """Decode a few tokens with so many `threads`, and forget them."""
        self.take_threads(threads)
        self.decode([(0, position, 0, False) for position in range(TRIAL_TOKENS)])
        self.forget()

    def take_threads(self, threads: int) -> None:
        """Have llama.cpp use so many `threads` from now on."""
        self.llama_cpp.llama_set_n_threads(self.context, threads, threads)

    def close(self) -> None:
        """Free batch, context and model."""
        self.llama_cpp.llama_batch_free(self.batch)
        self.llama_cpp.llama_free(self.context)
        super().close()

    def decode(self, items: Sequence[tuple[int, int, int, bool]]) -> "np.ndarray":
        """Run at most `batch_tokens` `items`: (token, position, sequence, whether to return its logits).

        Returns these logits, float32, (rows, vocabulary), in llama.cpp's memory: the next call overwrites them.
        """
        import numpy as np

        for number, (token, position, sequence, with_logits) in enumerate(items):
            self.batch.token[number] = token
            self.batch.pos[number] = position
            self.batch.n_seq_id[number] = 1
            self.batch.seq_id[number][0] = sequence
            self.batch.logits[number] = with_logits
        self.batch.n_tokens = len(items)
        code = self.llama_cpp.llama_decode(self.context, self.batch)
        if code:
            raise UserError(f"{self.path}: llama.cpp failed on {len(items)} tokens (code {code}):\n{llama_said()}")
        rows = sum(with_logits for *_, with_logits in items)
        if not rows:
            return np.empty((0, self.size), np.float32)
        return np.ctypeslib.as_array(self.llama_cpp.llama_get_logits(self.context), shape=(rows, self.size))

    def forget(self) -> None:
        """Empty the context."""
        self.llama_cpp.llama_memory_clear(self.llama_cpp.llama_get_memory(self.context), False)

    def logits(self, texts: Iterable[Text]) -> Iterator["np.ndarray"]:
        """Yield the logits at each text's positions, in order, in chunks; the next chunk overwrites one."""
        for text in texts:
            self.forget()
            wanted = set(text.positions)
            items = [(token, n, 0, n in wanted) for n, token in enumerate(text.tokens[: text.positions[-1] + 1])]
            for start in range(0, len(items), self.batch_tokens):
                yield self.decode(items[start : start + self.batch_tokens])

    def greedy(self, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        """Return greedy completions as token ids, up to an end token of the file (included) or `max_tokens`."""
        completions: list[list[int]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(0, len(by_length), self.sequences):
            self.forget()
            wave = dict(enumerate(by_length[start : start + self.sequences]))  # sequence: prompt
            for sequence, number in wave.items():
                items = [(token, n, sequence, False) for n, token in enumerate(prompts[number])]
                items[-1] = (*items[-1][:3], True)
                for begin in range(0, len(items), self.batch_tokens):
                    rows = self.decode(items[begin : begin + self.batch_tokens])
                completions[number].append(int(rows[0].argmax()))
            while wave := {
                sequence: number
                for sequence, number in wave.items()
                if len(completions[number]) < max_tokens and completions[number][-1] not in self.ends
            }:
                items = [
                    (completions[n][-1], len(prompts[n]) + len(completions[n]) - 1, sequence, True)
                    for sequence, n in wave.items()
                ]
                for number, row in zip(wave.values(), self.decode(items), strict=True):
                    completions[number].append(int(row.argmax()))
        return completions
