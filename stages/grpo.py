"""Improve the fine-tuned model with GRPO: sample completions, pay them by verifiable rewards, learn from the difference."""

import json
import shutil
from pathlib import Path
from typing import Any

import click

from stages.lib import artifact, formats, models, options, rewards, training
from stages.lib.errors import UserError
from stages.lib.recipe import Recipe, read_recipe

ROOM_BYTES = 500_000_000


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
    run_recipe = read_recipe(recipe)
    inputs = {"prepare-data": prepare_data, "sft": sft}
    inputs |= {"score-base": score_base} if score_base else {}
    inputs |= {"base-model": base_model} if base_model else {}
    tables = run_recipe.tables("model", "format", "rewards", "grpo")
    problems = subset(score_base) if score_base else prepare_data / "grpo.jsonl"
    sources = rewards.own_files(run_recipe.rewards.functions, run_recipe.path.parent)
    with artifact.writing(out, "grpo", tables, inputs, sources=sources, room_bytes=ROOM_BYTES) as run:
        run.metrics.update(train(run_recipe, problems, sft / "adapter", base_model, run))


def subset(score_base: Path) -> Path:
    """Return the file of the problems that score-base chose.

    Raises `UserError` when it chose none, as its bounds are 0 and 1, or found a reason not to train.
    """
    metrics = artifact.read(score_base, "score-base")["metrics"]
    if metrics["advice"]:
        found = "\n".join(f"- {line}" for line in metrics["advice"])
        raise UserError(f"{score_base}: score-base advises against GRPO, so it is not run:\n{found}")
    if "subset" not in metrics:
        raise UserError(
            f"{score_base}: holds no subset. Set [score_base] min_pass_rate above 0 or max_pass_rate below 1 in the "
            f"recipe and run: make score-base; or run GRPO on all problems, without --score-base"
        )
    return score_base / "grpo.jsonl"


