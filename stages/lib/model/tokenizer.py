"""The tokenizer with the chat template that a run trains and ships."""

import contextlib
from pathlib import Path
from typing import Any

from stages.lib.answers import formats
from stages.lib.ends import adds_bos
from stages.lib.errors import UserError
from stages.lib.model.files import fetching_model
from stages.lib.model.headers import reading_model
from stages.lib.model.locate import SAFE, locate_model
from stages.lib.model.template import try_template, write_choices
from stages.lib.recipe.tables import Recipe


def load_tokenizer(recipe: Recipe) -> Any:
    """Return the model's tokenizer with the chat template that this run trains and ships.

    It is the one that tokenizer.json describes, where there is one: a class that tokenizer_config.json states may make
    another of it. The chat template decides about BOS: one that comes with the format begins as the tokenizer begins a
    plain text, and where one of the model's own writes no BOS, the tokenizer adds none from here on. A date and
    `[format] template_kwargs` are written into it (`write_choices`).

    Raises `UserError` when a local model folder has no tokenizer or one that can't be read, when neither model nor
    format has a chat template, and as `try_template` and `write_choices` do.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    name, revision = locate_model(recipe)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise UserError(f"{name}: the model folder has no tokenizer; expected one of {', '.join(files)}")
    with fetching_model(name, revision):
        described = cached_file(name, files[0], revision=revision, _raise_exceptions_for_missing_entries=False)
        made_by = PreTrainedTokenizerFast if described else AutoTokenizer
        with reading_model(name, "the tokenizer") if revision is None else contextlib.nullcontext():
            tokenizer = made_by.from_pretrained(name, revision=revision, **SAFE)
    template = formats.get(recipe.format.name).chat_template
    if template is not None:
        tokenizer.chat_template = "{{ bos_token }}" * adds_bos(tokenizer) + template
    named = tokenizer.chat_template
    if isinstance(named, dict):  # several, by name, as for tools
        tokenizer.chat_template = named.get("default")
    if tokenizer.chat_template is None:
        has = f"chat templates named {', '.join(named)} and none named default" if named else "no chat template"
        raise UserError(
            f"{name}: the tokenizer has {has}, and format {recipe.format.name!r} brings none; "
            f"choose an instruction-tuned model, or [format] name = 'think'"
        )
    try:
        if template is None:
            try_template(tokenizer.chat_template, tokenizer.special_tokens_map)
        tokenizer.chat_template = write_choices(
            tokenizer.chat_template, recipe.format.template_kwargs, tokenizer.special_tokens_map
        )
    except UserError as error:
        raise UserError(f"{name}: {error.message}") from error
    if adds_bos(tokenizer) and tokenized_turns(tokenizer)[0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = False
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = spare_token(tokenizer) or tokenizer.eos_token
    return tokenizer


def tokenized_turns(tokenizer: Any) -> list[int]:
    """Return a short conversation as the chat template and `tokenizer` write it, in token ids.

    Raises `UserError` for a template that fails on it.
    """
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    try:
        return tokenizer.apply_chat_template(turns, return_dict=False)
    except Exception as error:  # Jinja's own, and any of what the template calls
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template fails on a question and its answer ({type(error).__name__}: "
            f"{str(error)[:200]}). Take the one that the model was published with"
        ) from error


def spare_token(tokenizer: Any) -> str | None:
    """Return a special token that no conversation holds, one called a pad if there is one; None if there is none.

    What pads must not be what ends a turn: Unsloth finds the padding of a batch by its token, and would take the end of
    the user's turn for it.
    """
    held = {*tokenized_turns(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id}
    added = sorted(tokenizer.added_tokens_decoder.items())
    spare = [token.content for number, token in added if token.special and number not in held]
    return min(spare, key=lambda token: "pad" not in token.lower(), default=None)
