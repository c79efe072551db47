"""Rewards by name: the two suites, those for any format, and the user's own. `docs/rewards.md` explains each.

A reward is a function as TRL calls it: `f(completions, **columns)` gives one number a completion, or None for "not
scored", which only the user's own do. `completions` holds strings or conversations of one assistant message; `answer`
is the column of right answers as the dataset writes them, `kind` that of their kinds; `completion_ids` are the token
ids of each completion. The format reads a completion's answer and `answers/grade.py` grades it, so a reward and `infer`
never disagree. Rewards print nothing, draw nothing at random and keep no state: the caches and the process of
`math_correct` change how long an answer takes, nothing else.

Recipes name the functions and weigh them. TRL logs each under its name and trains on the weighted sum: one of weight 0
is only logged.
"""

import functools
from collections.abc import Sequence
from typing import Any

from stages.lib.answers import formats
from stages.lib.answers.formats import Format
from stages.lib.answers.sandbox import check_sandbox
from stages.lib.answers.worker import WORKER
from stages.lib.errors import UserError, nearest
from stages.lib.recipe.tables import Recipe, Rewards
from stages.lib.rewards.any_format import length_penalty, math_correct, python_tests, reasoning_gym, repetition_penalty
from stages.lib.rewards.judge import Completion, Reward
from stages.lib.rewards.own import check_own, is_own, load_own
from stages.lib.rewards.think import check_answer, check_numbers, match_format_approximately, match_format_exactly
from stages.lib.rewards.xml import correctness, integer, soft_format, strict_format, xmlcount

SUITES: dict[str, dict[str, Reward]] = {
    "xml": {f.__name__: f for f in (xmlcount, soft_format, strict_format, integer, correctness)},
    "think": {f.__name__: f for f in (match_format_exactly, match_format_approximately, check_answer, check_numbers)},
}
FOR_ANY_FORMAT: dict[str, Reward] = {
    f.__name__: f for f in (math_correct, python_tests, reasoning_gym, length_penalty, repetition_penalty)
}


def load_rewards(recipe: Recipe) -> list[Reward]:
    """Return the reward functions that `recipe` names, in order, each with the `__name__` that logs show it by.

    A name is one of the suite of the recipe's format, one for any format, or `FILE.py:FUNCTION` for the user's own, the
    file relative to the recipe. Raises UserError for one that is unknown, missing, named twice or no reward function.
    """
    names = recipe.rewards.functions
    own = load_own([name for name in names if is_own(name)], recipe.path.parent)
    rewards = [own[name] if name in own else _load_one(name, recipe) for name in names]
    _refuse_twice(names)
    return rewards


def check_reward_names(recipe: Recipe) -> None:
    """Raise UserError for the names that `load_rewards` would refuse, without running a line of the user's file."""
    for name in recipe.rewards.functions:
        if is_own(name):
            check_own(name, recipe.path.parent)
        else:
            _known(name, formats.get(recipe.format.name))
            _parameters_of(name, recipe)
    _refuse_twice(recipe.rewards.functions)


def _refuse_twice(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        logged_as = name.rpartition(":")[2]
        if logged_as in seen:
            raise UserError(f"[rewards] {name!r}: another reward is already logged as {logged_as!r}; rename one")
        seen.add(logged_as)


def _load_one(name: str, recipe: Recipe) -> Reward:
    reward = _known(name, formats.get(recipe.format.name))
    if name == "math_correct":
        WORKER.start()
    if name == "python_tests":
        check_sandbox()
    parameters = _parameters_of(name, recipe)
    return _named(name, functools.partial(reward, **parameters)) if parameters else reward


def _known(name: str, format: Format) -> Reward:
    known = SUITES[format.name] | FOR_ANY_FORMAT
    if name not in known:
        raise UserError(f"[rewards] {name!r} {_why_unknown(name, known, format)}")
    return known[name]


def _parameters_of(name: str, recipe: Recipe) -> dict[str, Any]:
    if name in ("math_correct", "python_tests", "reasoning_gym"):
        return {"format": formats.get(recipe.format.name)}
    if name == "length_penalty":
        limit = recipe.grpo.max_completion_tokens
        cache = _stated(name, recipe.rewards, "length_cache_tokens", 1)
        if cache > limit:
            raise UserError(f"[rewards] length_cache_tokens = {cache} is more than max_completion_tokens = {limit}")
        return {"max_completion_tokens": limit, "length_cache_tokens": cache}
    if name == "repetition_penalty":
        ngram = _stated(name, recipe.rewards, "repetition_ngram_tokens", 1)
        penalty = _stated(name, recipe.rewards, "repetition_max_penalty", 0)
        return {"repetition_ngram_tokens": ngram, "repetition_max_penalty": penalty}
    return {}


def _why_unknown(name: str, known: dict[str, Reward], format: Format) -> str:
    if name in SUITES:
        return f"is a suite; name its functions, with a weight each: {', '.join(SUITES[name])}"
    for suite, functions in SUITES.items():
        if name in functions:
            return f"is of suite {suite!r}, but [format] name = {format.name!r}; its own: {', '.join(known)}"
    return f"is not known{nearest(name, known)}; known: {', '.join(known)}, or your own as 'FILE.py:FUNCTION'"


def _stated(name: str, table: Rewards, key: str, least: int) -> Any:
    value = getattr(table, key)
    if value is None:
        raise UserError(f"[rewards] {key} is missing: {name} needs it")
    if not value >= least:
        raise UserError(f"[rewards] {key} = {value!r}; expected {least} or more")
    return value


def _named(name: str, function: functools.partial[list[float]]) -> Reward:
    """Return `function` as a plain one with a name: a partial has none, and loggers other than TRL's ask for it."""

    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        return function(completions, **columns)

    reward.__name__ = reward.__qualname__ = name
    reward.__doc__ = function.func.__doc__
    return reward
