"""Derive Ollama's Go TEMPLATE from a Jinja chat template, by watching what the chat template does.

The chat template is rendered on short conversations whose contents are marker characters. What stands between two
markers is what the template puts there, and what is missing around a marker that had white space beside it is what the
template trims. No name of a model and no part of the Jinja source is looked at: a template may be written in any way.

A gap between two contents is split into the end of one message and the opening of the next, and each of these may
depend on three facts: whether the user message is the first, whether it is the last, and whether there is a system
prompt. That covers concatenation by role, a system prompt folded into the first or the last user turn, a default system
prompt, trimming, and text after the generation prompt such as `<think>`. Whatever does not fit is refused.

A derived template is a claim, not a proof: the stage renders both on `stages.lib.go_render.CONVERSATIONS`.

Go's template language has no function that trims, so trimming is written as two recursive templates that drop a
character at a time. How Ollama hands messages to a template: `collate` in template/template.go of ollama/ollama.
"""

import os.path
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError

Message = dict[str, str]
Conversation = Sequence[Message]
# Renders a conversation with (True) or without a generation prompt; raises `Rejected` where the template does.
Render = Callable[[Conversation, bool], str]

WHITESPACE = tuple(chr(code) for code in range(0x3001) if chr(code).isspace())  # what Python's str.strip removes
SYSTEM, USER, ASSISTANT = "\ue000", "\ue100", "\ue200"  # markers: the n-th content of a role is marked chr(ord + n)
MARKER = re.compile("([\ue000-\ue2ff])")
TURNS = (1, 2, 3, 4, 5)
PLACE = ("$first", "$last", "$system")  # what a user message's surroundings may depend on


class Rejected(Exception):
    """The chat template raised an error of its own on a conversation."""


@dataclass(frozen=True)
class Slot:
    """Where a content goes: Go's name of it, and which characters are trimmed off either end of it."""

    name: str  # ".Content" or "$.System"
    left: str = ""
    right: str = ""


Piece = str | Slot
Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Derived:
    """A Go template, and what was seen of the chat template on the way."""

    template: str
    bos: str  # the BOS token that the chat template writes at the start, "" if it writes none; Ollama's tokenizer does
    takes_system: bool
    turn_end: str  # what the template puts right after an assistant's content, before the next turn


def jinja_render(chat_template: str, special_tokens: dict[str, str]) -> Render:
    """Give a renderer of `chat_template` by transformers itself. `special_tokens`: eos_token and the like, by name."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(conversation: Conversation, generation_prompt: bool, **variables: Any) -> str:
        try:
            rendered, _ = render_jinja_template(
                [[dict(message) for message in conversation]],
                chat_template=chat_template,
                add_generation_prompt=generation_prompt,
                **special_tokens,
                **variables,
            )
        except (TemplateError, TypeError) as error:
            raise Rejected(f"{type(error).__name__}: {error}") from error
        return rendered[0]

    # A variable of the rendering hides the global function of the same name.
    def on(day: str) -> str:
        return render([{"role": "user", "content": "x"}], True, strftime_now=lambda _: day)

    try:
        dated = on("one day") != on("another day")
    except Rejected:
        dated = False  # rejected for another reason, which `derive` reports
    if dated:
        raise UserError(
            "the chat template writes today's date into the prompt; a Modelfile would repeat for ever the day it was "
            "made on. Write a fixed date into the chat template before training"
        )
    return render


def derive_template(render: Render, bos: str = "") -> Derived:
    """Give the Go template that does what the chat template behind `render` does, BOS left out.

    Raises `UserError` for a chat template that does something a Go template of this kind can't do.
    """
    error = rejects(render, dialogue(1))
    takes_system = not rejects(render, dialogue(1, system=True))
    if error:
        asks = "asks for a system message" if takes_system else "fails on a lone user message"
        raise UserError(f"the chat template {asks}: {error}")
    if bos and not render(dialogue(1), True).startswith(bos):
        bos = ""
    systems = (False, True) if takes_system else (False,)
    seen = {(turns, system): gaps_of(render, bos, turns, system) for system in systems for turns in TURNS}
    user, answer, turn_end = around(seen, tail_of(render, bos, dialogue(1)), tail_of(render, bos, dialogue(2)[:-1]))
    start = beginnings(seen, systems, user.opening)

    asked = go_written(user.opening, PLACE) + go_written(user.slot, PLACE) + go_written(user.close, PLACE)
    asked += when_role("$last", go_written(user.prompt, ()))
    answered = go_written(answer.opening, ()) + go_written(answer.slot, ())
    answered += when_role("not $last", go_written(answer.close, ()))  # a last answer is one to be gone on with
    text = go_written(start, ("$system",))
    text += "{{range $i, $_ := .Messages}}{{$last := eq (len (slice $.Messages $i)) 1}}"
    text += f'{{{{if eq .Role "user"}}}}{asked}' + ("{{$first = false}}" if "$first" in asked else "")
    text += f'{{{{else if eq .Role "assistant"}}}}{answered}{{{{end}}}}{{{{end}}}}'
    if "$first" in asked:
        text = "{{$first := true}}" + text
    if "$system" in text:
        if empty_system_is_none(render):
            mark = when_role(".System", "{{$system = true}}")
        else:
            mark = "{{range .Messages}}" + when_role('eq .Role "system"', "{{$system = true}}") + "{{end}}"
        text = "{{$system := false}}" + mark + text
    return Derived(trimmers(text) + text, bos, takes_system, turn_end)


def of_tokenizer(tokenizer: Any, where: Path | str) -> tuple[Render, Derived]:
    """Give the renderer of a transformers tokenizer's chat template and the Go template derived from it.

    `where` is what an error names. Raises `UserError` for no chat template, or one that can't be said in Go.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(f"{where}: the tokenizer has no chat template; expected the one of training. Run: make merge")
    try:
        render = jinja_render(tokenizer.chat_template, tokenizer.special_tokens_map)
        return render, derive_template(render, tokenizer.bos_token or "")
    except UserError as error:
        raise UserError(f"{where}: {error.message}") from error


