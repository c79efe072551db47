"""The proof that a Go template prompts as the chat template does: both are rendered on `CONVERSATIONS` and compared."""

import contextlib
import json
import os.path
from pathlib import Path

from stages.lib.errors import UserError
from stages.lib.ollama.derive import Rejected, Render
from stages.lib.ollama.go import render_by_go

FEWEST = 20  # conversations that a chat template has to take, to be compared on


def compare_renderings(where: Path | str, template: str, jinja: Render, bos: str) -> int:
    """Render every conversation by the chat template, `jinja`, and by Go with `template`; return how many.

    Raises `UserError` showing the first conversation on which the two differ.
    """
    expected = {}
    for number, conversation in enumerate(CONVERSATIONS):
        with contextlib.suppress(Rejected):  # the model was never prompted so, and never can be
            expected[number] = jinja(conversation, True).removeprefix(bos)
    if len(expected) < FEWEST:
        raise UserError(
            f"{where}: the chat template renders {len(expected)} of {len(CONVERSATIONS)} conversations; "
            f"expected at least {FEWEST}"
        )
    conversations = [CONVERSATIONS[number] for number in expected]
    try:
        found = render_by_go(template, conversations)
    except ValueError as error:
        raise UserError(f"{where}: the TEMPLATE can't be rendered: {error}") from error
    for conversation, wanted, text in zip(conversations, expected.values(), found, strict=True):
        if text != wanted:
            raise UserError(
                f"{where}: the TEMPLATE does not prompt as the chat template of training does; "
                f"{first_difference(text, wanted)}\n"
                f"  conversation:  {json.dumps(conversation, ensure_ascii=False)}\n"
                f"  chat template: {wanted!r}\n"
                f"  Modelfile:     {text!r}"
            )
    return len(conversations)


def first_difference(found: str, wanted: str) -> str:
    """Say where two texts part: the character's place and what stands there in either."""
    same = len(os.path.commonprefix([found, wanted]))
    return f"from character {same + 1} on it has {found[same : same + 30]!r} instead of {wanted[same : same + 30]!r}"


def usual_conversations() -> list[list[dict[str, str]]]:
    """Give the conversations on which templates are compared: each of `CONTENTS`, with and without a system prompt."""
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

# User and assistant contents by turns; the last is the user's.
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