def arguments(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Return the fields of TRL's GRPOConfig: every one that changes the result, none left to a default."""
    knobs = recipe.grpo
    completions_per_step = knobs.prompts_per_step * knobs.completions_per_prompt
    return {
        "output_dir": str(output),
        "max_steps": knobs.steps,
        "per_device_train_batch_size": knobs.micro_batch_size,
        "gradient_accumulation_steps": completions_per_step // knobs.micro_batch_size,
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
        "generation_kwargs": None,
        "chat_template_kwargs": None,
        "use_vllm": False,
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
        "router_aux_loss_coef": None,
        "disable_dropout": True,
        "cast_lm_head_to_fp32": False,
        "remove_unused_columns": False,  # the rewards read the answer column
        "learning_rate": knobs.learning_rate,
        "lr_scheduler_type": knobs.lr_scheduler,
        "warmup_steps": knobs.warmup_steps,
        "optim": knobs.optimizer,
        "weight_decay": knobs.weight_decay,
        "adam_beta1": knobs.adam_beta1,
        "adam_beta2": knobs.adam_beta2,
        "adam_epsilon": 1e-8,
        "max_grad_norm": knobs.max_grad_norm,
        "lr_scheduler_kwargs": None,
        "optim_args": None,
        "label_smoothing_factor": 0.0,
        "neftune_noise_alpha": None,
        "average_tokens_across_devices": True,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": recipe.model.dtype == "float16",
        "tf32": None,
        "gradient_checkpointing": knobs.gradient_checkpointing,
        "torch_compile": False,
        "use_liger_kernel": False,
        "auto_find_batch_size": False,
        "seed": knobs.seed,
        "data_seed": knobs.seed,
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "save_strategy": "steps",
        "save_steps": knobs.save_steps,
        "save_total_limit": 2,
        "ignore_data_skip": False,
        "logging_strategy": "steps",
        "logging_steps": knobs.log_steps,
        "logging_nan_inf_filter": False,
        "log_completions": False,  # keep_completions below writes them
        "eval_strategy": "no",
        "report_to": ["tensorboard"],
        "push_to_hub": False,
        "trust_remote_code": False,
    }


def train(recipe: Recipe, problems: Path, adapter: Path, base_model: Path | None, run: artifact.Run) -> dict[str, Any]:
    """Go on training the SFT `adapter` on `problems`, save it under `run.folder`, return what it came to.

    Metrics, each the mean over the first and over the last tenth of the steps, in log entries: `reward`, `reward_std`
    within a group, `completion_tokens`, `cut_off` (share that did not end), and every reward function by its name.
    """
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    training.keep_logs(run.checkpoints)
    tokenizer = models.load_tokenizer(recipe, base_model)
    model = models.load_model(recipe, base_model, adapter, trainable=True)
    rows = load_dataset("json", data_files=str(problems), split="train", cache_dir=str(run.folder / "cache"))
    functions = rewards.load(
        recipe.rewards.functions,
        formats.get(recipe.format.name),
        recipe.path.parent,
        max_completion_tokens=recipe.grpo.max_completion_tokens,
        length_cache_tokens=recipe.rewards.length_cache_tokens,
        repetition_ngram_tokens=recipe.rewards.repetition_ngram_tokens,
        repetition_max_penalty=recipe.rewards.repetition_max_penalty,
    )
    trainer = GRPOTrainer(
        model=model,
        args=GRPOConfig(**arguments(recipe, run.checkpoints)),
        reward_funcs=functions,
        train_dataset=rows.select_columns(["prompt", "answer"]),
        processing_class=tokenizer,
    )
    kept = keep_completions(trainer, run.checkpoints / "completions.jsonl", recipe.grpo.show_completions_steps)
    bar = ("loss", "reward", "completions/mean_length")
    training.train(trainer, run.checkpoints, bar, (kept,), round_steps=recipe.grpo.num_iterations)
    training.save_adapter(trainer, tokenizer, run)
    shutil.copyfile(run.checkpoints / "completions.jsonl", run.folder / "completions.jsonl")
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    names = {
        "reward": "reward",
        "reward_std": "reward_std",
        "completions/mean_length": "completion_tokens",
        "completions/clipped_ratio": "cut_off",
        **{f"rewards/{function.__name__}/mean": function.__name__ for function in functions},
    }
    tenth = max(1, len(log) // 10)
    return {
        when: {name: sum(entry[key] for entry in part) / len(part) for key, name in names.items()}
        for when, part in (("first", log[:tenth]), ("last", log[-tenth:]))
    }


def keep_completions(trainer: Any, path: Path, show_steps: int) -> Any:
    """Return a callback that appends every sampled completion with its rewards to the JSON lines file `path`.

    Every `show_steps` steps it also shows the best and the worst of them on the terminal.
    """
    from transformers import TrainerCallback

    class KeepCompletions(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # KILL may have torn the last one
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line + "\n" for line in kept))  # a run that is carried on repeats what it lost

        def on_step_end(self, args, state, control, **kwargs):
            # TRL has no public way to a step's completions but a table on every log: these are its own records.
            logs = trainer._logs
            rows = [
                {"step": state.global_step, "prompt": prompt, "completion": completion, "advantage": round(advantage, 4)}
                for prompt, completion, advantage in zip(logs["prompt"], logs["completion"], logs["advantages"], strict=True)
            ]
            for name, values in logs["rewards"].items():
                for row, value in zip(rows, values, strict=True):
                    row[name] = value
            with path.open("a") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if state.global_step % show_steps == 0:
                show(rows, state.global_step)

    return KeepCompletions()


def show(rows: list[dict[str, Any]], step: int) -> None:
    """Show the completion of a step with the highest advantage and the one with the lowest, with what each was paid."""
    from tqdm import tqdm

    lines = []
    for name, row in (("best", max(rows, key=lambda row: row["advantage"])), ("worst", min(rows, key=lambda row: row["advantage"]))):
        paid = "  ".join(f"{key} {value:g}" for key, value in row.items() if key not in ("step", "prompt", "completion"))
        lines += [f"step {step}, {name}: {paid}", *("    " + line for line in row["completion"].strip().splitlines()[:12])]
    tqdm.write("\n".join(lines))


if __name__ == "__main__":
    main()
