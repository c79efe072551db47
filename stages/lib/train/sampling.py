"""Sampling on several GPUs: an engine a GPU, the prompts shared out, the completions in the order of the prompts."""

import json
import os
import shutil
import sys
from collections.abc import Callable

from stages.lib.artifact.folder import RANK_FOLDER, Run
from stages.lib.artifact.manifest import write_json
from stages.lib.train import ranks
from stages.lib.train.launch import process_count, supervise, work_as_rank

SHARES = "checkpoints/shares"  # what each process sampled

Completion = tuple[list[int], bool]  # token ids, and whether they end; false: truncated


def share_of(total: int, batch_size: int, number: int, count: int) -> list[int]:
    """Return which of `total` prompts process `number` of `count` completes: whole batches, in turn.

    So a batch, and with it the padding of its prompts, does not depend on `count`, unless there are fewer batches than
    processes: then each takes an equal part.
    """
    size = min(batch_size, -(-total // count))
    return [place for place in range(total) if place // size % count == number]


def sample_on_gpus(
    run: Run, total: int, batch_size: int, sample: Callable[[list[int]], list[list[Completion]]]
) -> list[list[Completion]]:
    """Return, for each model, the completions of `total` prompts in their order.

    `sample` gives them for the prompts at the places that it is given. It is called here on a CPU or one GPU, else by
    a process a GPU. Raises `UserError` for one that a process raised, and `SystemExit` as `supervise` does.
    """
    if RANK_FOLDER in os.environ:
        own = share_of(total, batch_size, *ranks.share())
        path = run.folder / SHARES / f"{ranks.rank()}.json"
        work_as_rank(run, lambda: write_json(path, sample(own) if own else []))
    run.world_size = count = process_count()
    if count == 1:
        return sample(list(range(total)))
    (run.folder / SHARES).mkdir(parents=True, exist_ok=True)
    by_place: dict[int, tuple[Completion, ...]] = {}
    try:
        supervise([sys.executable, *sys.orig_argv[1:]], count, run.folder, apart=True)
        for number in range(count):
            places = share_of(total, batch_size, number, count)
            models = json.loads((run.folder / SHARES / f"{number}.json").read_text())
            by_place |= dict(zip(places, zip(*models, strict=True), strict=True))
    finally:
        shutil.rmtree(run.checkpoints)  # nothing goes on from there
    return [list(column) for column in zip(*(by_place[place] for place in range(total)), strict=True)]
