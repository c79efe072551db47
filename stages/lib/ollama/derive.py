"""Ollama's Go TEMPLATE, derived from what a Jinja chat template renders.

The chat template is rendered on short conversations whose contents are marker characters. The text between two markers
is the template's own; white space that is gone from beside a marker was trimmed. Neither the model's name nor the Jinja
source is read, so a template may be written in any way.

A gap between two contents is split into the end of one message and the opening of the next. Each may depend on three
facts: the user message is the first, it is the last, there is a system prompt. That covers concatenation by role, a
system prompt in the first or the last user turn, a default system prompt, trimming, and text after the generation
prompt such as `<think>`. Anything else is refused.

A derived template is a claim. Its proof: both templates render `stages.lib.ollama.proof.CONVERSATIONS` alike.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from stages.lib.ends import adds_bos
from stages.lib.errors import UserError
from stages.lib.ollama.go import (
    FIND_END,
    WHITESPACE,
    Conversation,
    Message,
    Piece,
    Pieces,
    Slot,
    go_if,
    go_written,
    split_text,
    trimmers,
    without_end,
)  # fmt: skip

# Renders a conversation with (True) or without a generation prompt; raises `Rejected` where the template does.
Render = Callable[[Conversation, bool], str]

SYSTEM, USER, ASSISTANT = "\ue000", "\ue100", "\ue200"  # markers: the n-th content of a role is marked chr(ord + n)
MARKER = re.compile("([\ue000-\ue2ff])")
TURNS = (1, 2, 3, 4, 5)
# What a template can raise beside Jinja's own errors: it divides, looks up and calls.
OF_TEMPLATES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
PLACE = ("$first", "$last", "$system")  # what the text around a user message may depend on


class Rejected(Exception):
    """The chat template raised an error of its own on a conversation."""


@dataclass(frozen=True)
class Derived:
    """A Go template, and facts about the chat template."""

    template: str
    bos: str  # what the chat template writes at the start and the GGUF's tokenizer adds, so that Go must not; or ""
    takes_system: bool  # False also where the chat template leaves a system message out
    turn_end: str  # what the template puts right after an assistant's content, before the next turn


def jinja_render(chat_template: str, variables: dict[str, Any]) -> Render:
    """Return transformers' renderer of `chat_template`. `variables`: eos_token and the like, by name."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    today = datetime.now().strftime  # of all renderings; the variable hides the global function of the same name

    def render(conversation: Conversation, generation_prompt: bool, day: Callable[[str], str] = today) -> str:
        try:
            texts, _ = render_jinja_template(
                [[dict(message) for message in conversation]],
                chat_template=chat_template,
                add_generation_prompt=generation_prompt,
                strftime_now=day,
                **variables,
            )
        except (TemplateError, *OF_TEMPLATES) as error:
            raise Rejected(f"{type(error).__name__}: {error}") from error
        return texts[0]

    has_date = False
    with contextlib.suppress(Rejected):  # for another reason, which `derive_template` reports
        asked = dialogue(1, system=not rejects(render, dialogue(1, system=True)))  # as the Modelfile asks
        has_date = render(asked, True, lambda _: "one day") != render(asked, True, lambda _: "another day")
    if has_date:
        raise UserError(
            "the chat template writes today's date into the prompt; a Modelfile would keep the day of its making. "
            "Write a fixed date into the chat template before training"
        )
    return render


