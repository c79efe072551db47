"""Write and read Ollama's Modelfile.

The format has no escapes. A value is everything between three quotation marks, or between single ones, or a bare line;
Ollama's reader (parser/parser.go of ollama/ollama) ends a quoted value at the first line that ends with the closing
marks, and silently drops every character that is not printable. What it would not give back is refused here.
"""

from collections.abc import Iterable
from pathlib import Path

from stages.lib.errors import UserError

COMMANDS = ("from", "template", "system", "license", "parameter", "adapter", "message")


def command(name: str, value: str) -> str:
    """Give the lines of TEMPLATE, SYSTEM or LICENSE. Raises `UserError` for a value that a Modelfile can't hold."""
    return f'{name} """{checked(name, value)}"""\n'


def parameter(name: str, value: str | int | float) -> str:
    """Give the line of a PARAMETER. Raises `UserError` for a value that a Modelfile can't hold."""
    if not isinstance(value, str):
        return f"PARAMETER {name} {value}\n"
    marks = '"""' if '"' in value else '"'
    return f"PARAMETER {name} {marks}{checked(f'PARAMETER {name}', value)}{marks}\n"


def checked(where: str, value: str) -> str:
    """Give `value` if Ollama reads it back as it is, else raise `UserError`."""
    lost = [c for c in value if not c.isprintable() and c not in "\n\t"]
    if lost:
        raise UserError(
            f"Modelfile, {where}: holds {lost[0]!r}, which is not printable; Ollama would drop it without a word. "
            f"Take it out of {value[:60]!r}"
        )
    if '"""' in value:
        raise UserError(f'Modelfile, {where}: holds """, which ends a value there. Take it out of {value[:60]!r}')
    return value


def read(path: Path) -> list[tuple[str, str]]:
    """Give what Ollama reads out of a Modelfile: (command, value) in order, a PARAMETER as ("parameter NAME", value).

    Raises `UserError`, with file and line, for a file that Ollama refuses.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    number = 0
    while number < len(lines):
        start = number + 1
        line = lines[number].lstrip()
        number += 1
        if not line or line.startswith("#"):
            continue
        name, _, raw = line.partition(" ")
        if name.lower() not in COMMANDS:
            raise UserError(f"{path}, line {start}: {name!r} is not a command; known: {', '.join(COMMANDS)}")
        name = name.lower()
        if name == "parameter":
            of, _, raw = raw.partition(" ")
            name = f"parameter {of}"
        while (value := unquoted(raw)) is None:
            if number == len(lines):
                raise UserError(f"{path}, line {start}: the value of {name} does not end")
            raw += "\n" + lines[number]
            number += 1
        found.append((name, value))
    if not any(name == "from" for name, _ in found):
        raise UserError(f"{path}: has no FROM line")
    return found


def unquoted(raw: str) -> str | None:
    """Give a value without its marks, what is not printable dropped; None while its closing marks are missing."""
    text = "".join(c for c in raw if c.isprintable() or c in "\n\r\t").strip()
    for marks in ('"""', '"'):
        if text.startswith(marks):
            whole = len(text) >= 2 * len(marks) and text.endswith(marks)
            return text[len(marks) : -len(marks)] if whole else None
    return text


def values(commands: Iterable[tuple[str, str]], name: str) -> list[str]:
    """Give the values of every command called `name`."""
    return [value for command_name, value in commands if command_name == name]
