"""What the stages pass on by name: to the trainers, on each rung of the memory ladder; to any function, by source."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

from stages import grpo, sft
from stages.lib.model.generate import Sampling
from stages.lib.model.lora import lora_settings
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.train import ladder

RECIPES = {path.stem: read_recipe(path) for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))}
STAGES = {"sft": sft, "grpo": grpo}
# Fields that Unsloth adds to TRL's GRPOConfig and that we state.
UNSLOTH_ONLY = {"unsloth_grpo_mini_batch", "unsloth_logit_chunk_multiplier"}


def rungs(stage: str, recipe: Recipe) -> list[Recipe]:
    """Return the recipe on every rung of the ladder, from the top."""
    made = [recipe]
    while below := ladder.lower(made[-1], stage):
        made.append(below)
    return made


def passed(function: Callable, callee: str) -> set[str]:
    """Return the names that `function` gives by keyword to its one call of `callee`, those out of `**` included.

    `callee` is written as in the source: "SamplingParams", "FastLanguageModel.from_pretrained". After `**` may stand a
    dict, the name of one, two of them with `if` between, `lora_settings(recipe)` or `sampling.drawn`. Raises
    `ValueError` for anything else, and for another number of calls.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))

    def keys(value: ast.expr) -> set[str]:
        match value:
            case ast.Dict(keys=names):
                return {ast.literal_eval(name) for name in names}
            case ast.IfExp(body=body, orelse=other):
                return keys(body) | keys(other)
            case ast.Name(id=name):
                for node in ast.walk(tree):
                    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                        return keys(node.value)
                return set(function.__globals__[name])
            case ast.Call(func=ast.Name(id="lora_settings")):
                return set(lora_settings(RECIPES["tiny"]))
            case ast.Attribute(attr="drawn"):
                return set(Sampling(1).drawn)
        raise ValueError(f"{function.__name__}: can't tell what ** {ast.unparse(value)} holds")

    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == callee]
    if len(calls) != 1:
        raise ValueError(f"{function.__name__}: expected one call of {callee}, found {len(calls)}")
    named = {keyword.arg for keyword in calls[0].keywords if keyword.arg}
    return named.union(*(keys(keyword.value) for keyword in calls[0].keywords if not keyword.arg))
