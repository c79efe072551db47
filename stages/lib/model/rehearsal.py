"""What merge, gguf and ollama-modelfile would refuse after all the training, tried before it in seconds."""

import os
from pathlib import Path
from typing import Any

from stages.lib.answers import formats
from stages.lib.errors import UserError
from stages.lib.gguf.tokens import check_conversion
from stages.lib.model.files import model_folder, refuse_quantized_base, vocabulary_size, weight_shapes
from stages.lib.model.locate import locate_model
from stages.lib.ollama.derive import of_tokenizer, refuse_unused_system
from stages.lib.ollama.proof import compare_renderings
from stages.lib.recipe.tables import Recipe


def refuse_base(recipe: Recipe) -> None:
    """Raise `UserError` if the base is stored in a few bits, which merge would refuse after all the training.

    Or, where the recipe names a folder on this disk, if its weights are no safetensors or not whole.
    """
    name, revision = locate_model(recipe)
    refuse_quantized_base(model_folder(name, revision), recipe.model.name)
    if recipe.model.name != "base-model" and revision is None:
        weight_shapes(Path(name))


def check_chat_template(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if ollama-modelfile would refuse the chat template after all the training.

    It is derived and compared here as it is there.
    """
    name = recipe.model.name
    render, derived = of_tokenizer(tokenizer, name)
    refuse_unused_system(derived, recipe.format.system_prompt, recipe.format.name, name)
    compare_renderings(name, derived.template, render, derived.bos)


def check_completion(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if the chat template puts something between the generation prompt and a completion.

    Qwen3's own puts an empty thought there: SFT would teach the model to write it first, in every completion, and none
    would be well formed.
    """
    turns = [{"role": "system", "content": recipe.format.system_prompt}, {"role": "user", "content": "1 + 1?"}]
    written = formats.get(recipe.format.name).write(formats.Answer("1 + 1 = 2", "2")).strip()
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    told = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": written}], tokenize=False)
    if not told.startswith(asked + written):
        at = len(asked) if told.startswith(asked) else len(os.path.commonprefix([told, asked]))
        raise UserError(
            f"{recipe.path}: the chat template of {recipe.model.name} shows a completion otherwise than the model is "
            f"to write it: after {told[:at][-30:]!r} it has {told[at : at + 40]!r}, expected "
            f"{(asked + written)[at : at + 40]!r}. SFT would teach to write that first. Choose a model without it, or "
            f"[format] name = 'think', which brings a template"
        )


def check_tokenizer(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if llama.cpp's converter would refuse or misread the tokenizer, after all the training.

    Or if a token has no row in the embedding, which training would stumble over.
    """
    folder = model_folder(*locate_model(recipe))
    token, number = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if number >= (rows := vocabulary_size(folder)):
        raise UserError(
            f"{recipe.model.name}: the tokenizer has {token!r} as token {number:,}, and the embedding {rows:,} rows "
            f"(vocab_size in config.json); expected a row for each token. Take the tokenizer's files that the model "
            f"was published with"
        )
    check_conversion(tokenizer, folder, recipe.model.name)
