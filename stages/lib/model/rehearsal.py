"""The refusals of merge, gguf and ollama-modelfile, tried in seconds before the training."""

import os
from pathlib import Path
from typing import Any

from stages.lib.answers import formats
from stages.lib.errors import UserError
from stages.lib.gguf.tokens import check_conversion
from stages.lib.model.files import model_config, model_folder, refuse_quantized_base, vocabulary_size, weight_shapes
from stages.lib.model.fold import savable
from stages.lib.model.headers import AGAIN, json_object, reading_model
from stages.lib.model.locate import locate_model
from stages.lib.model.sampled import refuse_unsampled
from stages.lib.model.template import THINKING
from stages.lib.ollama.derive import of_tokenizer, refuse_unused_system
from stages.lib.ollama.proof import compare_renderings
from stages.lib.recipe.tables import Recipe

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
READ_BY_TRANSFORMERS = (
    "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


def refuse_base(recipe: Recipe) -> None:
    """Raise `UserError` if merge would refuse the base: quantized, or a local folder without whole safetensors or JSON.

    And if GRPO could not sample from it with the recipe's engine.
    """
    name, revision = locate_model(recipe)
    folder = model_folder(name, revision)
    for path in (folder / file for file in READ_BY_TRANSFORMERS):
        if path.is_file():
            json_object(path)
    refuse_generation(folder, recipe.model.name)
    refuse_quantized_base(folder, recipe.model.name)
    refuse_unsampled(recipe, model_config(folder))
    if recipe.model.name != "base-model" and revision is None:
        weight_shapes(Path(name))


def refuse_generation(folder: Path, name: str) -> None:
    """Raise `UserError` for a generation_config.json that grpo or merge could not read or write of the model `name`."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return
    stated = json_object(path)
    for key in TOKEN_IDS:
        value = stated.get(key)
        if not all(type(each) is int and -1 <= each < 1 << 31 for each in listed(value)):
            raise UserError(f"{path}: {key} is {str(value)[:80]!r}; expected a token's number, or several. {AGAIN}")
    with reading_model(name, path.name):
        savable(GenerationConfig.from_pretrained(folder))


def listed(value: Any) -> list[Any]:
    """Return what a file states of one or several: [] for null."""
    return value if isinstance(value, list) else [] if value is None else [value]


def check_chat_template(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if ollama-modelfile would refuse the chat template: derive and compare it as there."""
    name = recipe.model.name
    render, derived = of_tokenizer(tokenizer, name)
    refuse_unused_system(derived, recipe.format.system_prompt, recipe.format.name, name)
    compare_renderings(name, derived.template, render, derived.bos)


def check_completion(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if the chat template writes anything between the generation prompt and a completion.

    Qwen3's writes an empty thought there. SFT would teach the model to begin with it: no completion is well formed.
    """
    turns = [{"role": "system", "content": recipe.format.system_prompt}, {"role": "user", "content": "1 + 1?"}]
    completion = formats.get(recipe.format.name).write(formats.Answer("1 + 1 = 2", "2")).strip()
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    conversation = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": completion}], tokenize=False)
    if not conversation.startswith(prompt + completion):
        thinks = THINKING in tokenizer.chat_template and not recipe.format.template_kwargs
        choose = f"[format] template_kwargs = {{{THINKING} = false}}, another model" if thinks else "another model"
        at = len(prompt) if conversation.startswith(prompt) else len(os.path.commonprefix([conversation, prompt]))
        raise UserError(
            f"{recipe.path}: the chat template of {recipe.model.name} changes a completion, and SFT would teach the "
            f"change: after {conversation[:at][-30:]!r} it has {conversation[at : at + 40]!r}, expected "
            f"{(prompt + completion)[at : at + 40]!r}. Choose {choose}, or [format] name = 'think', which has "
            f"its own template"
        )


def check_tokenizer(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if llama.cpp's converter would refuse or misread the tokenizer.

    Or if a token has no row in the embedding, on which training would fail.
    """
    folder = model_folder(*locate_model(recipe))
    token, number = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if number >= (rows := vocabulary_size(folder)):
        raise UserError(
            f"{recipe.model.name}: the tokenizer has {token!r} as token {number:,}, and the embedding {rows:,} rows "
            f"(vocab_size in config.json); expected a row for each token. Take the tokenizer's files that the model "
            f"was published with"
        )
    with reading_model(recipe.model.name, "the tokenizer as it would be saved"):
        check_conversion(tokenizer, folder, recipe.model.name)