def derive_template(render: Render, bos: str = "") -> Derived:
    """Return the Go template of the chat template behind `render`.

    `bos` is the token that the tokenizer adds before a plain text and that is left out here; "" if it adds none.
    Raises `UserError` for a chat template that such a Go template can't follow.
    """
    error = rejects(render, dialogue(1))
    accepts_system = not rejects(render, dialogue(1, system=True))
    if error:
        asks = "asks for a system message" if accepts_system else "fails on a lone user message"
        raise UserError(f"the chat template {asks}: {error}")
    if bos and not render(dialogue(1), True).startswith(bos):
        bos = ""
    systems = (False, True) if accepts_system else (False,)
    gaps = {(turns, system): gaps_of(render, bos, turns, system) for system in systems for turns in TURNS}
    user, answer, turn_end = around(gaps, tail_of(render, bos, dialogue(1)), tail_of(render, bos, dialogue(2)[:-1]))
    start = beginnings(gaps, systems, user.opening)

    user_text = go_written(user.opening, PLACE) + go_written(user.slot, PLACE) + go_written(user.close, PLACE)
    user_text += go_if("$last", prompt := go_written(user.prompt, ()))
    answer_text = go_written(answer.opening, ()) + go_written(answer.slot, ())
    closed = go_written(answer.close, ()) + go_if("$last", prompt)
    answer_text += go_if("gt (len (slice $.Messages $i)) 1", closed)  # the model goes on with an answer at the very end
    text = FIND_END + go_written(start, ("$system",)) + "{{range $i, $_ := .Messages}}{{$last := eq $i $end}}"
    text += f'{{{{if eq .Role "user"}}}}{user_text}' + ("{{$first = false}}" if "$first" in user_text else "")
    text += f'{{{{else if eq .Role "assistant"}}}}{answer_text}{{{{end}}}}{{{{end}}}}' + go_if("lt $end 0", prompt)
    if "$first" in user_text:
        text = "{{$first := true}}" + text
    if "$system" in text:
        mark = '{{range .Messages}}{{if eq .Role "system"}}{{$system = true}}{{end}}{{end}}'
        if render([{"role": "system", "content": ""}, *dialogue(1)], True) == render(dialogue(1), True):
            mark = "{{if .System}}{{$system = true}}{{end}}"
        text = "{{$system := false}}" + mark + text
    takes_system = accepts_system and SYSTEM in render(dialogue(1, system=True), True)
    return Derived(trimmers(text) + text, bos, takes_system, turn_end)


def of_tokenizer(tokenizer: Any, where: Path | str) -> tuple[Render, Derived]:
    """Return a tokenizer's renderer and its Go template. Raises `UserError`, naming `where`, without a template."""
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(f"{where}: the tokenizer has no chat template; expected that of training. Run: make merge")
    try:
        render = jinja_render(tokenizer.chat_template, tokenizer.special_tokens_map)
        return render, derive_template(render, tokenizer.bos_token if adds_bos(tokenizer) else "")
    except UserError as error:
        raise UserError(f"{where}: {error.message}") from error


def refuse_unused_system(derived: Derived, system: str, format_name: str, where: Path | str) -> None:
    """Raise `UserError` when there is a system prompt, and the chat template refuses it or leaves it out."""
    if system and not derived.takes_system:
        raise UserError(
            f"{where}: the chat template refuses system messages or leaves them out, but the format {format_name} has "
            "a system prompt. Train with a chat template that writes it, or with [format] name = 'think'"
        )


class Table(dict[tuple[bool, ...], Pieces]):
    """Pieces by place. Raises `UserError` when a place gets two different ones."""

    def __setitem__(self, place: tuple[bool, ...], pieces: Pieces) -> None:
        if self.setdefault(place, pieces) != pieces:
            raise UserError(
                f"the text that the chat template writes around a message depends on its position: {self[place]!r} and "
                f"{pieces!r}; only the first and the last user message may differ from the others"
            )


@dataclass(frozen=True)
class Gaps:
    """The pieces before, between and after the contents of one conversation, and how each content is trimmed."""

    gaps: list[Pieces]
    slots: list[Slot]


@dataclass(frozen=True)
class Turn:
    """The text around the contents of one role: of a user by place, of an assistant always the same."""

    opening: Table = field(default_factory=Table)
    slot: Table = field(default_factory=Table)
    close: Table = field(default_factory=Table)
    prompt: Table = field(default_factory=Table)  # what follows the last user message: the generation prompt


def around(gaps: dict[tuple[int, bool], Gaps], end_of_user: str, end_of_answer: str) -> tuple[Turn, Turn, str]:
    """Return a user's turn (without the first one's opening), an assistant's, and the text that ends the latter."""
    user, answer = Turn(), Turn()
    for (turns, system), each in gaps.items():
        for turn in range(turns):
            place = (turn == 0, turn == turns - 1, system)
            user.slot[place] = (each.slots[2 * turn],)
            user.close[place], opening = split_text(each.gaps[2 * turn + 1], end_of_user)
            if turn == turns - 1:
                user.prompt[()] = opening
                continue
            answer.opening[()] = opening
            answer.slot[()] = (each.slots[2 * turn + 1],)
            answer.close[()], opening = split_text(each.gaps[2 * turn + 2], end_of_answer)
            user.opening[False, turn + 1 == turns - 1, system] = opening
    return user, answer, "".join(str(piece) for piece in answer.close[()])


