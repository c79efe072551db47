"""The files that a user's own reward is made of: its file, and the modules beside it and of the checkout it imports.

Nothing here runs a line of them or needs a package: `make/recipe.py` asks as well, with a bare Python.
"""

import ast
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


def own_reward_files(names: Sequence[str], recipe_folder: Path) -> dict[str, Path]:
    """Return the user's own files among the rewards `names`, by name: a stage that rewards by them depends on them.

    The modules that they import are among them, however deep: those that lie beside a reward's file, packages too, and
    those of the checkout outside `stages/`. A file that is not there is left out, and so are the imports of one that
    does not parse: `load_own` refuses both.
    """
    found = {
        name: path
        for name in names
        if ":" in name and (path := (recipe_folder / name.rpartition(":")[0]).resolve()).is_file()
    }
    homes = [path.parent for path in found.values()]
    todo, known = list(found.values()), set[Path]()
    while todo:
        path = todo.pop()
        if path in known:
            continue
        known.add(path)
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            todo += imported_files(path, [*homes, ROOT])
    # Such a name does not change when the folder moves: that would throw a run's checkpoints away.
    inside = recipe_folder.resolve()
    for path in sorted(known - set(found.values())):
        start = ROOT if path.is_relative_to(ROOT) else inside
        found[Path(os.path.relpath(path, start)).as_posix()] = path
    return found


def imported_files(path: Path, folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the files in `folders` that the module at `path` imports, also within a function. Raises `SyntaxError`."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        asked: list[tuple[Path | None, str]]
        if isinstance(node, ast.Import):
            asked = [(None, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if node.level else None
            asked = [(start, node.module or "")]
            asked += [(start, f"{node.module or ''}.{alias.name}".lstrip(".")) for alias in node.names]
        else:
            continue
        for start, module in asked:
            for folder in folders if start is None else [start]:
                yield from files_of_module(folder, module)


def files_of_module(folder: Path, module: str) -> Iterator[Path]:
    """Yield the files in `folder` that Python runs to import `module`: its own, and those of the packages around it."""
    place = folder
    for part in module.split(".") if module else []:
        place = place / part
        for file in (place / "__init__.py", place.with_name(f"{part}.py")):
            if file.is_file() and not file.resolve().is_relative_to(ROOT / "stages"):
                yield file.resolve()
    if not module and (folder / "__init__.py").is_file():  # from . import ...
        yield (folder / "__init__.py").resolve()