def refuse_unused_system(derived: Derived, system: str, format_name: str, where: Path | str) -> None:
    """Raise `UserError` when the chat template refuses system messages and there is a system prompt."""
    if system and not derived.takes_system:
        raise UserError(
            f"{where}: the chat template refuses system messages, but the format {format_name} has a system prompt. "
            "Train with a chat template that takes one"
        )


class Table(dict[tuple[bool, ...], Pieces]):
    """Pieces by place; a place seen twice has to have held the same."""

    def __setitem__(self, place: tuple[bool, ...], pieces: Pieces) -> None:
        if self.setdefault(place, pieces) != pieces:
            raise UserError(
                "the chat template writes something else around a message depending on its position: "
                f"{self[place]!r} and {pieces!r}; only the first and the last user message may differ from the others"
            )


@dataclass(frozen=True)
class Gaps:
    """One conversation, seen: the pieces before, between and after the contents, and how each content is trimmed."""

    gaps: list[Pieces]
    slots: list[Slot]


@dataclass(frozen=True)
class Turn:
    """What stands around the contents of one role; a user's by place, an assistant's always the same."""

    opening: Table = field(default_factory=Table)
    slot: Table = field(default_factory=Table)
    close: Table = field(default_factory=Table)
    prompt: Table = field(default_factory=Table)  # what follows the last user message: the generation prompt


def around(seen: dict[tuple[int, bool], Gaps], end_of_user: str, end_of_answer: str) -> tuple[Turn, Turn, str]:
    """Sort what was seen into a user's turn, without the first's opening, and an assistant's, and say how that ends."""
    user, answer = Turn(), Turn()
    for (turns, system), found in seen.items():
        for turn in range(turns):
            place = (turn == 0, turn == turns - 1, system)
            user.slot[place] = (found.slots[2 * turn],)
            user.close[place], opening = split_text(found.gaps[2 * turn + 1], end_of_user)
            if turn == turns - 1:
                user.prompt[()] = opening
                continue
            answer.opening[()] = opening
            answer.slot[()] = (found.slots[2 * turn + 1],)
            answer.close[()], opening = split_text(found.gaps[2 * turn + 2], end_of_answer)
            user.opening[False, turn + 1 == turns - 1, system] = opening
    return user, answer, "".join(str(piece) for piece in answer.close[()])


def beginnings(seen: dict[tuple[int, bool], Gaps], systems: Sequence[bool], opening: Table) -> Table:
    """Give what comes before the first message, with and without a system prompt; add the first user's to `opening`.

    Where the text before the first content ends as every user message opens, the rest of it is the beginning. Where it
    does not, as with a system prompt folded into the first user turn, all of it opens that turn.
    """
    usual = opening[False, False, False]
    start = Table()
    for system in systems:
        heads = {turns: found.gaps[0] for (turns, with_system), found in seen.items() if with_system == system}
        rests = {without_end(head, usual) for head in heads.values()}
        apart = len(rests) == 1 and None not in rests
        start[(system,)] = (rests.pop() or ()) if apart else ()
        for turns, head in heads.items():
            opening[True, turns == 1, system] = usual if apart else head
    return start


