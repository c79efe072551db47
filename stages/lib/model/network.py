"""A model's network as transformers makes it: its class, and the part of it that reads text."""

import re
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError
from stages.lib.model.locate import SAFE


def network_class(name: str | Path, revision: str | None = None) -> Any:
    """Return the auto class that loads the model `name`: AutoModelForCausalLM where transformers has it there.

    For a model that transformers has only together with what reads its images, as Mistral 3, it is
    AutoModelForImageTextToText. Raises `UserError` for one that generates no text, and what transformers raises for a
    config.json that it can't read.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, revision=revision, **SAFE)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise UserError(
        f"{name}: transformers {transformers.__version__} has no network that generates text for model_type "
        f"{config.model_type!r}. Use another base model"
    )


def outside_text(model: Any) -> str | None:
    """Return PEFT's `exclude_modules` for a model that also reads images or sound: the modules that do. Else None.

    It is a regular expression for whole names of modules. Those modules have projections of the same names as the text
    part, and no text ever gives them a gradient.
    """
    if model.config.get_text_config() is model.config:
        return None
    text = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is text)
    return rf"(?!{re.escape(name)}\.|(.*\.)?lm_head$).*"
