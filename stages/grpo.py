"""Improve the fine-tuned model with GRPO: sample completions, score them by rewards, learn from the better ones."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from stages.lib import options
from stages.lib.answers.evaluated import best
from stages.lib.artifact.folder import Run, write_artifact
from stages.lib.artifact.manifest import read_manifest
from stages.lib.ends import end_ids
from stages.lib.errors import UserError
from stages.lib.machine.room import room_to_train
from stages.lib.model.engine import close_engine, import_engine
from stages.lib.model.load import load_trainable
from stages.lib.model.locate import local_model
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.model.unsloth import needs_scoring_pass, skip_scoring_pass
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report import terminal
from stages.lib.report.figures import GrpoFigures, Rewarded, ScoreBaseFigures, figures_of
from stages.lib.rewards.checked import ROW
from stages.lib.rewards.judge import Reward
from stages.lib.rewards.local import own_reward_files
from stages.lib.rewards.names import load_rewards
from stages.lib.rewards.trial import try_rewards
from stages.lib.train import ladder, ranks, trackers, validation
from stages.lib.train.callbacks import settle_heap
from stages.lib.train.config import shared_arguments
from stages.lib.train.launch import train_on_gpus
from stages.lib.train.microbatches import arrange_micro_batches
from stages.lib.train.rollouts import keep_completions
from stages.lib.train.run import configure, read_rows, run_trainer, save_adapter
from stages.lib.train.teaching import sample_groups_that_teach

COLUMNS = ("prompt", "answer", "kind", "id", ROW)  # of a row: what is asked, and what the rewards need


class Rows(NamedTuple):
    """The files of problems: those that are trained on, and those of the evaluations while training."""

    train: Path
    validation: Path


@click.command(help=__doc__)
@options.recipe
@options.reads("prepare-data")
@options.reads("sft")
@options.reads("score-base", required=False)
@options.base_model
@options.out
def main(
    recipe: Path, prepare_data: Path, sft: Path, score_base: Path | None, base_model: Path | None, out: Path
) -> None:
    run_recipe = read_recipe(recipe, base_model)
    problems = subset(score_base) if score_base else prepare_data / "grpo.jsonl"
    read = [] if score_base else [problems.name]
    read += [validation.FILE] if run_recipe.grpo.evaluate_steps else []
    inputs: dict[str, tuple[Path, list[str]]] = {"sft": (sft, ["adapter/*"])}
    inputs |= {"prepare-data": (prepare_data, read)} if read else {}
    inputs |= {"score-base": (score_base, [problems.name])} if score_base else {}
    inputs |= {"base-model": (base_model, ["model/*"])} if base_model else {}
    # Without [health], which changes no result: a run that it stopped goes on under other bounds.
    tables = run_recipe.tables("model", "vllm", "format", "lora", "rewards", "grpo")
    tables |= {"data": {"max_prompt_tokens": run_recipe.data.max_prompt_tokens}}
    sources = own_reward_files(run_recipe.rewards.functions, run_recipe.path.parent) | local_model(run_recipe)
    room = room_to_train(run_recipe, "grpo", problems)
    with write_artifact(out, "grpo", tables, inputs, sources=sources, room_bytes=room) as run:
        data = Rows(problems, prepare_data / validation.FILE)
        adapter = sft / "adapter"
        figures = train_on_gpus(run_recipe, "grpo", run, lambda: train(run_recipe, data, adapter, run))
        run.metrics.update(figures)
        if "validation" in figures:
            click.echo(terminal.validation(figures["validation"]))


def subset(score_base: Path) -> Path:
    """Return the file of the problems that score-base chose.

    Raises `UserError` when score-base advises against GRPO, or chose none because its bounds are 0 and 1.
    """
    figures = figures_of(read_manifest(score_base, "score-base"), ScoreBaseFigures)
    if figures["advice"]:
        found = "\n".join(f"- {line}" for line in figures["advice"])
        raise UserError(f"{score_base}: score-base advises against GRPO, so it is not run:\n{found}")
    if "subset" not in figures:
        raise UserError(
            f"{score_base}: holds no subset. Set [score_base] min_pass_rate above 0 or max_pass_rate below 1 in the "
            f"recipe and run: make score-base; or run GRPO on all problems, without --score-base"
        )
    return score_base / "grpo.jsonl"


def arguments(recipe: Recipe, output: Path, ends: Sequence[int] = ()) -> dict[str, Any]:
    """Return the fields of TRL's GRPOConfig: every one that changes the result, none left to a default.

    `ends` are the token ids at which vLLM ends a completion.
    """
    knobs = recipe.grpo
    completions_per_step = knobs.prompts_per_step * knobs.completions_per_prompt
    vllm = recipe.model.engine == "unsloth"
    return shared_arguments(recipe, knobs, completions_per_step, output) | {
        "generation_batch_size": completions_per_step,
        "num_generations": knobs.completions_per_prompt,
        "num_iterations": knobs.num_iterations,
        "max_completion_length": knobs.max_completion_tokens,
        "shuffle_dataset": True,
        "temperature": knobs.temperature,
        "top_p": knobs.top_p,
        "top_k": knobs.top_k,
        "min_p": knobs.min_p,
        "repetition_penalty": knobs.repetition_penalty,
        # The trainer makes text of the token ids once; vLLM would do it token by token, twice. Log-probabilities that
        # are one object a token would keep Python's garbage collector busy.
        "generation_kwargs": (
            {"stop_token_ids": list(ends), "detokenize": False, "flat_logprobs": True} if vllm else None
        ),
        "chat_template_kwargs": None,
        "use_vllm": vllm,
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": bool(vllm and recipe.vllm.standby),
        # vLLM's probabilities differ a little from the trainer's: a token's weight is their ratio, at most 2.
        "vllm_importance_sampling_correction": vllm,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 2.0,
        "vllm_importance_sampling_clip_min": None,
        "loss_type": knobs.loss_type,
        "scale_rewards": knobs.scale_rewards,
        "multi_objective_aggregation": "sum_then_normalize",
        "reward_weights": recipe.rewards.weights,
        "beta": knobs.beta,
        "use_bias_correction_kl": True,
        "off_policy_mask_threshold": None,
        "epsilon": knobs.epsilon,
        "epsilon_high": knobs.epsilon_high,
        "delta": None,
        "importance_sampling_level": "token",
        "mask_truncated_completions": knobs.mask_truncated_completions,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "sync_ref_model": False,
        "disable_dropout": True,
        "cast_lm_head_to_fp32": False,
        "remove_unused_columns": False,  # the rewards read the answer column
        "log_completions": False,  # keep_completions writes them
        **(unsloth_arguments(recipe) if vllm else {}),
    }


def unsloth_arguments(recipe: Recipe) -> dict[str, int]:
    """Return the fields that only Unsloth's GRPOConfig has; by default it derives them from free memory.

    `unsloth_grpo_mini_batch` is a number of parts, not their size: of a micro-batch in the pass with gradients, and of
    all completions in the scoring pass before it (`needs_scoring_pass`). That pass keeps no activations, so a part of
    it holds four micro-batches. `unsloth_logit_chunk_multiplier` is the number of chunks of a completion's logits.
    """
    prompts = recipe.grpo.sampled_prompts or recipe.grpo.prompts_per_step
    completions = prompts * recipe.grpo.completions_per_prompt // ranks.world_size()
    parts = -(-completions // (4 * recipe.grpo.micro_batch_size)) if needs_scoring_pass(recipe) else 1
    return {"unsloth_grpo_mini_batch": parts, "unsloth_logit_chunk_multiplier": 1}


def train(recipe: Recipe, problems: Rows, adapter: Path, run: Run) -> GrpoFigures:
    """Train the SFT `adapter` further on `problems`, save it under `run.folder`, return the figures."""
    trackers.prepare(recipe, run.folder.parent)
    import_engine(recipe)
    recipe = ladder.lowered(recipe, "grpo", run.checkpoints)
    if ranks.is_first():  # before the model: only a call shows every fault of a user's file
        try_rewards(recipe, problems.train)
    functions = load_rewards(recipe)
    tokenizer = load_tokenizer(recipe)
    with ladder.stepping_down(recipe, "grpo", run.checkpoints):
        model = load_trainable(recipe, adapter)
    try:
        first, last = learn(recipe, problems, functions, model, tokenizer, run)
        figures: GrpoFigures = {"first": first, "last": last, "memory_ladder": ladder.read_steps(run.checkpoints)}
        if recipe.grpo.evaluate_steps and ranks.is_first():
            figures["validation"] = validation.validation_figures(recipe, run.checkpoints)
        return figures
    finally:  # also when a check or a signal ends the run
        close_engine(getattr(getattr(model, "vllm_engine", None), "llm_engine", None))


def learn(
    recipe: Recipe, problems: Rows, functions: list[Reward], model: Any, tokenizer: Any, run: Run
) -> list[Rewarded]:
    """Train `model` and save its adapter and completions under `run.folder`. `import_engine` comes first.

    Returns the means over the first and over the last tenth of the steps.
    """
    from trl import GRPOConfig, GRPOTrainer

    knobs = recipe.grpo
    ends = end_ids(model.generation_config, tokenizer)
    rows = read_rows(problems.train, run)
    with ladder.stepping_down(recipe, "grpo", run.checkpoints):
        trainer = GRPOTrainer(
            model=model,
            args=configure(GRPOConfig, arguments(recipe, run.checkpoints, ends)),
            reward_funcs=functions,
            train_dataset=rows.select_columns([name for name in rows.column_names if name in COLUMNS]),
            processing_class=tokenizer,
        )
    skip_scoring_pass(recipe, trainer)
    sample_groups_that_teach(recipe, trainer)
    if recipe.model.engine == "unsloth":  # on a CPU, the published figures are of TRL's own micro-batches
        arrange_micro_batches(trainer)
    completions = run.checkpoints / "completions.jsonl"
    if ranks.is_first():  # it has those of all ranks
        trainer.add_callback(keep_completions(trainer, completions, knobs.show_completions_steps))
    trainer.add_callback(settle_heap())
    for callback in trackers.follow(recipe, "grpo", run.folder.parent, trainer, knobs.show_completions_steps):
        trainer.add_callback(callback)
    if knobs.evaluate_steps:
        trainer.add_callback(validation.evaluate_while_training(recipe, trainer, problems.validation, ends))
    bar = {"loss": "loss", "reward": "reward", "tokens": "completions/mean_length", "valid": "validation/accuracy"}
    with ladder.stepping_down(recipe, "grpo", run.checkpoints, trainer):
        run_trainer(trainer, bar, recipe.health, round_steps=knobs.num_iterations)
    keep_results(recipe, trainer, tokenizer, run)
    log = [entry for entry in trainer.state.log_history if entry.get("reward") is not None]
    tenth = max(1, len(log) // 10)
    names = [function.__name__ for function in functions]
    return [means(part, names) for part in (log[:tenth], log[-tenth:])]


def keep_results(recipe: Recipe, trainer: Any, tokenizer: Any, run: Run) -> None:
    """Save the adapter, the last or the best one, with completions and evaluations, under `run.folder`."""
    if not ranks.is_first():
        return
    kept = None
    if recipe.grpo.keep == "best":
        step = best(validation.read(run.checkpoints))["step"]
        kept = run.checkpoints / f"{validation.BEST}{step}"
    save_adapter(trainer, tokenizer, run, kept)
    for name in ("completions.jsonl", *([validation.FILE] if recipe.grpo.evaluate_steps else [])):
        shutil.copyfile(run.checkpoints / name, run.folder / name)


def means(log: Sequence[dict[str, float]], names: Sequence[str]) -> Rewarded:
    """Return the means of TRL's log entries, also of the reward functions `names`."""

    def mean(key: str) -> float:
        return sum(entry[key] for entry in log) / len(log)

    scored: dict[str, float] = {}  # a step of which a function scored nothing has no mean of it
    for name in names:
        values = [value for entry in log if (value := entry.get(f"rewards/{name}/mean")) is not None]
        scored |= {name: sum(values) / len(values)} if values else {}
    figures: Rewarded = {
        "reward": mean("reward"),
        "reward_std": mean("reward_std"),
        "rewards": scored,
        "completion_tokens": mean("completions/mean_length"),
        "cut_off": mean("completions/clipped_ratio"),
    }
    if all("sampling/importance_sampling_ratio/mean" in entry for entry in log):  # where vLLM generates
        figures["sampling_difference"] = mean("sampling/sampling_logp_difference/mean")
        figures["importance_ratio"] = mean("sampling/importance_sampling_ratio/mean")
    return figures


if __name__ == "__main__":
    main()
