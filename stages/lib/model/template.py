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

from stages.lib.bounded import TooMuch, call_bounded
from stages.lib.errors import UserError, nearest
from stages.lib.ollama.derive import OF_TEMPLATES, dialogue, jinja_render, rejects
from stages.lib.ollama.go import Conversation

DAY = date(2024, 7, 26)  # that of every prompt; Llama 3's templates fall back to it
DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}  # as llama.cpp writes them
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")
THINKING = "enable_thinking"
PLAIN_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # of transformers' own, around a completion
MAX_RENDERED = 1 << 20  # characters of a template, and of what it makes of a short conversation
TRY_SECONDS, TRY_MEGABYTES = 2, 500  # to render some twelve of them


def try_template(template: str, special_tokens: dict[str, str]) -> None:
    """Render short conversations by the Jinja chat `template` in a process with bounds.

    Raises `UserError` for a template that loops, or makes of them more than `MAX_RENDERED` characters: in the process
    of a stage nothing would end it.
    """
    if len(template) > MAX_RENDERED:
        raise UserError(f"the chat template has {len(template):,} characters; expected at most {MAX_RENDERED:,}")
    tokens = {name: value for name, value in special_tokens.items() if isinstance(value, str)}
    try:
        call_bounded(longest_rendering, template, tokens, seconds=TRY_SECONDS, megabytes=TRY_MEGABYTES)
    except TooMuch as error:
        raise UserError(
            f"the chat template takes {error} to render a short conversation; expected a moment. Take the one that the "
            f"model was published with"
        ) from error


def longest_rendering(template: str, special_tokens: dict[str, str]) -> int:
    """Return the characters of the longest rendering of short conversations. Raises `UserError` for one too long.

    What a template refuses or gets wrong has no length: that is for those to say who render it in earnest.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    longest = 0
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        autoescape=False,
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": DAY.strftime}
    try:
        compiled = environment.from_string(PLAIN_TAG.sub("", template))
    except TemplateError:
        return 0
    except RecursionError as error:
        raise UserError("the chat template is nested too deeply to be read") from error
    for messages, prompt in spoken():
        count = 0
        try:
            for part in compiled.generate(
                **special_tokens, messages=messages, add_generation_prompt=prompt, tools=None
            ):
                count += len(part)
                if count > MAX_RENDERED:
                    raise UserError(
                        f"the chat template makes more than {MAX_RENDERED:,} characters of a short conversation"
                    )
        except (TemplateError, *OF_TEMPLATES):
            continue
        longest = max(longest, count)
    return longest


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

    plain = PLAIN_TAG.sub("", template)
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
    return [rejects(render, each) or render(each, prompt) for each, prompt in spoken()]


def spoken() -> list[tuple[Conversation, bool]]:
    """Return short conversations, one to three questions and answers, each with whether a generation prompt follows."""
    both = (False, True)
    asked: list[tuple[Conversation, bool]] = [(dialogue(turns, each), True) for turns in (1, 2, 3) for each in both]
    return asked + [(dialogue(turns, each)[:-1], False) for turns in (2, 3, 4) for each in both]
