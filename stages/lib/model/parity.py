"""A GGUF file held against the merged model in transformers: how it reads prompts, its distributions, its answers."""

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
    """What a model writes after each prompt, most likely token by most likely token."""

    texts: list[str]  # without the end token
    right: list[bool]
    ended: int  # those that ended by themselves

    @property
    def accuracy(self) -> dict[str, float]:
        """The share of right answers with its 95% Wilson interval."""
        low, high = stats.wilson(sum(self.right), len(self.right))
        return {"accuracy": sum(self.right) / len(self.right), "accuracy_low": low, "accuracy_high": high}


@dataclass(frozen=True)
class Reference:
    """What the merged model does in transformers: every file is held against it."""

    recipe: Recipe
    tokenizer: Any
    rows: list[dict[str, Any]]
    prompts: list[list[int]]  # token ids
    texts: list[Text]  # prompts with their reference completions
    logits: Path
    completions: Completions

    @property
    def context_tokens(self) -> int:
        """The longest text, or prompt with a completion, in tokens."""
        longest = max(map(len, self.prompts)) + self.recipe.infer.max_completion_tokens
        return max(longest, *(len(text.tokens) for text in self.texts))


def refer(model: Path, rows: list[dict], recipe: Recipe, scratch: Path) -> Reference:
    """Run the merged model in the folder `model` in transformers on `rows`; keep its logits under `scratch`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    loaded = load_reference(model)
    ends = end_ids(loaded.generation_config)
    verify_end(tokenizer, ends, str(model / "generation_config.json"))
    asked = [row["prompt"] for row in rows]
    prompts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    sampling = Sampling(recipe.infer.max_completion_tokens)
    generated = generate_completions(Generator(loaded, tokenizer, ends, {}), prompts, sampling, SEQUENCES)
    texts = []
    for row, prompt, tokens in zip(rows, prompts, generated, strict=True):
        if "completion" in row:
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        else:
            whole = prompt + tokens
        texts.append(Text(whole, spread_positions(len(whole), recipe.gguf.positions_per_prompt)))
    logits = scratch / "merged.npy"
    store_logits(logits, texts, loaded.config.get_text_config().vocab_size, model_logits(loaded, texts))
    completions = completed(generated, ends, tokenizer, rows, recipe.format.name)
    return Reference(recipe, tokenizer, rows, prompts, texts, logits, completions)


def completed(
    generated: list[list[int]], ends: Sequence[int], tokenizer: Any, rows: list[dict], format_name: str
) -> Completions:
    """Return what was `generated`, token ids a prompt, as texts, each held against the answer of its row."""
    ended = [tokens[-1] in ends for tokens in generated]
    texts = [
        tokenizer.decode(tokens[:-1] if end else tokens, skip_special_tokens=False)
        for tokens, end in zip(generated, ended, strict=True)
    ]
    answer_format = formats.get(format_name)
    marked = zip(texts, rows, strict=True)
    right = [mark(answer_format, text, row["answer"], row.get("kind", "number"))["right"] for text, row in marked]
    return Completions(texts, right, sum(ended))


def examine(path: Path, reference: Reference) -> dict[str, Any]:
    """Return the figures of one GGUF file against the reference.

    Raises `UserError` when it can't be loaded or does not read the prompts as the tokens the model was trained with.
    """
    recipe, tokenizer, rows = reference.recipe, reference.tokenizer, reference.rows
    with Loaded(path, reference.context_tokens, SEQUENCES) as file:
        for row in rows:
            verify_prompt(file, tokenizer, row["prompt"], f"{path}, problem {row['id']}")
        verify_end(tokenizer, file.ends, str(path))
        difference = compare_logits(reference.logits, reference.texts, file.logits(reference.texts))
        generated = file.greedy(reference.prompts, recipe.infer.max_completion_tokens)
        found = completed(generated, file.ends, tokenizer, rows, recipe.format.name)
    expected = reference.completions
    pairs = list(zip(expected.right, found.right, strict=True))
    same = sum(ours == theirs for ours, theirs in zip(expected.texts, found.texts, strict=True))
    return {
        "bytes": path.stat().st_size,
        **difference,
        "same_text": same / len(pairs),
        **found.accuracy,
        "flipped_to_wrong": pairs.count((True, False)),
        "flipped_to_right": pairs.count((False, True)),
        "ended": found.ended,
        "answer": found.texts[0],
    }


def examine_adapter(base: Path, adapter: Path, reference: Reference) -> dict[str, Any]:
    """Return how far the GGUF file `base` with the LoRA `adapter` on it is from the merged model.

    Only distributions are compared: the base has the chat template and the end tokens that it had before training.
    """
    with Loaded(base, reference.context_tokens, adapter=adapter) as file:
        difference = compare_logits(reference.logits, reference.texts, file.logits(reference.texts))
    return {"bytes": adapter.stat().st_size, **difference}
