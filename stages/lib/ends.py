"""Where a text begins and a completion ends: BOS, the token ids that end it, and the cut after the first of them."""

from collections.abc import Collection
from typing import Any

from stages.lib.errors import UserError


def adds_bos(tokenizer: Any) -> bool:
    """Say whether transformers' `tokenizer` puts BOS before a plain text, whatever its chat template writes."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def end_ids(generation_config: Any | None, tokenizer: Any | None = None) -> list[int]:
    """Return the token ids that end a completion, each once.

    They are those of transformers' `generation_config` (one, several or none) and, with a `tokenizer`, its eos and the
    token that closes a turn of its chat template. A check of a written model gives no tokenizer. Raises `UserError` as
    `turn_end` does.
    """
    stated = generation_config.eos_token_id if generation_config is not None else None
    ends = stated if isinstance(stated, list) else [stated]
    if tokenizer is not None:
        ends = [*ends, tokenizer.eos_token_id, turn_end(tokenizer, tokenizer.name_or_path)]
    return list(dict.fromkeys(end for end in ends if end is not None))


def turn_end(tokenizer: Any, where: str) -> int:
    """Return the id of the token with which the chat template closes the assistant's turn.

    Raises `UserError` when the template has no control token there.
    """
    marker = "ANSWER"
    conversation = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    after = text[text.rindex(marker) + len(marker) :]
    tokens = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if not tokens or tokens[0] not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        raise UserError(
            f"{where}: the chat template closes the assistant's turn with {after!r}; expected a control token that can "
            f"end a completion"
        )
    return tokens[0]


def verify_end(tokenizer: Any, ends: Collection[int], where: str) -> None:
    """Raise `UserError` unless the token with which the chat template closes a turn is among `ends`."""
    end = turn_end(tokenizer, where)
    if end not in ends:
        raise UserError(
            f"{where}: a stop token is missing: the chat template closes the assistant's turn with "
            f"{tokenizer.convert_ids_to_tokens(end)!r} ({end}), and the end tokens are {list(ends)}. Completions would "
            f"run on. Run: make merge gguf"
        )


def cut_after(tokens: list[int], ends: Collection[int]) -> list[int]:
    """Return `tokens` up to the first that ends a completion, that one included; all of them if there is none."""
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]