def dialogue(turns: int, system: bool = False, left: str = "", right: str = "") -> list[Message]:
    """Give a conversation of markers with `turns` user messages, the last of which is unanswered."""
    found = [{"role": "system", "content": left + SYSTEM + right}] if system else []
    for turn in range(turns):
        found.append({"role": "user", "content": left + chr(ord(USER) + turn) + right})
        if turn < turns - 1:
            found.append({"role": "assistant", "content": left + chr(ord(ASSISTANT) + turn) + right})
    return found


def rejects(render: Render, conversation: Conversation) -> str:
    """Give the error that the chat template raises on `conversation`, "" if it renders it."""
    try:
        render(conversation, True)
    except Rejected as error:
        return str(error)
    return ""


def empty_system_is_none(render: Render) -> bool:
    """Say whether the chat template treats an empty system message as if there were none."""
    user = dialogue(1)
    return render([{"role": "system", "content": ""}, *user], True) == render(user, True)


def parts_of(render: Render, bos: str, conversation: Conversation, generation_prompt: bool = True) -> list[str]:
    """Render a conversation of markers and cut it at them: text, marker, text, ..., marker, text; BOS left out."""
    try:
        text = render(conversation, generation_prompt)
    except Rejected as error:
        raise UserError(f"the chat template fails on {len(conversation)} messages: {error}") from error
    return MARKER.split(text.removeprefix(bos))


def gaps_of(render: Render, bos: str, turns: int, system: bool) -> Gaps:
    """Render one conversation of markers and give what is around them."""
    base = parts_of(render, bos, dialogue(turns, system))
    markers = base[1::2]
    wanted = [message["content"] for message in dialogue(turns)]
    if [marker for marker in markers if marker != SYSTEM] != wanted:
        raise UserError(f"the chat template does not write every content once and in order ({turns} user messages)")
    left = dict.fromkeys(range(len(markers)), "")
    right = dict(left)
    for space in WHITESPACE:
        before = parts_of(render, bos, dialogue(turns, system, left=space))
        after = parts_of(render, bos, dialogue(turns, system, right=space))
        if before[1::2] != markers or after[1::2] != markers:
            raise UserError(f"the chat template drops or moves a content with a {space!r} beside it")
        for place in range(len(markers)):
            left[place] += space if trims_of(base[2 * place], before[2 * place], space, at_end=True) else ""
            right[place] += space if trims_of(base[2 * place + 2], after[2 * place + 2], space, at_end=False) else ""
    found: list[list[Piece]] = [[base[0]]]
    slots = []
    for place, marker in enumerate(markers):
        slot = Slot("$.System" if marker == SYSTEM else ".Content", left[place], right[place])
        if marker == SYSTEM:
            found[-1] += [slot, base[2 * place + 2]]
        else:
            slots.append(slot)
            found.append([base[2 * place + 2]])
    return Gaps([tuple(piece for piece in gap if piece != "") for gap in found], slots)


def trims_of(bare: str, beside: str, space: str, *, at_end: bool) -> bool:
    """Say whether `space`, which stood between a content and the text `bare`, is gone; `beside` is that text now."""
    if beside == bare:
        return True
    if beside == (bare + space if at_end else space + bare):
        return False
    raise UserError(f"the chat template writes {beside!r} instead of {bare!r} when a content has a {space!r} beside it")


def tail_of(render: Render, bos: str, conversation: Conversation) -> str:
    """Give what the chat template writes after the last content when no answer is asked for, "" if it won't say."""
    try:
        return parts_of(render, bos, conversation, generation_prompt=False)[-1]
    except UserError:
        return ""


def split_text(gap: Pieces, end: str) -> tuple[Pieces, Pieces]:
    """Cut a gap where the message before it ends: after as much of `end` as it starts with."""
    if not gap or not isinstance(gap[0], str):
        return (), gap
    common = os.path.commonprefix([gap[0], end])
    if common != end:
        common = re.sub("[<[][^]>]*$", "", common)  # not in the middle of a special token
    rest = gap[0][len(common) :]
    return ((common,) if common else ()), ((rest, *gap[1:]) if rest else gap[1:])


def without_end(gap: Pieces, opening: Pieces) -> Pieces | None:
    """Give `gap` without the opening of a user message at its end; None if it does not end so."""
    if not opening:
        return gap
    if len(opening) != 1 or not gap or not isinstance(gap[-1], str) or not isinstance(opening[0], str):
        return None
    if not gap[-1].endswith(opening[0]):
        return None
    rest = gap[-1].removesuffix(opening[0])
    return gap[:-1] + ((rest,) if rest else ())