def beginnings(gaps: dict[tuple[int, bool], Gaps], systems: Sequence[bool], opening: Table) -> Table:
    """Return the text before the first message, by system prompt or none; add the first user's opening to `opening`.

    If the text before the first content ends with the usual opening, the rest of it is the beginning. If not, as with a
    system prompt in the first user turn, all of it opens that turn.
    """
    usual = opening[False, False, False]
    start = Table()
    for system in systems:
        heads = {turns: each.gaps[0] for (turns, with_system), each in gaps.items() if with_system == system}
        rests = {without_end(head, usual) for head in heads.values()}
        apart = len(rests) == 1 and None not in rests
        start[(system,)] = (rests.pop() or ()) if apart else ()
        for turns, head in heads.items():
            opening[True, turns == 1, system] = usual if apart else head
    return start


def dialogue(turns: int, system: bool = False, left: str = "", right: str = "") -> list[Message]:
    """Return a conversation of markers with `turns` user messages, the last without an answer."""
    found = [{"role": "system", "content": left + SYSTEM + right}] if system else []
    for turn in range(turns):
        found.append({"role": "user", "content": left + chr(ord(USER) + turn) + right})
        if turn < turns - 1:
            found.append({"role": "assistant", "content": left + chr(ord(ASSISTANT) + turn) + right})
    return found


def rejects(render: Render, conversation: Conversation) -> str:
    """Return the error of the chat template on `conversation`, "" if it renders it."""
    try:
        render(conversation, True)
    except Rejected as error:
        return str(error)
    return ""


def parts_of(render: Render, bos: str, conversation: Conversation, generation_prompt: bool = True) -> list[str]:
    """Render a conversation of markers and cut it at them: text, marker, text, ..., marker, text; BOS left out."""
    try:
        text = render(conversation, generation_prompt)
    except Rejected as error:
        raise UserError(f"the chat template fails on {len(conversation)} messages: {error}") from error
    return MARKER.split(text.removeprefix(bos))


def gaps_of(render: Render, bos: str, turns: int, system: bool) -> Gaps:
    """Render one conversation of markers; return what is around them."""
    base = parts_of(render, bos, dialogue(turns, system))
    markers = base[1::2]
    contents = [message["content"] for message in dialogue(turns)]
    if [marker for marker in markers if marker != SYSTEM] != contents:
        raise UserError(f"the chat template does not write every content once and in order ({turns} user messages)")
    left, right = [""] * len(markers), [""] * len(markers)
    for space in WHITESPACE:
        before = parts_of(render, bos, dialogue(turns, system, left=space))
        after = parts_of(render, bos, dialogue(turns, system, right=space))
        if before[1::2] != markers or after[1::2] != markers:
            raise UserError(f"the chat template drops or moves a content with a {space!r} beside it")
        for place in range(len(markers)):
            left[place] += space if trims_of(base[2 * place], before[2 * place], space, at_end=True) else ""
            right[place] += space if trims_of(base[2 * place + 2], after[2 * place + 2], space, at_end=False) else ""
    gaps: list[list[Piece]] = [[base[0]]]
    slots = []
    for place, marker in enumerate(markers):
        slot = Slot("$.System" if marker == SYSTEM else ".Content", left[place], right[place])
        if marker == SYSTEM:
            gaps[-1] += [slot, base[2 * place + 2]]
        else:
            slots.append(slot)
            gaps.append([base[2 * place + 2]])
    return Gaps([tuple(piece for piece in gap if piece != "") for gap in gaps], slots)


def trims_of(bare: str, beside: str, space: str, *, at_end: bool) -> bool:
    """Return whether `space`, put between a content and the text `bare`, is trimmed; `beside` is the text it gave."""
    if beside == bare:
        return True
    if beside == (bare + space if at_end else space + bare):
        return False
    raise UserError(f"the chat template writes {beside!r} instead of {bare!r} when a content has a {space!r} beside it")


def tail_of(render: Render, bos: str, conversation: Conversation) -> str:
    """Return the text after the last content without a generation prompt, "" where the chat template fails."""
    try:
        return parts_of(render, bos, conversation, generation_prompt=False)[-1]
    except UserError:
        return ""
