"""The proof that a Go template prompts like the chat template: both render `CONVERSATIONS` to the same text."""

import contextlib
import json
import os.path
from collections.abc import Sequence
from pathlib import Path

from stages.lib.errors import UserError
from stages.lib.ollama.derive import Rejected, Render
from stages.lib.ollama.go import Message, render_by_go

FEWEST = 20  # conversations that a chat template has to render


def compare_renderings(where: Path | str, template: str, jinja: Render, bos: str) -> int:
    """Compare both templates on every conversation; return how many there are. Raises `UserError` for a difference."""
    prompts = prompts_of(jinja, bos)
    if len(prompts) < FEWEST:
        raise UserError(
            f"{where}: the chat template renders {len(prompts)} of {len(CONVERSATIONS)} conversations; "
            f"expected at least {FEWEST}"
        )
    # Ollama moves a system message to the front, TEMPLATE leaves out a tool's: neither changes which message is last.
    moved = [([*each[1:], each[0]], prompt) for each, prompt in prompts if each[0]["role"] == "system"]
    called = [([*each, {"role": "tool", "content": "42"}], prompt) for each, prompt in prompts]
    asked = [*prompts, *moved, *called]
    try:
        texts = render_by_go(template, [conversation for conversation, _ in asked])
    except ValueError as error:
        raise UserError(f"{where}: Go can't render the TEMPLATE: {error}") from error
    for (conversation, prompt), text in zip(asked, texts, strict=True):
        if text != prompt:
            raise UserError(
                f"{where}: the TEMPLATE does not prompt as the chat template of training does; "
                f"{first_difference(text, prompt)}\n"
                f"  conversation:  {json.dumps(conversation, ensure_ascii=False)}\n"
                f"  chat template: {prompt!r}\n"
                f"  Modelfile:     {text!r}"
            )
    return len(prompts)


def prompts_of(jinja: Render, bos: str, system: str = "") -> list[tuple[Sequence[Message], str]]:
    """Return each conversation that the chat template takes, with its prompt less BOS.

    `system` stands before the conversations that have no system message, as SYSTEM does in Ollama.
    """
    found: list[tuple[Sequence[Message], str]] = []
    for conversation in CONVERSATIONS:
        added = [{"role": "system", "content": system}] if system and conversation[0]["role"] != "system" else []
        with contextlib.suppress(Rejected):  # no prompt of this model looks like this
            found.append((conversation, jinja([*added, *conversation], True).removeprefix(bos)))
    return found


def first_difference(found: str, wanted: str) -> str:
    """Return where two texts part: the character's number and what each has there."""
    same = len(os.path.commonprefix([found, wanted]))
    return f"from character {same + 1} on it has {found[same : same + 30]!r} instead of {wanted[same : same + 30]!r}"


def usual_conversations() -> list[list[dict[str, str]]]:
    """Return the conversations to compare on: each of `CONTENTS`, with and without a system prompt."""
    found = []
    for number, contents in enumerate(CONTENTS):
        for system in (None, SYSTEMS[number % len(SYSTEMS)]):
            messages = [] if system is None else [{"role": "system", "content": system}]
            for turn, content in enumerate(contents):
                messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
            found.append(messages)
    return found


SYSTEMS = (
    "You are a careful tutor.",
    "Respond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>",
    "  blanks before and after \n",
    "",
    'Quotes " and """ and braces {{ .System }} {% raw %} \\n',
    "Système, система, 系统, نظام, 🦉",
    "Answer in one line.",
)

# Contents of user and assistant by turns, a user's last.
CONTENTS: tuple[tuple[str, ...], ...] = (
    ("What is 6 times 7?",),
    ("",),
    (" ",),
    ("\n",),
    ("  blanks before and after  ",),
    ("\n\n\tline breaks and tabs\t\n\n",),
    ("\u00a0\u3000no-break and ideographic spaces\u2003\u00a0",),
    ("Grüße, мир, 世界, العالم, e\u0301, 👩\u200d🔬",),
    ("braces { } {{ }} {% %} {# #} }} {{ {",),
    ("{{ .System }}{{ range .Messages }}{{ .Content }}{{ end }}",),
    ("{% for message in messages %}{{ message['content'] }}{% endfor %}{{ bos_token }}",),
    ("quotes \" ' \"\"\" ''' ` and backslashes \\ \\n \\\\",),
    ("<b>&amp;</b> <answer>4</answer> <|im_end|> <end_of_turn> </s>",),
    ("one\ntwo\r\nthree",),
    ("$1 + $2 = %d %s",),
    ("Hello", "Hi!", "What is 2 + 2?"),
    ("Hello", "", "and?"),
    (" a ", " b ", " c "),
    ("\na\n", "\n\nb\n\n", "\nc\n"),
    ("", "", ""),
    ("first", "second", "third", "fourth", "fifth"),
    ("1", "2 ", " 3", "\n4", "5\n", "{{6}}", "7"),
    ("q1", "a1", "q2", "a2", "q3", "a3", "q4", "a4", "q5"),
    ("Привет ", " Здравствуй", "世界\n", "{{ .Response }}", " same ", "same", "same"),
)
CONVERSATIONS = tuple(usual_conversations())
