"""Ollama's Modelfile, written and read.

The format has no escapes. A value stands between three quotation marks, between single ones, or on a bare line.
Ollama's reader (parser/parser.go of ollama/ollama) ends a quoted value at the first line that ends with the closing
marks, and drops characters that are not printable. A value that it would change is refused here.
"""

import io
from collections.abc import Iterable
from pathlib import Path

from stages.lib.errors import UserError

MAX_BYTES = 1 << 24
COMMANDS = (
    "from",
    "template",
    "system",
    "license",
    "parameter",
    "adapter",
    "message",
    "renderer",
    "parser",
    "requires",
)


def command(name: str, value: str) -> str:
    """Return the lines of TEMPLATE, SYSTEM or LICENSE. Raises `UserError` for a value that a Modelfile can't hold."""
    return f'{name} """{checked(name, value)}"""\n'


def parameter(name: str, value: str | int | float) -> str:
    """Return the line of a PARAMETER. Raises `UserError` for a value that a Modelfile can't hold."""
    if not isinstance(value, str):
        return f"PARAMETER {name} {value}\n"
    marks = '"""' if '"' in value else '"'
    return f"PARAMETER {name} {marks}{checked(f'PARAMETER {name}', value)}{marks}\n"


def checked(where: str, value: str) -> str:
    """Return `value` if Ollama reads it back unchanged, else raise `UserError`."""
    lost = [c for c in value if not c.isprintable() and c not in "\n\t"]
    if lost:
        raise UserError(
            f"Modelfile, {where}: holds {lost[0]!r}, which is not printable and which Ollama would drop. "
            f"Take it out of {value[:60]!r}"
        )
    if '"""' in value:
        raise UserError(f'Modelfile, {where}: holds """, which ends a value there. Take it out of {value[:60]!r}')
    return value


def read(path: Path) -> list[tuple[str, str]]:
    """Return a Modelfile as Ollama reads it: (command, value) in order, a PARAMETER as ("parameter NAME", value).

    Raises `UserError`, with file and line, for a file that Ollama refuses, and for one that is not UTF-8 or too large.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES:,} bytes; expected a Modelfile")
    try:
        lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); expected a Modelfile") from error
    commands = []
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
        text, marks = printable(raw), marks_of(raw)
        if marks and not (len(text) >= 2 * len(marks) and text.endswith(marks)):
            while number < len(lines) and not printable(lines[number]).endswith(marks):
                number += 1
            if number == len(lines):
                raise UserError(f"{path}, line {start}: the value of {name} has no end; expected closing marks")
            number += 1
            text = printable("\n".join([raw, *lines[start:number]]))
        commands.append((name, text[len(marks) : len(text) - len(marks)]))
    if not any(name == "from" for name, _ in commands):
        raise UserError(f"{path}: has no FROM line; expected one that names the GGUF file")
    return commands


def printable(raw: str) -> str:
    """Return a text without blanks around it and the characters that Ollama drops."""
    return "".join(c for c in raw if c.isprintable() or c in "\n\r\t").strip()


def marks_of(raw: str) -> str:
    """Return the marks that a value begins with, which its last line has to end with; "" for a bare line."""
    return next((marks for marks in ('"""', '"') if printable(raw).startswith(marks)), "")


def values(commands: Iterable[tuple[str, str]], name: str) -> list[str]:
    """Return the values of every command `name`."""
    return [value for command_name, value in commands if command_name == name]
