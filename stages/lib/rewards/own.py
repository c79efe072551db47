"""A user's own rewards: `FILE.py:FUNCTION`, found, imported and checked."""

import contextlib
import copy
import functools
import importlib.util
import inspect
import math
import numbers
import re
import symtable
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.lib.artifact.code import ROOT, imported_modules
from stages.lib.errors import UserError, nearest
from stages.lib.rewards.judge import Completion, Reward


def own_reward_files(names: Sequence[str], recipe_folder: Path) -> dict[str, Path]:
    """Give the user's own files among the rewards `names`, by name: who pays by them is out of date when they change.

    With them go the files of the checkout that they import, outside `stages/`. Leaves out those that are not there or
    do not parse, which `load_own` refuses.
    """
    todo = {name: (recipe_folder / name.rpartition(":")[0]).resolve() for name in names if ":" in name}
    found: dict[str, Path] = {}
    while todo:
        name, path = todo.popitem()
        if name in found or not path.is_file():
            continue
        found[name] = path
        with contextlib.suppress(SyntaxError, ValueError):
            modules = imported_modules(path.read_bytes())
            todo |= {module: ROOT / module for module in modules if not module.startswith("stages/")}
    return found


def is_own(name: str) -> bool:
    """Say whether a reward's name in the recipe is meant for a file of the user's."""
    return ":" in name or name.endswith(".py")


MAX_REWARD = 3e38  # TRL adds rewards up in float32, which holds no more


def own_path(name: str, recipe_folder: Path) -> Path:
    """Return the file of `FILE.py:FUNCTION`. Raises `UserError` for another form and for a file that is not there."""
    file_name, _, function_name = name.rpartition(":")
    path = (recipe_folder / file_name).resolve()
    if not file_name.endswith(".py") or not function_name.isidentifier():
        raise UserError(f"[rewards] {name!r}: expected 'FILE.py:FUNCTION', the file relative to the recipe")
    if not path.is_file():
        raise UserError(f"[rewards] {name!r}: there is no file {path}")
    return path


def look_for_own(name: str, path: Path) -> None:
    """Raise `UserError` when the file does not parse or binds no such name at its top level; no line of it is run.

    What the name is bound to shows when it is loaded, and so does what `import *` binds.
    """
    try:
        source = importlib.util.decode_source(path.read_bytes())
        symbols = symtable.symtable(source, str(path), "exec").get_symbols()
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL byte, in some versions of Python
        raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
    bound = [each for each in symbols if each.is_assigned() or each.is_imported()]
    is_bound = name.rpartition(":")[2] in [each.get_name() for each in bound]
    if not is_bound and not re.search(r"\bimport[\s\\]*\*", source):
        functions = [own.get_name() for each in bound for own in each.get_namespaces() if own.get_type() == "function"]
        raise UserError(_no_function(name, path, functions))


def _no_function(name: str, path: Path, functions: Sequence[str]) -> str:
    function_name = name.rpartition(":")[2]
    own = [each for each in functions if not each.startswith("_")]
    return (
        f"[rewards] {name!r}: {path} has no function {function_name!r}{nearest(function_name, own)}; "
        f"it has: {', '.join(own) or 'none'}"
    )


def load_own(name: str, recipe_folder: Path) -> Reward:
    """Import the user's file and return its reward, with what it returns checked at each call."""
    path = own_path(name, recipe_folder)
    function_name = name.rpartition(":")[2]
    module = _import_file(name, path)
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        functions = [key for key, thing in vars(module).items() if inspect.isfunction(thing)]
        raise UserError(_no_function(name, path, functions))
    return _checked(name, function_name, function)


def _import_file(name: str, path: Path) -> Any:
    spec: Any = importlib.util.spec_from_file_location(f"rewards_from_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises, they need to know where
        raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
    return module


def _checked(name: str, function_name: str, function: Callable[..., Any]) -> Reward:
    """Give the user's function wrapped so that whatever it does wrong is an error that names it, and so does the log.

    It gets the arguments it asks for by name, or all of them if it takes `**kwargs`; lists as copies, since the other
    rewards and the trainer go on with them.
    """
    taken = inspect.signature(function).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise UserError(f"[rewards] {name!r}: expected a plain function, found an async or a generator function")
    if inspect.Parameter.POSITIONAL_ONLY in kinds or not ("completions" in taken or takes_all):
        raise UserError(
            f"[rewards] {name!r}: expected {function_name}(completions, **kwargs), which is called with names only; "
            f"found {function_name}{inspect.signature(function)}"
        )
    path = Path(function.__code__.co_filename)
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [key for key, p in taken.items() if p.default is p.empty and p.kind not in variadic]

    @functools.wraps(function)
    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        given = {"completions": completions, **columns}
        missing = [key for key in needed if key not in given]
        if missing:
            raise UserError(
                f"[rewards] {name!r} asks for {', '.join(missing)}, which is no column; there are: {', '.join(given)}"
            )
        passed = given if takes_all else {key: given[key] for key in taken if key in given}
        # Lists alone: what else the trainer passes, such as its state, is not for copying.
        passed = {key: copy.deepcopy(value) if isinstance(value, list) else value for key, value in passed.items()}
        try:
            rewards = function(**passed)
        except (Exception, SystemExit) as error:  # whatever the user's function raises, they need to know where
            raise UserError(f"[rewards] {name!r}: {_where(error, path)}") from error
        return _checked_rewards(name, rewards, len(completions))

    reward.__name__ = function_name
    return reward


def _checked_rewards(name: str, rewards: Any, count: int) -> list[float]:
    if not isinstance(rewards, list | tuple):
        raise UserError(f"[rewards] {name!r} returned {type(rewards).__name__}; expected a list of {count} numbers")
    if len(rewards) != count:
        raise UserError(f"[rewards] {name!r} returned {len(rewards)} rewards for {count} completions")
    paid = []
    for position, reward in enumerate(rewards):
        try:
            paid.append(float(reward) if isinstance(reward, numbers.Real) else math.nan)
        except OverflowError:  # 10**400
            paid.append(math.inf)
        if not abs(paid[-1]) <= MAX_REWARD:  # which NaN is not, either
            raise UserError(
                f"[rewards] {name!r} returned {_shown(reward)} ({type(reward).__name__}) for completion {position}; "
                f"expected a finite number, {MAX_REWARD:.0e} at most in size"
            )
    return paid


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write out an integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _where(error: BaseException, path: Path) -> str:
    """Say what was raised and, if known, in which line of the user's file."""
    if isinstance(error, SyntaxError):
        return f"{path}{f', line {error.lineno}' if error.lineno else ''}: SyntaxError: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    return f"{where}: {type(error).__name__}: {error}"
