"""Rows of reasoning-gym: questions that its tasks make of a seed, with what their scorers need as the answer."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

from stages.lib.answers.gym import load_task
from stages.lib.data.batch import BATCH_ROWS, Batch, Wanted, batch_of, require_columns
from stages.lib.errors import UserError, nearest
from stages.lib.recipe.tables import Source


def rows_by_task(source: Source) -> dict[str, int]:
    """Return how many of the source's rows each task makes, by weight; the largest remainders are rounded up."""
    rows, total = source.rows or 0, sum(source.tasks.values())
    exact = {task: rows * weight / total for task, weight in source.tasks.items()}
    counts = {task: int(share) for task, share in exact.items()}
    for task in sorted(exact, key=lambda task: counts[task] - exact[task])[: rows - sum(counts.values())]:
        counts[task] += 1
    return counts


def task_seed(seed: int, task: str) -> int:
    """Return the seed of a task: far from that of any other seed, since a task's row N is that of its seed plus N."""
    return int.from_bytes(hashlib.sha256(f"{seed} {task}".encode()).digest()[:4], "big") >> 1


def make_dataset(source: Source, task: str, rows: int) -> Any:
    """Return the dataset of a task. Raises `UserError` for settings that it does not know or can't take."""
    dataset, settings = load_task(task)
    known = [field.name for field in dataclasses.fields(settings) if field.name not in ("seed", "size")]
    given = source.settings.get(task, {})
    where = f"[[data.sources]] {source.name!r} settings.{task}"
    for key in given:
        if key not in known:
            raise UserError(f"{where}: {key!r} is not known{nearest(key, known)}; known: {', '.join(known)}")
    try:
        return dataset(settings(**given, seed=task_seed(source.seed or 0, task), size=rows))
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{where} = {given}: reasoning-gym refuses these: {error}") from error


def read_gym(source: Source, wanted: Wanted) -> Iterator[Batch]:
    """Yield the source's rows, the tasks mixed: columns `question`, `answer` (see `answers/gym.py`) and `solution`.

    `solution` is the right answer alone, since the tasks show no working: SFT then teaches the form. Raises `UserError`
    for settings that a task can't take.
    """
    require_columns(source.name, wanted.names, ["question", "answer", "solution"])
    counts = rows_by_task(source)
    datasets = {task: make_dataset(source, task, count) for task, count in counts.items() if count}
    order = [(task, place) for task, count in counts.items() for place in range(count)]
    random.Random(source.seed).shuffle(order)
    origin = f"{source.name} (seed {source.seed})"
    for start in range(0, len(order), BATCH_ROWS):
        part = order[start : start + BATCH_ROWS]
        rows = [row_of(datasets[task], task, place) for task, place in part]
        yield batch_of(origin, "row", list(range(start + 1, start + len(part) + 1)), rows, wanted)


def row_of(dataset: Any, task: str, place: int) -> dict[str, Any]:
    """Return row `place` of a task's dataset."""
    entry = dataset[place]
    question, answer = str(entry["question"]), str(entry["answer"])
    whole = {"task": task, "question": question, "answer": answer, "metadata": entry["metadata"]}
    return {"question": question, "answer": json.dumps(whole, ensure_ascii=False), "solution": answer}
