"""The digest of a stage's code, of the modules that can change its result alone."""

import ast
import hashlib
import io
import json
import tokenize
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[3]
# Modules that change no result: they decide whether a stage runs, where it goes on and what a person reads. The
# recipe's values are in the identity themselves; its tables and the limits in gguf/types.py count as code.
FRAME = (
    "stages/lib/artifact/", "stages/lib/bars.py", "stages/lib/bounded.py", "stages/lib/disk.py", "stages/lib/errors.py",
    "stages/lib/machine/",
    "stages/lib/options.py", "stages/lib/recipe/read.py", "stages/lib/recipe/rules.py", "stages/lib/recipe/toml.py",
    "stages/lib/report/figures.py", "stages/lib/report/terminal.py", "stages/lib/train/callbacks.py",
    "stages/lib/train/checkpoints.py", "stages/lib/train/health.py", "stages/lib/train/launch.py",
    "stages/lib/train/trackers.py",
)  # fmt: skip
# Python 3.12 takes an f-string apart; before, it is one token like any other string.
FSTRING_START, FSTRING_END = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)


def code_digest(stage: str) -> str:
    """Return a sha256 over the stage's own file and every module under `stages.lib` it imports, less those of FRAME.

    It is over the modules' paths in the checkout and their source texts, less comments, docstrings and blank lines: the
    same on every Python, and a new wording never retrains a model.
    """
    todo = [f"stages/{stage.replace('-', '_')}.py"]
    sources: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in sources or name.startswith(FRAME) or not (ROOT / name).is_file():
            continue
        source = (ROOT / name).read_text(encoding="utf-8")
        sources[name] = without_comments(source)
        todo += imported_modules(source)
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


def imported_modules(source: str | bytes) -> list[str]:
    """Return the paths in the checkout of its modules that `source` imports, also within a function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    modules = [PurePosixPath(*name.split(".")) for name in found]
    paths = [f"{module}.py" for module in modules]
    paths += [f"{package}/__init__.py" for module in modules for package in (module, *module.parents)]
    return [path for path in dict.fromkeys(paths) if (ROOT / path).is_file()]


def without_comments(source: str) -> str:
    """Return `source` less comments, docstrings, and the blank lines and trailing blanks that are in no string."""
    lines = source.split("\n")
    in_strings: set[int] = set()  # but for a string's last line, which ends outside it
    opened: list[int] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (row, column), (end, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.type == tokenize.STRING:
            in_strings.update(range(row, end))
        elif token.type == FSTRING_START:
            opened.append(row)
        elif token.type == FSTRING_END:
            in_strings.update(range(opened.pop(), end))
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            docstring = node.body[0]
            docstrings.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    in_strings -= docstrings
    code_lines = []
    for number, line in enumerate(lines, 1):
        if number in in_strings:
            code_lines.append(line)
        elif line.strip() and number not in docstrings:
            code_lines.append(line.rstrip())
    return "\n".join(code_lines)
