"""The call of a user's own reward: what it gets, and what it may return."""

import asyncio
import copy
import functools
import inspect
import json
import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError
from stages.lib.rewards.judge import Completion, Reward

MAX_REWARD = 3e38  # TRL adds rewards up in float32, which holds no more
ROW = "row"  # the column of a set that holds a row's own columns, as JSON


def checked_reward(name: str, function: Callable[..., Any], files: Iterable[Path]) -> Reward:
    """Return the user's function, with what it returns checked at each call: an error in one names the function.

    It gets the arguments it asks for by name, or all of them if it takes `**kwargs`; `files` are its source. Lists are
    copies, since the other rewards and the trainer use them as well. `mandatory` of the returned function are the names
    that it can't do without, `asks_for` all of them; None: it takes whatever there is. Raises `UserError` for a
    function that can't be called with names.
    """
    paths = [str(path) for path in files]
    parameters = parameters_of(name, function)
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    asks_for = [key for key, p in parameters.items() if p.kind not in variadic]
    mandatory = [key for key in asks_for if parameters[key].default is inspect.Parameter.empty]
    bound = set(function.keywords) if isinstance(function, functools.partial) else set()

    def reward(completions: Sequence[Completion], **given: Any) -> list[float | None]:
        arguments = arguments_of(completions, given)
        if isinstance(given.get(ROW), list):  # a source without this column: the rewards were tried on the whole set
            arguments |= {key: [None] * len(completions) for key in mandatory if key not in arguments}
        refuse_missing(name, mandatory, arguments)
        wanted = arguments.keys() if takes_all else [key for key in asks_for if key in arguments]
        inputs = {key: arguments[key] for key in wanted if key not in bound}
        # Only lists: the trainer's state, which it passes as well, can't be copied.
        inputs = {key: copy.deepcopy(value) if isinstance(value, list) else value for key, value in inputs.items()}
        try:
            rewards = awaited(function(**inputs))
        except (Exception, SystemExit) as error:  # the user needs to know where, whatever it is
            raise UserError(f"[rewards] {name!r}{in_step(given)}: {where(error, paths)}") from error
        return finite_rewards(name, rewards, completions, given)

    reward.__name__ = reward.__qualname__ = name.rpartition(":")[2]
    reward.__doc__ = function.__doc__
    reward.mandatory = tuple(mandatory)  # type: ignore[attr-defined]
    reward.asks_for = None if takes_all else tuple(asks_for)  # type: ignore[attr-defined]
    return reward


def parameters_of(name: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a reward. Raises `UserError` for one that can't be called with names."""
    function_name = name.rpartition(":")[2]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions written in C
        raise UserError(f"[rewards] {name!r}: Python can't tell its parameters; wrap it in a function") from None
    is_plain = inspect.isroutine(function) or isinstance(function, functools.partial)
    called: Any = function if is_plain else type(function).__call__
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise UserError(f"[rewards] {name!r}: expected a function that returns a list, found a generator function")
    parameters = dict(signature.parameters)
    kinds = {parameter.kind for parameter in parameters.values()}
    takes_completions = "completions" in parameters or inspect.Parameter.VAR_KEYWORD in kinds
    if inspect.Parameter.POSITIONAL_ONLY in kinds or not takes_completions:
        raise UserError(
            f"[rewards] {name!r}: expected {function_name}(completions, **kwargs), which is called with names only; "
            f"found {function_name}{signature}"
        )
    return parameters


def arguments_of(completions: Sequence[Completion], given: dict[str, Any]) -> dict[str, Any]:
    """Return what rewards can ask for: what the trainer gives, and the columns of the rows under their own names.

    A column that has the name of something the trainer gives is in `row` alone, which holds each row whole.
    """
    arguments = {"completions": completions, **given}
    if not isinstance(given.get(ROW), list):
        return arguments
    rows = [json.loads(text) if isinstance(text, str) else {} for text in given[ROW]]
    names = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in names} | arguments | {ROW: rows}


def refuse_missing(name: str, mandatory: Iterable[str], found: Iterable[str]) -> None:
    """Raise `UserError` for a reward that asks for what there is not."""
    known = list(found)
    if missing := [key for key in mandatory if key not in known]:
        raise UserError(
            f"[rewards] {name!r} asks for {', '.join(missing)}; expected names of columns: {', '.join(known)}"
        )


@functools.cache
def event_loop() -> asyncio.Runner:
    """Return the one loop of all rewards, so that a connection that one keeps open outlives a call."""
    return asyncio.Runner()


def awaited(returned: Any) -> Any:
    """Return what an `async` function returns in the end; of another, what it returned."""
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> Any:
        return await returned

    return event_loop().run(wait())


def finite_rewards(
    name: str, rewards: Any, completions: Sequence[Completion], given: dict[str, Any]
) -> list[float | None]:
    """Return rewards as floats, None for what is not scored. Raises `UserError` for other values and another number.

    Arrays, tensors and scalars of NumPy and torch are taken: they have `tolist`.
    """
    count, step = len(completions), in_step(given)
    found = type(rewards).__name__
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple):
        raise UserError(f"[rewards] {name!r}{step} returned {found}; expected a list of {count} numbers")
    if len(rewards) != count:
        raise UserError(f"[rewards] {name!r}{step} returned {len(rewards)} rewards for {count} completions")
    taken: list[float | None] = []
    for position, value in enumerate(rewards):
        reward = value.tolist() if hasattr(value, "tolist") else value
        size: Any = abs(reward) if isinstance(reward, numbers.Real) else math.inf
        if reward is not None and not size <= MAX_REWARD:  # NaN is not, either; float() would raise on 10**400
            raise UserError(
                f"[rewards] {name!r}{step} returned {shown(reward)} ({type(value).__name__}) for completion {position}"
                f"{of_row(position, given)}; expected a finite number, {MAX_REWARD:.0e} at most in size, or None"
            )
        taken.append(None if reward is None else float(reward))
    return taken


def in_step(given: dict[str, Any]) -> str:
    """Return in which step of the training a reward was asked, for a message; "" outside of one."""
    step = getattr(given.get("trainer_state"), "global_step", None)
    return "" if step is None else f" in step {step + 1}"


def of_row(position: int, given: dict[str, Any]) -> str:
    """Return the id and the question of a completion's row, as far as they are given."""
    said = [f" of row {given['id'][position]}"] if given.get("id") else []
    if given.get("prompts"):
        prompt = given["prompts"][position]
        said.append(f" ({shown(prompt if isinstance(prompt, str) else prompt[-1]['content'])})")
    return "".join(said)


def shown(value: Any) -> str:
    """Return the beginning of a value, as Python writes it."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out an integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def where(error: BaseException, paths: Sequence[str]) -> str:
    """Return the error and, if known, the file and line of the user's that raised it; `paths` are the user's files."""
    if isinstance(error, SyntaxError):
        path = error.filename if error.filename in paths else paths[0]
        return f"{path}{f', line {error.lineno}' if error.lineno else ''}: SyntaxError: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in paths]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else paths[0]
    return f"{place}: {type(error).__name__}: {error}"
