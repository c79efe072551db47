"""Go's text/template, as Ollama uses it: templates written out of pieces, and rendered by Go itself.

Go's template language has no function that trims, so trimming is written as two recursive templates that drop a
character at a time. How Ollama hands messages to a template: `collate` in template/template.go of ollama/ollama.
"""

import json
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
WHITESPACE = tuple(chr(code) for code in range(0x3001) if chr(code).isspace())  # what Python's str.strip removes


@dataclass(frozen=True)
class Slot:
    """Where a content goes: Go's name of it, and which characters are trimmed off either end of it."""

    name: str  # ".Content" or "$.System"
    left: str = ""
    right: str = ""


Piece = str | Slot
Pieces = tuple[Piece, ...]


def render_by_go(template: str, conversations: Sequence[Conversation]) -> list[str]:
    """Render `template` on every conversation as Ollama does.

    Raises `ValueError` with Go's message if the template fails, `UserError` if the helper is not installed.
    """
    beside = f"{sys.prefix}/bin"
    program = shutil.which(HELPER, path=beside) or shutil.which(HELPER)
    if program is None:
        raise UserError(
            f"{HELPER}, which renders a Modelfile's template as Go does, is neither in {beside} nor on PATH; expected "
            f"it beside the packages. Run: make setup"
        )
    request = json.dumps({"template": template, "conversations": [list(each) for each in conversations]})
    done = subprocess.run([program], input=request, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return json.loads(done.stdout)["texts"]


def go_if(condition: str, text: str, otherwise: str = "") -> str:
    """Write an `if`, none for no text."""
    if not text:
        return go_if(f"not {condition}", otherwise) if otherwise else ""
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
    return go_if(facts[0], go_written(held, facts[1:]), go_written(not_held, facts[1:]))


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