def when_role(condition: str, text: str, otherwise: str = "") -> str:
    """Write an `if`, none for no text."""
    if not text:
        return when_role(f"not {condition}", otherwise) if otherwise else ""
    return f"{{{{if {condition}}}}}{text}{f'{{{{else}}}}{otherwise}' if otherwise else ''}{{{{end}}}}"


def go_written(table: dict[tuple[bool, ...], Pieces], facts: tuple[str, ...]) -> str:
    """Write a table as Go text: what all places begin with, then one `if` a fact, none where it makes no difference."""
    every = list(table.values())
    same = 0
    while every[0][same:] and all(pieces[same : same + 1] == every[0][same : same + 1] for pieces in every):
        same += 1
    if same:
        rest = {place: pieces[same:] for place, pieces in table.items()}
        return "".join(map(go_text, every[0][:same])) + go_written(rest, facts)
    if not facts:
        return ""
    held = {place[1:]: pieces for place, pieces in table.items() if place[0]}
    not_held = {place[1:]: pieces for place, pieces in table.items() if not place[0]}
    if all(held[place] == not_held[place] for place in held.keys() & not_held.keys()):
        return go_written({**held, **not_held}, facts[1:])
    return when_role(facts[0], go_written(held, facts[1:]), go_written(not_held, facts[1:]))


def go_text(piece: Piece) -> str:
    """Write one piece as Go template text.

    A brace, three quotation marks and what is not printable go in as Go strings: a brace could open an action, the
    quotation marks end a value in a Modelfile, and Ollama's reader of Modelfiles drops what is not printable.
    """
    if isinstance(piece, Slot):
        if not piece.left and not piece.right:
            return f"{{{{{piece.name}}}}}"
        return f'{{{{template "{trimmer_name(piece)}" {piece.name}}}}}'
    odd = re.compile(r'\{|"{3,}|[^\n\t -~]')
    return odd.sub(lambda found: found[0] if plain(found[0]) else "{{" + go_string(found[0]) + "}}", piece)


def plain(text: str) -> bool:
    """Say whether `text` may stand in a Modelfile's template as it is."""
    return text.isprintable() and text != "{" and '"""' not in text


def go_string(text: str) -> str:
    """Write `text` as a Go string of printable ASCII characters."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c if " " <= c <= "~" else escaped(c)) for c in text) + '"'


def escaped(character: str) -> str:
    """Write a character as Go's \\u or \\U escape."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def trimmer_name(slot: Slot) -> str:
    """Name the template that trims as `slot` asks: "trim-" and the code points, "all" standing for all white space."""
    everything = "".join(WHITESPACE)

    def side(characters: str) -> str:
        return "all" if characters == everything else ".".join(f"{ord(c):x}" for c in characters)

    return f"trim-{side(slot.left)}-{side(slot.right)}"


def trimmers(text: str) -> str:
    """Define every template that `text` uses to trim."""
    found = ""
    for name in dict.fromkeys(re.findall(r'\{\{template "(trim-[^"]*)"', text)):
        left, right = (
            "".join(WHITESPACE) if side == "all" else "".join(chr(int(code, 16)) for code in side.split(".") if code)
            for side in name.removeprefix("trim-").split("-")
        )
        print_it = f'{{{{template "{name}-right" .}}}}' if right else "{{.}}"
        found += f'{{{{define "{name}"}}}}'
        if left:
            found += f'{{{{$c := printf "%.1s" .}}}}{{{{if eq $c {" ".join(map(go_string, left))}}}}}'
            found += f'{{{{template "{name}" (slice . (len $c))}}}}{{{{else}}}}{print_it}{{{{end}}}}'
        else:
            found += print_it
        found += "{{end}}"
        if right:
            # A character of n bytes ends the text if the last n bytes are it: Go counts and slices bytes.
            sizes = sorted({len(c.encode()) for c in right})
            found += f'{{{{define "{name}-right"}}}}'
            for size in sizes:
                those = " ".join(go_string(c) for c in right if len(c.encode()) == size)
                cut = f"(len (slice . {size}))"
                found += f"{{{{if and (ge (len .) {size}) (eq (slice . {cut}) {those})}}}}"
                found += f'{{{{template "{name}-right" (slice . 0 {cut})}}}}{{{{else}}}}'
            found += "{{.}}" + "{{end}}" * len(sizes) + "{{end}}"
    return found
