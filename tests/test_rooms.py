"""The rooms of `stages/lib`: each imports only rooms below it, and its files and functions are read in one sitting."""

import ast
import functools
from pathlib import Path

import pytest

LIB = Path(__file__).parents[1] / "stages" / "lib"
FLOORS = (
    ("errors",),
    ("bounded", "disk"),
    ("options",),
    ("jsonl", "distance", "ends", "bars", "recipe/tables", "mirror"),
    ("modelscope",),
    ("artifact", "answers", "gguf", "ollama"),
    ("rewards", "model"),
    ("recipe", "data", "train", "serve", "report"),
    ("machine", "benchmark"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in LIB.rglob("*.py") if path.name != "__init__.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 60, 6
# What is longer or takes more, and why it is not cut.
EXCEPTIONS = {
    "lib/recipe/tables.py": "a list to look things up in: each key of a recipe, its bound and what it is for on a line",
}


def room_of(path: Path) -> str:
    """Give the room of a module: its folder, or its own name on the ground floor."""
    name = path.relative_to(LIB).with_suffix("").as_posix()
    return name if name in FLOOR else name.partition("/")[0]


def imported(path: Path) -> set[str]:
    """Give the rooms that a module imports from, its own left out."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages.lib"):
            module = LIB.parents[1] / node.module.replace(".", "/")
            files = [module] if module.with_suffix(".py").is_file() else [module / each.name for each in node.names]
            rooms |= {room_of(file.with_suffix(".py")) for file in files}
    return rooms - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(LIB).as_posix())
def test_a_room_imports_only_rooms_below_it(path):
    assert [room for room in imported(path) if FLOOR[room] >= FLOOR[room_of(path)]] == []


@functools.cache
def too_large() -> dict[str, str]:
    """Give what is over a limit, by name, with what it has."""
    found = {}
    for path in [*FILES, *sorted(LIB.parent.glob("*.py"))]:
        name = path.relative_to(LIB.parent).as_posix()
        source = path.read_text()
        if source.count("\n") > MAX_FILE_LINES:
            found[name] = f"{source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
                parameters = len(names) - ("self" in names)
                if lines > MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS:
                    found[f"{name}:{node.name}"] = f"{lines} lines, {parameters} parameters"
    return found


def test_files_and_functions_are_short_but_for_the_exceptions():
    assert {name: size for name, size in too_large().items() if name not in EXCEPTIONS} == {}


def test_every_exception_is_still_one():
    assert sorted(set(EXCEPTIONS) - set(too_large())) == []
