"""The run's own choices, written into the chat template: a fixed date, thinking on or off, `[format] template_kwargs`.

Programs that serve a model give its chat template variables that training did not: llama.cpp's server sets today's
`date_string` and `datetime`, and `enable_thinking` to true (common/chat.cpp of ggml-org/llama.cpp). A variable that the
template sets at its head has the same value in all of them, so trainer, vLLM, `infer`, GGUF file, Modelfile and the
tokenizer that is shipped prompt alike.
"""

import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from stages.lib.errors import UserError, nearest
from stages.lib.ollama.derive import dialogue, jinja_render, rejects

DAY = date(2024, 7, 26)  # that of every prompt; Llama 3's templates fall back to it
DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}  # as llama.cpp writes them
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
THINKING = "enable_thinking"


def write_choices(template: str, kwargs: dict[str, bool | int | str], special_tokens: dict[str, str]) -> str:
    """Return the Jinja chat `template` with a fixed date, and with `kwargs` and thinking as in training at its head.

    A template without such variables is returned as it is. Raises `UserError` for one that is no Jinja, for a key of
    `kwargs` that it does not read, and when thinking on, off and unset are three different prompts.
    """
    template = DATE_CALL.sub(lambda call: json.dumps(DAY.strftime(call[2])), template)
    known = variables_of(template)
    for name in kwargs:
        if name not in known:
            raise UserError(
                f"the chat template has no variable {name!r}{nearest(name, known)}, which [format] template_kwargs "
                "sets. Leave it out"
            )
    fixed: dict[str, bool | int | str | None] = {
        name: DAY.strftime(form) for name, form in DATES.items() if name in known
    }
    fixed |= kwargs
    if THINKING in known and THINKING not in fixed:
        fixed |= thinking_unset(set_at_head(template, fixed), special_tokens)
    return set_at_head(template, fixed)


def variables_of(template: str) -> set[str]:
    """Return the names that `template` reads before it surely sets them. Raises `UserError` when it is no Jinja."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)  # a tag of transformers' own
    try:
        parsed = Environment(autoescape=True, extensions=["jinja2.ext.loopcontrols"]).parse(plain)  # and never rendered
        return meta.find_undeclared_variables(parsed)
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is not Jinja: line {error.lineno}: {error.message}") from error


def set_at_head(template: str, values: Mapping[str, bool | int | str | None]) -> str:
    """Return `template` with variables set before it, a line each: the line breaks are dropped by `trim_blocks`."""
    literals = {
        name: "none" if value is None else json.dumps(value, ensure_ascii=False) for name, value in values.items()
    }
    return "".join(f"{{% set {name} = {literal} %}}\n" for name, literal in literals.items()) + template


def thinking_unset(template: str, special_tokens: dict[str, str]) -> dict[str, bool | None]:
    """Return the enable_thinking that prompts as an unset one does; {} where that is true, as servers set it.

    Raises `UserError` when none does.
    """
    unset = renderings(template, special_tokens)
    for same in (True, False, None):
        if renderings(template, special_tokens | {THINKING: same}) == unset:
            return {} if same else {THINKING: same}
    raise UserError(
        f"the chat template prompts otherwise with {THINKING} on, off and unset, and programs that serve the model set "
        f"it. Choose in the recipe: [format] template_kwargs = {{{THINKING} = false}}"
    )


def renderings(template: str, variables: dict[str, Any]) -> list[str]:
    """Return what `template` makes of one to three questions and of one to three answers, or its error."""
    render = jinja_render(template, variables)
    asked = [(dialogue(turns, system), True) for turns in (1, 2, 3) for system in (False, True)]
    answered = [(dialogue(turns, system)[:-1], False) for turns in (2, 3, 4) for system in (False, True)]
    return [rejects(render, each) or render(each, prompt) for each, prompt in asked + answered]
