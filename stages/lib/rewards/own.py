"""A user's own rewards: `FILE.py:FUNCTION`, found, imported and checked."""

import ast
import contextlib
import copy
import functools
import importlib.util
import inspect
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.lib.artifact.code import ROOT, imported_modules
from stages.lib.errors import UserError, nearest
from stages.lib.rewards.judge import Completion, Reward

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_REWARD = 3e38  # TRL adds rewards up in float32, which holds no more


def own_reward_files(names: Sequence[str], recipe_folder: Path) -> dict[str, Path]:
    """Return the user's own files among the rewards `names`, by name: a stage that rewards by them depends on them.

    The files of the checkout that they import, outside `stages/`, are among them. A file that is not there is left out,
    and so are the imports of one that does not parse: `load_own` refuses both.
    """
    todo = {name: (recipe_folder / name.rpartition(":")[0]).resolve() for name in names if ":" in name}
    found: dict[str, Path] = {}
    while todo:
        name, path = todo.popitem()
        if name in found or not path.is_file():
            continue
        found[name] = path
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            modules = imported_modules(path.read_bytes())
            todo |= {module: ROOT / module for module in modules if not module.startswith("stages/")}
    return found


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
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # a NUL byte, thousands of brackets
        raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
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


def load_own(name: str, recipe_folder: Path) -> Reward:
    """Import the user's file and return its reward, with what it returns checked at each call."""
    path = _own_path(name, recipe_folder)
    function_name = name.rpartition(":")[2]
    module = _import_file(name, path)
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        raise _no_function(name, path, [key for key, value in vars(module).items() if inspect.isfunction(value)])
    return _check_calls(name, function_name, function)


def _import_file(name: str, path: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location(f"rewards_from_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user needs to know where, whatever it is
        raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
    return module


def _check_calls(name: str, function_name: str, function: Callable[..., Any]) -> Reward:
    """Return the user's function, named for the log, with its calls checked: an error in one names the function.

    It gets the arguments it asks for by name, or all of them if it takes `**kwargs`. Lists are copies, since the other
    rewards and the trainer use them as well.
    """
    parameters = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise UserError(f"[rewards] {name!r}: expected a plain function, found an async or a generator function")
    if inspect.Parameter.POSITIONAL_ONLY in kinds or not ("completions" in parameters or takes_all):
        raise UserError(
            f"[rewards] {name!r}: expected {function_name}(completions, **kwargs), which is called with names only; "
            f"found {function_name}{inspect.signature(function)}"
        )
    path = Path(function.__code__.co_filename)
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    mandatory = [key for key, p in parameters.items() if p.default is p.empty and p.kind not in variadic]

    @functools.wraps(function)
    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        arguments = {"completions": completions, **columns}
        missing = [key for key in mandatory if key not in arguments]
        if missing:
            raise UserError(
                f"[rewards] {name!r} asks for {', '.join(missing)}; expected names of columns: {', '.join(arguments)}"
            )
        inputs = arguments if takes_all else {key: arguments[key] for key in parameters if key in arguments}
        # Only lists: the trainer's state, which it passes as well, can't be copied.
        inputs = {key: copy.deepcopy(value) if isinstance(value, list) else value for key, value in inputs.items()}
        try:
            rewards = function(**inputs)
        except (Exception, SystemExit) as error:  # the user needs to know where, whatever it is
            raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
        return _finite_rewards(name, rewards, len(completions))

    reward.__name__ = function_name
    return reward


def _finite_rewards(name: str, rewards: Any, count: int) -> list[float]:
    if not isinstance(rewards, list | tuple):
        raise UserError(f"[rewards] {name!r} returned {type(rewards).__name__}; expected a list of {count} numbers")
    if len(rewards) != count:
        raise UserError(f"[rewards] {name!r} returned {len(rewards)} rewards for {count} completions")
    for position, reward in enumerate(rewards):
        size: Any = abs(reward) if isinstance(reward, numbers.Real) else math.inf
        if not size <= MAX_REWARD:  # NaN is not, either; float() would raise on 10**400
            raise UserError(
                f"[rewards] {name!r} returned {_shown(reward)} ({type(reward).__name__}) for completion {position}; "
                f"expected a finite number, {MAX_REWARD:.0e} at most in size"
            )
    return [float(reward) for reward in rewards]


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write out an integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _where(error: BaseException, path: Path) -> str:
    """Return the error and, if known, the line of the user's file that raised it."""
    if isinstance(error, SyntaxError):
        return f"{path}{f', line {error.lineno}' if error.lineno else ''}: SyntaxError: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    return f"{where}: {type(error).__name__}: {error}"
