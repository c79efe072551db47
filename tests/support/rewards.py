"""Rewards by name, for a recipe that says no more than a test does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.lib.answers.formats import Format
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe, Rewards
from stages.lib.rewards import names
from stages.lib.rewards.judge import Reward

TINY = read_recipe(Path(__file__).parents[2] / "recipes" / "tiny.toml")


def recipe_of(functions: list[str], format: Format, folder: Path, **parameters: Any) -> Recipe:
    """Return the tiny recipe, lying in `folder`, with these rewards; `parameters` are keys of [rewards] and [grpo]."""
    paid = {key: value for key, value in parameters.items() if key != "max_completion_tokens"}
    own = {key: value for key, value in parameters.items() if key == "max_completion_tokens"}
    return replace(
        TINY, path=folder / "recipe.toml", format=replace(TINY.format, name=format.name),
        rewards=Rewards(functions, [1.0] * len(functions), **paid), grpo=replace(TINY.grpo, **own),
    )  # fmt: skip


def load_rewards(functions: list[str], format: Format, folder: Path, **parameters: Any) -> list[Reward]:
    """Return the rewards of `recipe_of` the same."""
    return names.load_rewards(recipe_of(functions, format, folder, **parameters))


def check_reward_names(functions: list[str], format: Format, folder: Path) -> None:
    """Check the rewards of `recipe_of` the same."""
    names.check_reward_names(recipe_of(functions, format, folder))
