"""llama-server's prompts held against those of training: the same conversations, the same tokens."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from stages.lib.errors import UserError
from stages.lib.gguf.server import LlamaServer
from stages.lib.gguf.tokens import first_difference

if TYPE_CHECKING:
    import httpx

SHOWN = 60  # characters on each side of a difference
Message = dict[str, str]


class Prompted(TypedDict):
    """llama-server's prompts. `conversations`, `tokens`: the numbers compared; `differences`: in text no run asks."""

    conversations: int
    tokens: int
    differences: list[str]


def compare_prompts(
    file: Path, tokenizer: Any, asked: Sequence[list[Message]], others: Sequence[list[Message]]
) -> Prompted:
    """Compare the tokens that llama-server makes of conversations with those of transformers' `tokenizer`.

    `file` is the GGUF file. A conversation that the chat template refuses in transformers is left out. Returns the
    differences in `others`. Raises `UserError` with both texts for a difference in `asked`, what a run prompts with.
    """
    figures: Prompted = {"conversations": 0, "tokens": 0, "differences": []}
    with LlamaServer(file, "--ctx-size", "512") as server, server.client() as client:
        for number, messages in enumerate([*asked, *others]):
            trained = trained_prompt(tokenizer, messages)
            if trained is None:
                continue
            text, tokens = trained
            figures["conversations"] += 1
            figures["tokens"] += len(tokens)
            found = difference(client, messages, text, tokens, tokenizer)
            if found and number < len(asked):
                raise UserError(
                    f"{file}: llama-server prompts otherwise than this run trained: {found}. Write the chat template "
                    "so that transformers and llama.cpp render it alike, or use another base model"
                )
            figures["differences"] += [found] if found else []
    return figures


def trained_prompt(tokenizer: Any, messages: list[Message]) -> tuple[str, list[int]] | None:
    """Return the prompt's text and token ids in transformers; None where the chat template refuses `messages`."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except TemplateError:
        return None
    return text, tokens


def difference(
    client: "httpx.Client", messages: list[Message], text: str, tokens: list[int], tokenizer: Any
) -> str | None:
    """Return how llama-server's prompt of `messages` differs from `text` and `tokens`; None where it does not."""
    rendered = client.post("/apply-template", json={"messages": messages})
    if rendered.status_code != 200:
        return f"it refuses {messages}, which transformers renders: {rendered.text}"
    prompt = rendered.json()["prompt"]
    request = {"content": prompt, "add_special": True, "parse_special": True}  # as for a chat's completion
    served = client.post("/tokenize", json=request).json()["tokens"]
    if served == tokens:
        return None
    at = len(os.path.commonprefix([text, prompt]))
    if prompt and text.endswith(prompt):  # it leaves BOS to the tokenizer
        at = len(text)
    ours, theirs = (each[max(0, at - SHOWN) : at + SHOWN] for each in (text, prompt))
    return (
        f"trained on {ours!r}, llama-server has {theirs!r}; {first_difference(tokens, served, tokenizer)}. The "
        f"conversation: {messages}"
    )


def conversations(prompts: Sequence[list[Message]], tokenizer: Any) -> tuple[list[list[Message]], list[list[Message]]]:
    """Return conversations like `prompts`, a run's own: those that must be prompted as trained, and those no run asks.

    The first have several turns and blanks. The others have in a user's text the control tokens that the prompt of
    `tokenizer` has, after which some tokenizers swallow a blank and llama.cpp does not; no content; U+00A0.
    """
    first = prompts[0]
    text = tokenizer.apply_chat_template(first, add_generation_prompt=True, tokenize=False)
    tokens = [token for token in tokenizer.all_special_tokens if token in text or token == tokenizer.eos_token]
    system, question = first[:-1], first[-1]["content"]

    def asking(text: str) -> list[Message]:
        return [*system, {"role": "user", "content": text}]

    answer = {"role": "assistant", "content": "17 + 25 = 42"}
    asked = [
        *prompts,
        [first[-1]],
        [*first, answer, {"role": "user", "content": "And 18 + 25?"}],
        [*first, answer, {"role": "user", "content": "And 18 + 25?"}, answer, first[-1]],
        asking(f"  {question}\n\n"),
        asking("one\n\n\ntwo \n three\t"),
    ]
    others = [asking(f"What does {token} mean in {token}{token}?") for token in tokens]
    others += [asking(""), asking(f"\u00a0{question}\u00a0"), [{"role": "system", "content": ""}, first[-1]]]
    return asked, others
