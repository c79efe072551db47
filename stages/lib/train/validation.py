"""Evaluation while training: greedy answers to the validation set, problems of the grpo set that are not trained on.

The engine that samples in training answers, with its weights as they are. Greedy decoding draws no random number, so
the run trains as it would without. Each evaluation is a line of `validation.jsonl` beside the checkpoints. With
`[grpo] keep = "best"` the adapter of each step that was the best so far is kept there too, in `best-STEP`, as long as a
run may go on from a checkpoint that needs it.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.answers import formats
from stages.lib.answers.evaluated import Evaluated, Validation, best, figures_of_answers
from stages.lib.answers.grade import mark
from stages.lib.artifact.manifest import sync, sync_files, write_whole
from stages.lib.ends import cut_after
from stages.lib.jsonl import rows_of
from stages.lib.recipe.tables import Recipe
from stages.lib.train import ranks
from stages.lib.train.rollouts import lines_until
from stages.lib.train.run import write_adapter
from stages.lib.train.sampling import share_of

if TYPE_CHECKING:
    from trl import GRPOTrainer

FILE = "validation.jsonl"
BEST = "best-"
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def evaluate_while_training(recipe: Recipe, trainer: "GRPOTrainer", problems: Path, ends: Sequence[int]) -> Any:
    """Return a callback that evaluates before the first step, every `evaluate_steps` steps, and after the last.

    `problems` is the validation set, `ends` are the token ids that end a completion. Several ranks share the problems
    out; rank 0 has the figures, of all of them.
    """
    from transformers import TrainerCallback

    knobs = recipe.grpo
    folder = Path(trainer.args.output_dir)
    rows = list(rows_of(problems, recipe.data.validation_rows))

    class Evaluate(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if ranks.is_first():
                folder.mkdir(parents=True, exist_ok=True)
                kept = lines_until(folder / FILE, state.global_step) if state.global_step else b""
                write_whole(folder / FILE, kept)  # the run evaluates the rest again
            if state.global_step == 0:
                self.evaluate(0)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % knobs.evaluate_steps == 0 or state.global_step == args.max_steps:
                self.evaluate(state.global_step)

        def evaluate(self, step: int) -> None:
            found = figures_of_answers(step, answer(recipe, trainer, rows, ends))
            if not ranks.is_first():
                return
            with (folder / FILE).open("a") as file:
                file.write(json.dumps(found) + "\n")
            if step:  # TRL logs these with the step's own; the model before the first step is on the page alone
                trainer._metrics["train"]["validation/accuracy"].append(found["accuracy"])
                trainer._metrics["train"]["validation/truncated"].append(found["cut_off"])
                if knobs.keep == "best" and best(read(folder))["step"] == step:
                    keep_adapter(trainer, folder, step)

        def on_save(self, args, state, control, **kwargs):
            if ranks.is_first() and knobs.keep == "best":
                drop_adapters(folder)

    return Evaluate()


def answer(
    recipe: Recipe, trainer: "GRPOTrainer", rows: list[dict[str, Any]], ends: Sequence[int]
) -> list[tuple[bool, int, bool]]:
    """Return for each of `rows` whether the model's greedy answer is right, its tokens, and whether it ended.

    Every rank calls this, answers its share in whole batches, and gets the answers of all, in no certain order.
    """
    from accelerate.utils import gather_object

    knobs, tokenizer = recipe.grpo, trainer.processing_class
    answer_format = formats.get(recipe.format.name)
    size = max(1, knobs.prompts_per_step * knobs.completions_per_prompt // ranks.world_size())
    own = [rows[place] for place in share_of(len(rows), size, ranks.rank(), ranks.world_size())]
    found = []
    with greedy(trainer):
        for first in range(0, len(own), size):
            part = own[first : first + size]
            prompts = tokenizer.apply_chat_template(
                [row["prompt"] for row in part], add_generation_prompt=True, return_dict=False
            )
            completions, _ = trainer._generate_single_turn(prompts, None, {}, 1)
            for row, sampled in zip(part, completions, strict=True):
                ids = cut_after(list(sampled), list(ends))
                has_end = ids[-1] in ends
                text = tokenizer.decode(ids[:-1] if has_end else ids, skip_special_tokens=True)
                marked = mark(answer_format, text, row["answer"], row.get("kind", "number"))
                found.append((bool(marked["right"]), len(ids), has_end))
    return gather_object(found) if ranks.world_size() > 1 else found


@contextlib.contextmanager
def greedy(trainer: "GRPOTrainer") -> Iterator[None]:
    """Let `trainer` generate greedily in the body: TRL has no other way to its engine, and no public one to this."""
    if trainer.use_vllm:
        engine: Any = trainer.vllm_generation
        before = {name: getattr(engine, name) for name in GREEDY}
        try:
            vars(engine).update(GREEDY)
            yield
        finally:
            vars(engine).update(before)
            trainer._last_loaded_step = -1  # in standby the engine has no weights now: the next step loads them
        return
    from transformers import GenerationConfig

    config, kwargs = trainer.generation_config, trainer.generation_kwargs
    try:
        plain = {name: value for name, value in kwargs.items() if name not in GREEDY} | {"do_sample": False}
        trainer.generation_kwargs = plain
        trainer.generation_config = GenerationConfig(**plain, disable_compile=True)
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = config, kwargs


def read(folder: Path, until: int | None = None) -> list[Evaluated]:
    """Return the evaluations in a folder of checkpoints, up to the step `until`."""
    lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    return [line for line in lines if until is None or line["step"] <= until]


def keep_adapter(trainer: "GRPOTrainer", folder: Path, step: int) -> None:
    """Write the adapter as it is now to `best-STEP`; the folder is whole when it has its name."""
    place, new = folder / f"{BEST}{step}", folder / f"{BEST}new"
    for path in (new, place):
        shutil.rmtree(path, ignore_errors=True)
    write_adapter(trainer, new)
    sync_files(new)
    new.rename(place)
    sync(folder)


def drop_adapters(folder: Path) -> None:
    """Delete the kept adapters that no checkpoint needs: each needs the best one up to its step."""
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    before = [read(folder, step) for step in steps]
    needed = {best(own)["step"] for own in before if any(each["step"] for each in own)}
    for path in folder.glob(f"{BEST}*"):
        if path.name not in {f"{BEST}{step}" for step in needed}:
            shutil.rmtree(path)


def validation_figures(recipe: Recipe, folder: Path) -> Validation:
    """Return all evaluations of a run that has ended, and the one whose adapter is kept."""
    found = read(folder)
    kept = best(found) if recipe.grpo.keep == "best" else found[-1]
    return {"problems": recipe.data.validation_rows, "keep": recipe.grpo.keep, "kept": kept, "evaluations": found}
