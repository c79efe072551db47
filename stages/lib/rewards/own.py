"""A user's own rewards: `FILE.py:FUNCTION`, found, imported and checked."""

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.lib.errors import UserError, nearest
from stages.lib.rewards.checked import checked_reward, where
from stages.lib.rewards.importing import forget_files, import_file, refuse_unseen
from stages.lib.rewards.judge import Reward
from stages.lib.rewards.local import own_reward_files

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_own(name: str) -> bool:
    """Return whether a reward's name in the recipe means a file of the user's."""
    return ":" in name or name.endswith(".py")


def _own_path(name: str, recipe_folder: Path) -> Path:
    """Return the file of `FILE.py:FUNCTION`. Raises `UserError` for another form and for a file that is not there."""
    file_name, _, function_name = name.rpartition(":")
    path = (recipe_folder / file_name).resolve()
    if not file_name.endswith(".py") or not function_name.isidentifier():
        raise UserError(f"[rewards] {name!r}: expected 'FILE.py:FUNCTION', the file relative to the recipe")
    if not path.is_file():
        raise UserError(f"[rewards] {name!r}: there is no file {path}")
    return path


def check_own(name: str, recipe_folder: Path) -> None:
    """Raise `UserError` for a file that does not parse or binds no such name at its top level; no line of it is run.

    Only `load_own` finds out what the name is bound to, and what an `import *` binds.
    """
    path = _own_path(name, recipe_folder)
    try:
        source = importlib.util.decode_source(path.read_bytes())
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError) as error:  # also of its encoding
        raise UserError(f"[rewards] {name!r}: {where(error, [str(path)])}") from error
    is_bound = name.rpartition(":")[2] in _names_bound(tree)
    if not is_bound and not re.search(r"\bimport[\s\\]*\*", source):
        raise _no_function(name, path, [node.name for node in tree.body if isinstance(node, FUNCTIONS)])


def _names_bound(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module binds at its top level, by assignment, definition or import."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.alias():
                yield node.asname or node.name.partition(".")[0]
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp() | ast.Lambda():
                pass  # bind names of their own
            case _:
                yield from _names_bound(node)


def _no_function(name: str, path: Path, functions: Sequence[str]) -> UserError:
    function_name = name.rpartition(":")[2]
    public = [each for each in functions if not each.startswith("_")]
    return UserError(
        f"[rewards] {name!r}: {path} has no function {function_name!r}{nearest(function_name, public)}; "
        f"it has: {', '.join(public) or 'none'}"
    )


def load_own(names: Sequence[str], recipe_folder: Path) -> dict[str, Reward]:
    """Import the user's files and return their rewards, by name, with what they return checked at each call.

    The files are read anew, each once: two rewards of one file share what it keeps. Raises `UserError` for a file that
    can't be imported, or has no such function.
    """
    forget_files()
    paths = {name: _own_path(name, recipe_folder) for name in names}
    files = list(own_reward_files(names, recipe_folder).values())
    loaded = {}
    for name, path in paths.items():
        try:
            module = import_file(path, [each.parent for each in paths.values()])
        except (Exception, SystemExit) as error:  # the user needs to know where, whatever it is
            refuse_unseen(name, files)
            raise UserError(f"[rewards] {name!r}: {where(error, [str(path), *map(str, files)])}") from error
        refuse_unseen(name, files)
        loaded[name] = checked_reward(name, _function_in(name, path, module), [path, *files])
    return loaded


def _function_in(name: str, path: Path, module: ModuleType) -> Callable[..., Any]:
    """Return what can be called in `module` under the reward's name."""
    function: Any = getattr(module, name.rpartition(":")[2], None)
    if inspect.isclass(function):
        raise UserError(f"[rewards] {name!r}: {path} has a class of this name; expected a function or an object of it")
    if not callable(function):
        raise _no_function(name, path, [key for key, value in vars(module).items() if inspect.isfunction(value)])
    found: Callable[..., Any] = function
    return found
