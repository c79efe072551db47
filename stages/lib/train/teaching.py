"""Groups that teach: which prompts a GRPO step samples, and which groups of completions it trains on.

A group whose completions are all rewarded alike has no advantage, and its gradient is zero. Two keys of `[grpo]` make
such groups rarer. `sampled_prompts` is the dynamic sampling of DAPO (arXiv 2503.14476) with a fixed bound: a step
samples so many groups at once and trains on `prompts_per_step` of them, those with an advantage first.
`repeat_share` draws a share of the prompts from problems whose last group had an advantage.
"""

import json
import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.artifact.manifest import write_json
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe

if TYPE_CHECKING:
    import torch
    from trl import GRPOTrainer

FILE = "teaching.json"  # in a checkpoint: the state of `Prompts`


class Prompts:
    """The order of the prompts, by index of the problem: shuffled epochs, and a share that taught when last sampled.

    What a step samples depends on the seed, the step and the groups before it alone.
    """

    def __init__(self, problems: int, sampled: int, repeated: int, seed: int):
        self.problems, self.sampled, self.repeated, self.seed = problems, sampled, repeated, seed
        self.drawn = 0  # of the shuffled epochs
        self.taught: set[int] = set()  # problems whose last group had an advantage

    def draw(self, step: int) -> list[int]:
        """Return the problems of `step`, each once; a checkpoint keeps `drawn` and `taught` as they are before it."""
        chance = random.Random(f"{self.seed} step {step}")
        chosen = chance.sample(sorted(self.taught), min(self.repeated, len(self.taught)))
        while len(chosen) < self.sampled:
            epoch, place = divmod(self.drawn, self.problems)
            problem = shuffled(self.problems, f"{self.seed} epoch {epoch}")[place]
            self.drawn += 1
            if problem not in chosen:
                chosen.append(problem)
        return chosen

    def learn(self, chosen: list[int], has_advantage: list[bool]) -> None:
        """Take in which groups of the problems `chosen` had an advantage."""
        for problem, taught in zip(chosen, has_advantage, strict=True):
            (self.taught.add if taught else self.taught.discard)(problem)


def shuffled(count: int, seed: str) -> list[int]:
    """Return the numbers below `count` in an order that `seed` decides."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def sample_groups_that_teach(recipe: Recipe, trainer: "GRPOTrainer") -> None:
    """Let `trainer` sample and choose groups as `sampled_prompts` and `repeat_share` say; without them it stays as is.

    The groups of a step depend on no number of processes: all of them know every advantage, and a kept row goes to the
    processes in turn. Raises `UserError` where a step asks for more prompts than there are.
    """
    knobs = recipe.grpo
    if knobs.sampled_prompts is None and not knobs.repeat_share:
        return
    sampled, group = knobs.sampled_prompts or knobs.prompts_per_step, knobs.completions_per_prompt
    problems, ranks = trainer.train_dataset, trainer.accelerator.num_processes
    if len(problems) < sampled:
        raise UserError(
            f"{recipe.path}: a step of GRPO samples {sampled} prompts, and there are {len(problems)} problems. Lower "
            f"[grpo] sampled_prompts or prompts_per_step, or give [[data.sources]] with more rows"
        )
    if sampled * group % ranks:
        raise UserError(
            f"{recipe.path}: [grpo] sampled_prompts x completions_per_prompt = {sampled * group} can't be shared out "
            f"to {ranks} processes; expected a multiple of {ranks}"
        )
    prompts = Prompts(len(problems), sampled, round(sampled * (knobs.repeat_share or 0)), knobs.seed)
    generate = trainer._generate_and_score_completions
    keep_all_logs(trainer, sampled * group)

    def generate_and_choose(_: list[dict[str, Any]]) -> dict[str, Any]:
        chosen = prompts.draw(trainer.state.global_step)
        rows = [problems[problem] for problem in chosen for _ in range(group)]
        each = len(rows) // ranks
        mine = trainer.accelerator.process_index * each
        step = whole_step(trainer, generate(rows[mine : mine + each]))
        has_advantage = teaches(step).view(sampled, group).any(1).tolist()
        prompts.learn(chosen, has_advantage)
        kept = first_teaching(has_advantage, knobs.prompts_per_step)
        trainer._metrics["train"]["groups/sampled_with_advantage"].append(sum(has_advantage) / sampled)
        trainer._metrics["train"]["groups/trained_with_advantage"].append(
            sum(has_advantage[place] for place in kept) / len(kept)
        )
        return rows_of_groups(step, kept, group, trainer.accelerator.process_index, ranks)

    trainer._generate_and_score_completions = generate_and_choose
    trainer.add_callback(keep_state(prompts))


def keep_all_logs(trainer: "GRPOTrainer", rows: int) -> None:
    """Let TRL's record of a step's completions hold `rows`: it holds as many as are trained on."""

    for name in ("prompt", "completion", "advantages"):
        trainer._logs[name] = deque(maxlen=rows)
    trainer._logs["rewards"].default_factory = lambda: deque(maxlen=rows)


def teaches(step: Mapping[str, Any]) -> "torch.Tensor":
    """Return, (rows,), whether a row has an advantage and was not masked for being truncated."""
    return (step["advantages"] != 0) & step["completion_mask"].any(1)


def first_teaching(has_advantage: list[bool], count: int) -> list[int]:
    """Return the places of `count` groups: the first with an advantage, then, if too few, the first others."""
    return sorted(sorted(range(len(has_advantage)), key=lambda place: not has_advantage[place])[:count])


def is_by_row(value: Any, rows: int) -> bool:
    """Say whether `value` of a step is a tensor with an entry a row."""
    import torch

    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows


def whole_step(trainer: "GRPOTrainer", step: dict[str, Any]) -> dict[str, Any]:
    """Return `step` with the rows of all processes, in their order; with one process, as it is."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return step
    rows, pad = step["advantages"].shape[0], trainer._tokenizer.pad_token_id
    whole = dict(step)
    for name, value in step.items():
        if is_by_row(value, rows):
            if value.dim() > 1:  # processes pad to their own longest: prompts on the left, completions on the right
                fill = pad if name.endswith("_ids") else 0
                first = name.startswith("prompt")
                value = accelerator.pad_across_processes(value, dim=1, pad_index=fill, pad_first=first)
            whole[name] = accelerator.gather(value)
    return whole


def rows_of_groups(step: dict[str, Any], kept: list[int], group: int, rank: int, ranks: int) -> dict[str, Any]:
    """Return the rows of the groups `kept` that process `rank` trains on, and their tokens as the loss's divisor."""
    import torch

    rows = step["advantages"].shape[0]
    places = torch.tensor([place * group + row for place in kept for row in range(group)])
    chosen = dict(step)
    for name, value in step.items():
        if is_by_row(value, rows):
            chosen[name] = value[places[rank::ranks].to(value.device)]
    if "num_items_in_batch" in step:
        mask = step["completion_mask"]
        chosen["num_items_in_batch"] = mask[places.to(mask.device)].sum().to(step["num_items_in_batch"])
    return chosen


def keep_state(prompts: Prompts) -> Any:
    """Return a callback that keeps the state of `prompts` in every checkpoint, and reads it where a run goes on."""
    from transformers import TrainerCallback

    class KeepState(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.global_step:
                path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
                kept = json.loads(path.read_text())
                prompts.drawn, prompts.taught = kept["drawn"], set(kept["taught"])

        def on_save(self, args, state, control, **kwargs):
            if args.should_save:
                path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
                write_json(path, {"drawn": prompts.drawn, "taught": sorted(prompts.taught)})

    return KeepState()
