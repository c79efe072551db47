"""Go's text/template in Ollama's use: written from pieces, rendered by Go itself.

Go's template language can't trim: two recursive templates drop a character at a time. Ollama gives messages to a
template by `collate` in template/template.go of ollama/ollama.
"""

import json
import os.path
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stages.lib.errors import UserError

Message = dict[str, str]
Conversation = Sequence[Message]

HELPER = "temper-gotemplate"  # docker/gotemplate, compiled
# Go: the place of the last message that is written, -1 for none. What follows it, as a tool's result, is left out.
FIND_END = (
    '{{$end := -1}}{{range $i, $_ := .Messages}}{{if or (eq .Role "user") (eq .Role "assistant")}}{{$end = $i}}{{end}}'
    "{{end}}"
)
WHITESPACE = tuple(chr(code) for code in range(0x3001) if chr(code).isspace())  # what Python's str.strip removes


@dataclass(frozen=True)
class Slot:
    """The place of a content: Go's name of it, and the characters trimmed off either end."""

    name: str  # ".Content" or "$.System"
    left: str = ""
    right: str = ""


Piece = str | Slot
Pieces = tuple[Piece, ...]


def render_by_go(template: str, conversations: Sequence[Conversation]) -> list[str]:
    """Render `template` as Ollama does. Raises `ValueError` with Go's message, `UserError` without the helper."""
    beside = f"{sys.prefix}/bin"
    program = shutil.which(HELPER, path=beside) or shutil.which(HELPER)
    if program is None:
        raise UserError(
            f"{HELPER}, which renders a Modelfile's template by Go, is neither in {beside} nor on PATH; expected "
            f"it beside the packages. Run: make setup"
        )
    request = json.dumps({"template": template, "conversations": [list(each) for each in conversations]})
    done = subprocess.run([program], input=request, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return json.loads(done.stdout)["texts"]


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
    """Return `gap` without the opening of a user message at its end; None if it does not end with it."""
    if not opening:
        return gap
    if len(opening) != 1 or not gap or not isinstance(gap[-1], str) or not isinstance(opening[0], str):
        return None
    rest = gap[-1].removesuffix(opening[0])
    return None if rest == gap[-1] else gap[:-1] + ((rest,) if rest else ())


def go_if(condition: str, text: str, otherwise: str = "") -> str:
    """Return a Go `if`; no `if` where there is no text."""
    if not text:
        return go_if(f"not {condition}", otherwise) if otherwise else ""
    return f"{{{{if {condition}}}}}{text}{f'{{{{else}}}}{otherwise}' if otherwise else ''}{{{{end}}}}"


def go_written(table: dict[tuple[bool, ...], Pieces], facts: tuple[str, ...]) -> str:
    """Return a table as Go text: the common start of all places, then an `if` for each fact that makes a difference."""
    every = list(table.values())
    same = 0
    while every[0][same:] and all(pieces[same : same + 1] == every[0][same : same + 1] for pieces in every):
        same += 1
    if same:
        rest = {place: pieces[same:] for place, pieces in table.items()}
        return "".join(map(go_text, every[0][:same])) + go_written(rest, facts)
    if not facts:
        return ""
    where_true = {place[1:]: pieces for place, pieces in table.items() if place[0]}
    where_false = {place[1:]: pieces for place, pieces in table.items() if not place[0]}
    if all(where_true[place] == where_false[place] for place in where_true.keys() & where_false.keys()):
        return go_written({**where_true, **where_false}, facts[1:])
    return go_if(facts[0], go_written(where_true, facts[1:]), go_written(where_false, facts[1:]))


def go_text(piece: Piece) -> str:
    """Return one piece as Go template text.

    Three things become Go strings: a brace, which could open an action; three quotation marks, which end a Modelfile's
    value; and characters that are not printable, which Ollama's reader of Modelfiles drops.
    """
    if isinstance(piece, Slot):
        if not piece.left and not piece.right:
            return f"{{{{{piece.name}}}}}"
        return f'{{{{template "{trimmer_name(piece)}" {piece.name}}}}}'
    odd = re.compile(r'\{|"{3,}|[^\n\t -~]')
    return odd.sub(
        lambda match: match[0] if match[0] > "~" and match[0].isprintable() else "{{" + go_string(match[0]) + "}}",
        piece,
    )


def go_string(text: str) -> str:
    """Return `text` as a Go string of printable ASCII characters."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c if " " <= c <= "~" else escaped(c)) for c in text) + '"'


def escaped(character: str) -> str:
    """Return a character as Go's \\u or \\U escape."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def trimmer_name(slot: Slot) -> str:
    """Return the name of the template that trims `slot`: "trim-" and code points, "all" for all white space."""
    everything = "".join(WHITESPACE)

    def side(characters: str) -> str:
        return "all" if characters == everything else ".".join(f"{ord(c):x}" for c in characters)

    return f"trim-{side(slot.left)}-{side(slot.right)}"


def trimmers(text: str) -> str:
    """Return the definitions of the templates by which `text` trims."""
    definitions = ""
    for name in dict.fromkeys(re.findall(r'\{\{template "(trim-[^"]*)"', text)):
        left, right = (
            "".join(WHITESPACE) if side == "all" else "".join(chr(int(code, 16)) for code in side.split(".") if code)
            for side in name.removeprefix("trim-").split("-")
        )
        print_it = f'{{{{template "{name}-right" .}}}}' if right else "{{.}}"
        definitions += f'{{{{define "{name}"}}}}'
        if left:
            definitions += f'{{{{$c := printf "%.1s" .}}}}{{{{if eq $c {" ".join(map(go_string, left))}}}}}'
            definitions += f'{{{{template "{name}" (slice . (len $c))}}}}{{{{else}}}}{print_it}{{{{end}}}}'
        else:
            definitions += print_it
        definitions += "{{end}}"
        if right:
            # A character of n bytes ends the text if the last n bytes are it: Go counts and slices bytes.
            sizes = sorted({len(c.encode()) for c in right})
            definitions += f'{{{{define "{name}-right"}}}}'
            for size in sizes:
                those = " ".join(go_string(c) for c in right if len(c.encode()) == size)
                tail = f"(len (slice . {size}))"
                definitions += f"{{{{if and (ge (len .) {size}) (eq (slice . {tail}) {those})}}}}"
                definitions += f'{{{{template "{name}-right" (slice . 0 {tail})}}}}{{{{else}}}}'
            definitions += "{{.}}" + "{{end}}" * len(sizes) + "{{end}}"
    return definitions
