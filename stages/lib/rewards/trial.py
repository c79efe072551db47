"""The user's own rewards, tried on rows of the grpo set before anything is trained by them."""

import json
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from stages.lib.answers import formats
from stages.lib.answers.grade import shown_answer
from stages.lib.bounded import process_pool
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe
from stages.lib.rewards.checked import ROW, refuse_missing
from stages.lib.rewards.own import is_own, load_own

MAX_ROWS = 32
TRAINER = {"trainer_state", "log_extra", "log_metric"}  # what the trainer gives besides columns


def try_rewards(recipe: Recipe, problems: Path) -> None:
    """Call each of the user's own rewards on rows of `problems`, in a process of its own: what they keep is lost.

    Raises `UserError` for what a reward does wrong there, and for a column that it asks for and no row has.
    """
    if not any(is_own(name) for name in recipe.rewards.functions):
        return
    with process_pool(1) as pool:
        try:
            pool.submit(call_rewards, recipe, problems).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{recipe.path}: the rewards of your own ended the process that tried them on rows of {problems}; the "
                f"reason may be above. Expected a list of numbers. Training would end so as well"
            ) from error


def call_rewards(recipe: Recipe, problems: Path) -> None:
    """Load the user's own rewards and call each once; a row has a completion with its answer, and an empty one."""
    loaded = load_own([name for name in recipe.rewards.functions if is_own(name)], recipe.path.parent)
    rows, columns = telling_rows(problems)
    batch = batch_of(recipe, [row for row in rows for _ in range(2)])
    for name, reward in loaded.items():
        own: Any = reward
        wants_trainer = own.asks_for is None or not TRAINER.isdisjoint(own.asks_for)
        given = batch | (of_trainer(recipe) if wants_trainer else {})
        refuse_missing(name, own.mandatory, [*given, *(key for key in columns if key not in given)])
        try:
            reward(**given)
        except UserError as error:
            raise UserError(
                f"{error.message}. It was tried before the training, on {len(rows)} rows of the grpo set with two "
                f"completions each, one of them empty"
            ) from error


def telling_rows(problems: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows that show every type of value that a column has, and the names of all columns."""
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, type]] = set()
    with problems.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            types = {(name, type(value)) for name, value in json.loads(row.get(ROW) or "{}").items()}
            types.add(("kind", row.get("kind")))
            if not types <= seen and len(rows) < MAX_ROWS:
                rows.append(row)
            seen |= types
    return rows, sorted({name for name, _ in seen})


def batch_of(recipe: Recipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments of a reward for `rows`, each even one with its answer for a completion, each odd one empty.

    The token ids are stand-ins: the bytes of the text.
    """
    answer_format = formats.get(recipe.format.name)
    texts = []
    for place, row in enumerate(rows):
        answer = shown_answer(row.get("kind", "number"), row["answer"])
        try:
            texts.append("" if place % 2 else answer_format.write(formats.Answer("The working.", answer)))
        except ValueError:  # an answer that the format can't hold
            texts.append(answer)
    return {
        "prompts": [row["prompt"] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [list(text.encode()) for text in texts],
        **{key: [row.get(key) for row in rows] for key in ("answer", "kind", "id", ROW)},
    }


def of_trainer(recipe: Recipe) -> dict[str, Any]:
    """Return what the trainer gives a reward besides columns: its state, before the first step, and two loggers."""
    from transformers import TrainerState

    return {"trainer_state": TrainerState(max_steps=recipe.grpo.steps), "log_extra": ignore, "log_metric": ignore}


def ignore(*_: object) -> None:
    """Log nothing."""
