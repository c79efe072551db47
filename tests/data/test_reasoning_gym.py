"""Rows of reasoning-gym as a source."""

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from stages.lib.data.files import read_batches
from stages.lib.data.place import files_of_source
from stages.lib.data.reasoning_gym import rows_by_task, task_seed
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Source
from tests.support.recipes import read_tables, write_tables

GYM: dict[str, Any] = {
    "name": "reasoning-gym", "use": ["grpo"], "question": "question", "answer": "answer", "answers": "scored",
    "scorer": "reasoning_gym", "tasks": {"chain_sum": 2.0, "leg_counting": 1.0}, "rows": 30, "seed": 1,
}  # fmt: skip


def rows_of(**changed: Any) -> list[tuple[str, str]]:
    source = Source(**{**GYM, **changed})
    batches = [batch.parsed() for batch in read_batches(source, files_of_source(source, None, None))]
    return [row for batch in batches for row in zip(batch.columns["question"], batch.columns["answer"], strict=True)]


def test_the_tasks_are_mixed_by_weight_and_a_row_holds_its_task_and_entry():
    rows = [json.loads(answer) for _, answer in rows_of()]
    assert sorted(row["task"] for row in rows) == ["chain_sum"] * 20 + ["leg_counting"] * 10
    assert [row["task"] for row in rows[:20]] != ["chain_sum"] * 20
    assert rows[0].keys() == {"task", "question", "answer", "metadata"}


def test_a_seed_makes_the_same_rows_again_and_another_seed_others():
    assert rows_of() == rows_of()
    assert not {question for question, _ in rows_of()} & {question for question, _ in rows_of(seed=2)}


def test_seeds_side_by_side_are_far_apart_in_every_task():
    seeds = sorted(task_seed(seed, task) for seed in range(100) for task in ("chain_sum", "leg_counting"))
    assert min(later - seed for seed, later in itertools.pairwise(seeds)) > 1000


@pytest.mark.parametrize(
    ("weights", "rows", "expected"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 0.1, "b": 0.2}, 2, {"a": 1, "b": 1}),
        ({"a": 1000.0, "b": 1.0}, 5, {"a": 5, "b": 0}),
    ],
)
def test_rows_are_shared_out_by_weight_to_the_last(weights, rows, expected):
    assert rows_by_task(Source(**{**GYM, "tasks": weights, "rows": rows})) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_term": 3},
            r"settings.chain_sum: 'max_term' is not known \(did you mean 'max_terms'\?\); known: min_terms",
        ),
        ({"seed": 3}, "settings.chain_sum: 'seed' is not known"),
        ({"min_terms": 0}, "reasoning-gym refuses these: min_terms must be positive"),
        ({"min_terms": "two"}, "reasoning-gym refuses these: "),
    ],
)
def test_settings_that_a_task_can_not_take_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        rows_of(settings={"chain_sum": settings})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": {"chainsum": 1.0}}, r"tasks: 'chainsum' is none of those in docs/reasoning-gym.md \(did you mean"),
        ({"tasks": {"gcd": 1.0}}, "tasks: 'gcd' is none of those"),
        ({"tasks": {"chain_sum": 0.0}}, "expected over 0"),
        ({"settings": {"products": {}}}, "settings.products: the source has no such task"),
        ({"rows": 0}, "rows = 0; expected 1 or more"),
        ({"tasks": {}}, "needs tasks, rows"),
        ({"scorer": "", "answers": "number"}, "expected answers = 'scored' and scorer = 'reasoning_gym'"),
        ({"name": "base-model"}, "tasks goes with name = 'reasoning-gym'; found 'base-model'"),
        ({"seed": 2}, "seed = 2 makes 'chain_sum' to train and for eval"),
    ],
)
def test_a_recipe_that_asks_for_rows_that_can_not_be_is_refused(changed, message, tmp_path):
    tables = read_tables()
    tables["data"]["sources"][0]["use"] = ["sft"]
    tables["data"]["sources"] += [{**GYM, **changed}, {**GYM, "use": ["eval"], "seed": 2}]
    with pytest.raises(UserError, match=message):
        read_recipe(write_tables(tmp_path / "gym.toml", tables))


def test_the_keys_of_the_gym_are_in_no_identity_where_they_are_unset(tmp_path):
    recipe = read_recipe(write_tables(tmp_path / "tiny.toml", read_tables()))
    [first, _] = recipe.tables("data")["data"]["sources"]
    assert not first.keys() & {"tasks", "settings", "rows", "seed"}
    data = replace(recipe.data, sources=[Source(**{**GYM, "seed": 0})])
    [made] = replace(recipe, data=data).tables("data")["data"]["sources"]
    assert (made["seed"], made["rows"], "settings" in made) == (0, 30, False)
