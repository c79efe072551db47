"""A GGUF file compared with the merged model in transformers: its prompts, distributions and answers."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.answers import formats, stats
from stages.lib.answers.grade import mark
from stages.lib.distance import Text, compare_logits, spread_positions, store_logits
from stages.lib.ends import end_ids, verify_end
from stages.lib.gguf.file import Loaded
from stages.lib.gguf.tokens import verify_prompt
from stages.lib.model.generate import Generator, Sampling, generate_completions
from stages.lib.model.reference import load_reference, model_logits
from stages.lib.recipe.tables import Recipe

SEQUENCES = 8  # completions at once


@dataclass(frozen=True)
class Completions:
    """A model's greedy completion of each prompt."""

    texts: list[str]  # without the end token
    right: list[bool]
    ended: int  # in number: those with an end token

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right answers with its 95% Wilson interval."""
        low, high = stats.wilson(sum(self.right), len(self.right))
        return {"accuracy": sum(self.right) / len(self.right), "accuracy_low": low, "accuracy_high": high}


@dataclass(frozen=True)
class Reference:
    """The merged model in transformers, with which every file is compared."""

    recipe: Recipe
    tokenizer: Any
    rows: list[dict[str, Any]]
    prompts: list[list[int]]  # token ids
    texts: list[Text]  # prompts with their reference completions
    logits: Path
    completions: Completions

    @property
    def context_tokens(self) -> int:
        """The longest text, or prompt with room for a completion, in tokens."""
        longest = max(map(len, self.prompts)) + self.recipe.infer.max_completion_tokens
        return max(longest, *(len(text.tokens) for text in self.texts))


def refer(folder: Path, rows: list[dict], recipe: Recipe, scratch: Path) -> Reference:
    """Run the merged model in `folder` on `rows` in transformers; store its logits under `scratch`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    network = load_reference(folder)
    ends = end_ids(network.generation_config)
    verify_end(tokenizer, ends, str(folder / "generation_config.json"))
    conversations = [row["prompt"] for row in rows]
    prompts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    sampling = Sampling(recipe.infer.max_completion_tokens)
    token_ids = generate_completions(Generator(network, tokenizer, ends, {}), prompts, sampling, SEQUENCES)
    texts = []
    for row, prompt, tokens in zip(rows, prompts, token_ids, strict=True):
        if "completion" in row:
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        else:
            whole = prompt + tokens
        texts.append(Text(whole, spread_positions(len(whole), recipe.gguf.positions_per_prompt)))
    logits = scratch / "merged.npy"
    store_logits(logits, texts, network.config.get_text_config().vocab_size, model_logits(network, texts))
    completions = grade_completions(token_ids, ends, tokenizer, rows, recipe.format.name)
    return Reference(recipe, tokenizer, rows, prompts, texts, logits, completions)


def grade_completions(
    token_ids: list[list[int]], ends: Sequence[int], tokenizer: Any, rows: list[dict], format_name: str
) -> Completions:
    """Return completions, `token_ids` a prompt, as texts, each graded by the answer of its row."""
    ended = [tokens[-1] in ends for tokens in token_ids]
    texts = [
        tokenizer.decode(tokens[:-1] if end else tokens, skip_special_tokens=False)
        for tokens, end in zip(token_ids, ended, strict=True)
    ]
    answer_format = formats.get(format_name)
    pairs = zip(texts, rows, strict=True)
    right = [mark(answer_format, text, row["answer"], row.get("kind", "number"))["right"] for text, row in pairs]
    return Completions(texts, right, sum(ended))


def evaluate_file(path: Path, reference: Reference) -> dict[str, Any]:
    """Return the figures of a GGUF file, and the number of `threads` that it ran with.

    Raises `UserError` when it can't be loaded or reads other tokens.
    """
    recipe, tokenizer, rows = reference.recipe, reference.tokenizer, reference.rows
    with contextlib.closing(Loaded(path, reference.context_tokens, SEQUENCES)) as file:
        for row in rows:
            verify_prompt(file, tokenizer, row["prompt"], f"{path}, problem {row['id']}")
        verify_end(tokenizer, file.ends, str(path))
        difference = compare_logits(reference.logits, reference.texts, file.logits(reference.texts))
        token_ids = file.greedy(reference.prompts, recipe.infer.max_completion_tokens)
        completions = grade_completions(token_ids, file.ends, tokenizer, rows, recipe.format.name)
        threads = file.threads
    pairs = list(zip(reference.completions.right, completions.right, strict=True))
    same = sum(one == other for one, other in zip(reference.completions.texts, completions.texts, strict=True))
    return {
        "bytes": path.stat().st_size,
        **difference,
        "same_text": same / len(pairs),
        **completions.accuracy,
        "flipped_to_wrong": pairs.count((True, False)),
        "flipped_to_right": pairs.count((False, True)),
        "ended": completions.ended,
        "answer": completions.texts[0],
        "threads": threads,
    }


def evaluate_adapter(base: Path, adapter: Path, reference: Reference) -> dict[str, Any]:
    """Return the distance of the GGUF `base` with the LoRA `adapter` from the merged model, by distributions alone."""
    with contextlib.closing(Loaded(base, reference.context_tokens, adapter=adapter)) as file:
        difference = compare_logits(reference.logits, reference.texts, file.logits(reference.texts))
    return {"bytes": adapter.stat().st_size, **difference}
