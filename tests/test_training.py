"""SFT and GRPO: every argument explicit, and a killed run, carried on, ends with the bytes of an undisturbed one."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result

from stages import grpo, sft
from stages.lib.artifact.code import code_digest
from stages.lib.artifact.digests import sha256_of
from stages.lib.artifact.folder import Run
from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError
from stages.lib.model.engine import import_engine
from stages.lib.model.lora import lora_settings
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import BitsandbytesOptimizer, Sft, TorchOptimizer
from stages.lib.report.figures import GrpoFigures, SftFigures, figures_of
from stages.lib.train.callbacks import make_callbacks
from stages.lib.train.checkpoints import last_checkpoint, mark_complete
from stages.lib.train.run import configure, read_rows
from tests.support import micro

ROOT = Path(__file__).parents[1]
STAGES = ["sft", "grpo"]


@pytest.fixture(autouse=True)
def signals():
    """Let signals have their default handlers, as in a terminal, and put back what was there before."""
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    defaults[signal.SIGINT] = signal.default_int_handler
    kept = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# --- arguments --------------------------------------------------------------------------------------------------------

# Fields that are left to their defaults, because they do not change what is learnt.
UNCHANGING = {
    "max_steps decides": ["num_train_epochs"],
    "another spelling of gradient checkpointing, the same gradients": ["gradient_checkpointing_kwargs"],
    "no evaluation while training": [
        "bf16_full_eval", "fp16_full_eval", "eval_steps", "eval_delay", "per_device_eval_batch_size",
        "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
        "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "label_names", "do_train", "do_eval", "do_predict",
    ],
    "what is shown and logged": [
        "logging_first_step", "log_on_each_node", "include_num_input_tokens_seen", "log_level", "log_level_replica",
        "disable_tqdm", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        "debug", "skip_memory_metrics",
    ],
    "what a checkpoint holds, and where": [
        "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
    ],
    "nothing goes to a hub": [
        "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    ],
    "speed and memory of the same sums": [
        "torch_compile_backend", "torch_compile_mode", "liger_kernel_config", "use_cache", "torch_empty_cache_steps",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "dataloader_in_order", "full_determinism",
    ],
    "how processes are spread, which the machine decides": [
        "use_cpu", "accelerator_config", "parallelism_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed",
        "local_rank",
    ],
    "only GaLore and its kind": ["optim_target_modules"],
    "only batches by length": ["length_column_name"],
    "the model is given, not its name": ["model_init_kwargs"],
    "padding has no loss and gets no attention": ["pad_to_multiple_of"],
}  # fmt: skip
UNCHANGING_SFT = {
    "the tokenizer is given with its template and tokens": ["chat_template_path", "eos_token", "pad_token"],
    "rows are conversations": ["dataset_text_field", "dataset_kwargs", "dataset_num_proc"],
    "no example that would be cut is kept": ["truncation_mode"],
    "no evaluation": ["eval_packing"],
    "removed are only columns that no argument of the model is called": ["remove_unused_columns"],
}
UNCHANGING_GRPO = {
    "the repeat sampler of GRPO goes before it": ["train_sampling_strategy"],
    "follows from generation_batch_size": ["steps_per_generation"],
    "no evaluation": ["num_generations_eval"],
    "memory under DeepSpeed": ["ds3_gather_for_generation"],
    "speed of generation": [
        "cache_implementation", "use_transformers_continuous_batching", "transformers_continuous_batching_config",
        "use_transformers_paged",
    ],
    "vLLM's engine is Unsloth's": [
        "vllm_model_impl", "vllm_structured_outputs_regex",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
        "vllm_importance_sampling_cap",
    ],
    "losses that no recipe can name": [
        "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
        "vespo_lambda_neg",
    ],
    "sync_ref_model is false": ["ref_model_mixup_alpha", "ref_model_sync_steps"],
    "use_adaptive_entropy is false": ["entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"],
    "no tools": ["max_tool_calling_iterations"],
    "log_completions is false": [
        "log_multimodal", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo",
    ],
}  # fmt: skip


def arguments_of(stage, recipe: Path, output: Path) -> dict[str, object]:
    """Return the trainer's arguments for a recipe's file, with all the memory that it asks for."""
    return stage.arguments(read_recipe(recipe), output)


@pytest.mark.parametrize(("stage", "own"), [(sft, UNCHANGING_SFT), (grpo, UNCHANGING_GRPO)], ids=STAGES)
def test_every_field_of_the_trainers_config_is_stated_or_does_not_change_the_result(stage, own):
    import trl

    config = {sft: trl.SFTConfig, grpo: trl.GRPOConfig}[stage]
    stated = set(arguments_of(stage, ROOT / "recipes" / "tiny.toml", Path("out")))
    left = [field for fields in (UNCHANGING | own).values() for field in fields]
    assert len(left) == len(set(left))
    assert stated | set(left) == {field.name for field in dataclasses.fields(config)}
    assert not stated & set(left)


def every_knob(stage: str) -> list[tuple[str, object]]:
    """Return each key of the stage's table with another value, that the recipe's checks let through."""
    words = {
        "lr_scheduler": "linear", "optimizer": "sgd", "loss_type": "grpo", "scale_rewards": "none",
        "steps": 10, "save_steps": 6, "log_steps": 2, "batch_size": 8, "micro_batch_size": 1, "prompts_per_step": 4,
        "completions_per_prompt": 8, "keep": "best",
    }  # fmt: skip
    made = []
    for key, value in dataclasses.asdict(getattr(read_recipe(ROOT / "recipes" / "tiny.toml"), stage)).items():
        if value is None:
            continue
        other = words.get(key, not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else None)
        made.append((key, value / 2 + 0.01 if other is None else other))
    return made


@pytest.mark.parametrize("stage", [sft, grpo], ids=STAGES)
def test_every_knob_of_the_recipe_reaches_the_trainer(stage, tmp_path):
    name = stage.__name__.rpartition(".")[2]
    plain = arguments_of(stage, micro.write_recipe(tmp_path), tmp_path)
    knobs = every_knob(name)
    assert len(knobs) > 15
    for key, value in knobs:
        # For the terminal, the memory ladder and the evaluations while training, which are no arguments.
        if key in ("show_completions_steps", "min_completion_tokens", "evaluate_steps", "keep"):
            continue
        changed = arguments_of(stage, micro.write_recipe(tmp_path, **{name: {key: value}}), tmp_path)
        assert changed != plain, key


@pytest.mark.torch
def test_every_optimizer_that_a_recipe_may_name_is_one_of_transformers(tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    names = typing.get_args(typing.get_type_hints(Sft)["optimizer"])
    assert names == typing.get_args(TorchOptimizer) + typing.get_args(BitsandbytesOptimizer)
    assert set(names) <= {name.value for name in OptimizerNames}
    for name in typing.get_args(TorchOptimizer):  # each can be made of packages that are locked for a CPU
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name))
        kind([torch.nn.Parameter(torch.zeros(2))], **settings)


def test_an_optimizer_without_its_package_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = read_recipe(micro.write_recipe(tmp_path, grpo={"optimizer": "paged_adamw_8bit"}))
    with pytest.raises(UserError, match=r"\[grpo\] optimizer = 'paged_adamw_8bit' needs the package bitsandbytes"):
        import_engine(recipe)


@pytest.mark.parametrize(("batch", "micro_batch", "steps"), [(8, 8, 1), (8, 2, 4), (8, 1, 8)])
def test_the_batch_is_what_the_recipe_says_however_it_is_cut(tmp_path, batch, micro_batch, steps):
    changes = {"sft": {"batch_size": batch, "micro_batch_size": micro_batch}, "grpo": {"micro_batch_size": micro_batch}}
    recipe = micro.write_recipe(tmp_path, **changes)
    arguments = arguments_of(sft, recipe, tmp_path)
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (micro_batch, steps)
    arguments = arguments_of(grpo, recipe, tmp_path)  # 2 prompts x 4 completions
    assert (arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]) == (micro_batch, steps)
    assert (arguments["generation_batch_size"], arguments["num_generations"]) == (8, 4)


@pytest.mark.torch
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_bounds_of_the_health_checks_are_no_part_of_what_was_trained(finished, stage):
    assert "health" not in read_manifest(finished / stage, stage)["recipe"]


def test_all_linear_is_pefts_word_and_a_list_stays_one(tmp_path):
    assert lora_settings(read_recipe(micro.write_recipe(tmp_path)))["target_modules"] == "all-linear"
    changes = {"lora": {"target_modules": ["q_proj", "v_proj"]}}
    settings = lora_settings(read_recipe(micro.write_recipe(tmp_path, **changes)))
    assert settings["target_modules"] == ["q_proj", "v_proj"]


# --- killed and carried on --------------------------------------------------------------------------------------------

# The stage as `python -m` runs it, but each forward and backward pass takes 0.1 s more: time to be killed.
SLOWLY = """\
import runpy, sys, time
from transformers import Trainer
real = Trainer.training_step
def slow(*arguments, **options):
    time.sleep(0.1)
    return real(*arguments, **options)
Trainer.training_step = slow
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def disturbed(stage: str, finished: Path, out: Path, number: signal.Signals) -> subprocess.CompletedProcess:
    """Run `stage` in a process of its own, sent the signal `number` when it has saved the checkpoint of step 2."""
    command = [sys.executable, "-c", SLOWLY, f"stages.{stage}", *micro.arguments(stage, finished, out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    marker = out.with_name(f"{out.name}.unfinished") / "checkpoints" / "checkpoint-2" / "complete"
    while not marker.is_file() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def is_as_undisturbed(out: Path, finished: Path, stage: str) -> None:
    """Raise AssertionError unless `out` holds what an undisturbed run left in `finished`, byte for byte."""
    for name in ["adapter/adapter_model.safetensors"] + ["completions.jsonl"] * (stage == "grpo"):
        assert sha256_of(out / name) == sha256_of(finished / stage / name), name
    assert micro.vouched(out) == micro.vouched(finished / stage)
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    assert not (out / "checkpoints").exists()


def checkpoints(out: Path) -> dict[int, Path]:
    folder = out.with_name(f"{out.name}.unfinished") / "checkpoints"
    return {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_terminated_it_saves_and_ends_with_143_and_carried_on_it_ends_with_the_same_bytes(finished, tmp_path, stage):
    out = tmp_path / stage
    done = disturbed(stage, finished, out, signal.SIGTERM)
    assert done.returncode == 143, done.stderr
    last = max(checkpoints(out))
    assert f"stopped by SIGTERM, saved at step {last}\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert (checkpoints(out)[last] / "complete").is_file()
    assert 2 < last < 8
    assert not out.exists()
    result = micro.run(stage, finished, out)
    assert result.exit_code == 0, result.output
    assert f"{stage}: carrying on from" in result.output
    is_as_undisturbed(out, finished, stage)


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_killed_with_half_a_checkpoint_and_then_at_the_very_end_it_still_ends_with_the_same_bytes(
    finished, tmp_path, stage, monkeypatch
):
    out = tmp_path / stage
    assert disturbed(stage, finished, out, signal.SIGKILL).returncode == -signal.SIGKILL
    assert 2 in checkpoints(out)
    assert max(checkpoints(out)) < 8
    assert not out.exists()
    # What KILL can leave at its worst: a newer checkpoint of which half the files are there, and half a line.
    half = checkpoints(out)[2].with_name("checkpoint-7")
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 7')
    if stage == "grpo":
        with (half.parent / "completions.jsonl").open("ab") as file:
            file.write('{"step": 3, "completion": "é'.encode()[:-1])  # amid a character
    (half.parent / "checkpoint-best").mkdir()  # a person's

    with monkeypatch.context() as patch:  # and once more, after training and before the manifest
        patch.setattr("stages.lib.artifact.folder.describe_files", killed)
        with pytest.raises(Killed):
            micro.run_uncaught(stage, finished, out)
    assert not out.exists()
    shutil.rmtree(half.parent / "checkpoint-best", ignore_errors=True)  # unless transformers counted it among the old
    assert set(checkpoints(out)) == {6, 8}

    result = micro.run(stage, finished, out)
    assert result.exit_code == 0, result.output
    is_as_undisturbed(out, finished, stage)


# Keys that change no result, with other values than the micro recipe's.
OTHER_PACE = {"sft": {"log_steps": 3, "save_steps": 3}, "grpo": {"log_steps": 4, "save_steps": 8}}
OTHER_PACE["grpo"]["show_completions_steps"] = 7


def stopped_at(stage: str, finished: Path, out: Path, step: int, number: signal.Signals, monkeypatch) -> Result:
    """Run `stage` in this process, sent the signal `number` amid `step`, the recipe's own; return what it said."""
    from transformers import Trainer

    real, sent = Trainer.training_step, []

    def training_step(trainer, *arguments, **options):
        if trainer.state.global_step == step - 1 and not sent:  # once, in the first of its micro-batches
            sent.append(number)
            os.kill(os.getpid(), number)
        return real(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        return micro.run(stage, finished, out)


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_after_ctrl_c_a_run_goes_on_from_its_checkpoint_though_keys_that_change_no_result_changed(
    finished, tmp_path, stage, monkeypatch
):
    out = tmp_path / stage
    assert stopped_at(stage, finished, out, 3, signal.SIGINT, monkeypatch).exit_code == 130
    assert max(checkpoints(out)) == 3
    from transformers import TrainerState

    steps, real = [], TrainerState.init_training_references
    note = lambda state, *rest: (steps.append(state.global_step), real(state, *rest))[1]  # noqa: E731
    monkeypatch.setattr(TrainerState, "init_training_references", note)
    recipe = micro.write_recipe(tmp_path, **{stage: OTHER_PACE[stage]})
    shutil.copyfile(finished / "own.py", tmp_path / "own.py")
    result = micro.run(stage, finished, out, recipe)
    assert result.exit_code == 0, result.output
    assert steps == [3]
    assert f"{stage}: carrying on from" in result.output
    assert "starts anew" not in result.output
    is_as_undisturbed(out, finished, stage)


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_recorded_does_not_depend_on_how_often_it_is_logged_and_saved(finished, tmp_path, stage):
    recipe = micro.write_recipe(tmp_path, **{stage: OTHER_PACE[stage]})
    assert micro.run(stage, finished, tmp_path / stage, recipe).exit_code == 0
    is_as_undisturbed(tmp_path / stage, finished, stage)


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_killed_between_two_log_entries_the_recorded_figures_are_those_of_an_undisturbed_run(
    finished, tmp_path, stage, monkeypatch
):
    out = tmp_path / stage
    recipe = micro.write_recipe(tmp_path, **{stage: {"log_steps": 4, "save_steps": 2}})
    with monkeypatch.context() as patch:
        patch.setattr("stages.lib.train.callbacks.mark_complete", killed_after(2))
        with pytest.raises(Killed):
            micro.command_of(stage).main(micro.arguments(stage, finished, out, recipe), standalone_mode=False)
    assert set(checkpoints(out)) == {2, 4}  # and the one of step 4 is not complete
    assert micro.run(stage, finished, out, recipe).exit_code == 0
    is_as_undisturbed(out, finished, stage)


def killed_after(count: int) -> Callable[[Path, int], None]:
    """Return what marks checkpoints as complete, but at the call number `count` is killed instead."""
    steps: list[int] = []

    def mark(folder: Path, step: int) -> None:
        steps.append(step)
        if len(steps) == count:
            raise Killed
        mark_complete(folder, step)

    return mark


@pytest.mark.torch
def test_another_learning_rate_throws_checkpoints_away_and_that_is_said_before_it_starts(
    finished, tmp_path, monkeypatch
):
    out = tmp_path / "sft"
    assert stopped_at("sft", finished, out, 3, signal.SIGHUP, monkeypatch).exit_code == 129
    recipe = micro.write_recipe(tmp_path, sft={"learning_rate": 0.5, "log_steps": 2})
    result = micro.run("sft", finished, out, recipe)
    rate = read_recipe(finished / "micro.toml").sft.learning_rate
    said = f"sft: starts anew, 3 steps are lost. Changed: [sft] learning_rate = 0.5, before {rate}\n"
    assert result.output.index(said) < result.output.index("sft: finished")


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("file", ["optimizer.pt", "complete"])
def test_a_checkpoint_that_a_power_cut_tore_is_set_aside_and_the_one_before_it_is_used(
    finished, tmp_path, stage, file, monkeypatch
):
    out = tmp_path / stage
    assert stopped_at(stage, finished, out, 5, signal.SIGTERM, monkeypatch).exit_code == 143
    assert set(checkpoints(out)) == {4, 5}
    torn = checkpoints(out)[5]
    content = (torn / file).read_bytes()
    (torn / file).write_bytes(content[: len(content) // 2])
    result = micro.run(stage, finished, out)
    assert result.exit_code == 0, result.output
    assert f"{torn}: is not whole, as after a power cut; it is now {torn.parent / 'torn-5'}" in result.output
    is_as_undisturbed(out, finished, stage)


class Killed(BaseException):
    """Stands for KILL in this process: nothing catches it."""


def killed(folder: Path) -> None:
    raise Killed


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_process_drew_at_random_before_changes_nothing(finished, tmp_path, stage):
    import torch

    torch.manual_seed(12345)
    assert micro.run(stage, finished, tmp_path / stage).exit_code == 0
    is_as_undisturbed(tmp_path / stage, finished, stage)


@pytest.mark.torch
def test_with_two_passes_over_a_batch_grpo_stops_only_where_it_can_be_carried_on_from(finished, tmp_path, monkeypatch):
    recipe = micro.write_recipe(tmp_path, grpo={"num_iterations": 2})
    assert micro.run("grpo", finished, tmp_path / "undisturbed", recipe).exit_code == 0
    out = tmp_path / "grpo"
    monkeypatch.setenv("TERM_AT_CALL", "3")  # in step 5, the first of a round of two
    assert micro.run("grpo", finished, out, recipe).exit_code == 143
    assert max(checkpoints(out)) == 6
    monkeypatch.delenv("TERM_AT_CALL")
    assert micro.run("grpo", finished, out, recipe).exit_code == 0
    assert micro.vouched(out) == micro.vouched(tmp_path / "undisturbed")
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in (1, 3, 5, 7) for _ in range(8)]  # each is there once


@pytest.mark.torch
def test_groups_that_teach_are_sampled_again_alike_when_grpo_goes_on_from_a_checkpoint(finished, tmp_path, monkeypatch):
    knobs = {"sampled_prompts": 5, "repeat_share": 0.4}
    recipe = micro.write_recipe(tmp_path, grpo=knobs)
    assert micro.run("grpo", finished, tmp_path / "whole", recipe).exit_code == 0
    monkeypatch.setenv("TERM_AT_CALL", "5")
    assert micro.run("grpo", finished, tmp_path / "resumed", recipe).exit_code == 143
    monkeypatch.delenv("TERM_AT_CALL")
    assert micro.run("grpo", finished, tmp_path / "resumed", recipe).exit_code == 0
    is_as_undisturbed(tmp_path / "resumed", tmp_path, "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 5 * 4  # all that were sampled; two groups of five are trained on
    assert sha256_of(tmp_path / "resumed" / "completions.jsonl") == sha256_of(tmp_path / "whole" / "completions.jsonl")


@pytest.mark.torch
def test_with_several_gpus_in_sight_one_is_trained_on():
    config = configure(lambda **fields: SimpleNamespace(n_gpu=2, **fields), {"output_dir": "out"})
    assert (config._n_gpu, config.output_dir) == (1, "out")


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_on_a_cpu(finished, tmp_path, stage):
    recipe = micro.write_recipe(tmp_path, model={"dtype": "bfloat16"}, **{stage: {"steps": 2, "save_steps": 2}})
    result = micro.run(stage, finished, tmp_path / stage, recipe)
    assert result.exit_code == 0, result.output


@pytest.mark.torch
def test_a_folder_named_like_a_pattern_is_read(tmp_path):
    folder = tmp_path / "run [1] of *"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert list(read_rows(folder / "rows.jsonl", Run(folder))["a"]) == [1, 2]


@pytest.mark.torch
def test_a_module_that_the_model_has_not_is_said_and_not_passed_over(finished, tmp_path):
    recipe = micro.write_recipe(tmp_path, lora={"target_modules": ["q_proj", "upp_proj"]})
    result = micro.run("sft", finished, tmp_path / "sft", recipe)
    assert result.exit_code == 1
    assert "[lora] target_modules names 'upp_proj'; base-model has no such module (did you mean 'up_proj'?)" in (
        result.output
    )


@pytest.mark.torch
def test_the_engine_is_closed_also_when_a_signal_ends_the_run(finished, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(grpo, "close_engine", closed.append)
    monkeypatch.setenv("TERM_AT_CALL", "2")
    assert micro.run("grpo", finished, tmp_path / "grpo").exit_code == 143
    assert closed == [None]  # there is no vLLM here


@pytest.mark.torch
def test_grpo_continues_the_sft_adapter_and_learns(finished):
    from safetensors.numpy import load_file

    before, after = (load_file(finished / name / "adapter" / "adapter_model.safetensors") for name in STAGES)
    assert set(before) == set(after)
    moved = [float(abs(after[name] - before[name]).max()) for name in before]
    assert all(0 < distance < 0.05 for distance in moved)
    settings = [json.loads((finished / name / "adapter" / "adapter_config.json").read_text()) for name in STAGES]
    assert settings[0]["r"] == settings[1]["r"] == 16
    names = settings[0]["target_modules"]
    assert len(names) == 7
    assert names == settings[1]["target_modules"] == sorted(names)  # PEFT has them in a set


@pytest.mark.torch
def test_the_artifacts_hold_what_later_stages_read(finished):
    for stage in STAGES:
        names = {path.name for path in (finished / stage).iterdir()}
        assert names == {"adapter", "tokenizer", "logs", "outside", "manifest.json"} | ({"completions.jsonl"} & names)
        files = set(read_manifest(finished / stage, stage)["files"])
        assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "tokenizer/tokenizer.json"} <= files
        template = (finished / stage / "tokenizer" / "chat_template.jinja").read_text()
        assert template == (finished / "base-model" / "model" / "chat_template.jinja").read_text()


@pytest.mark.torch
def test_the_manifests_of_training_state_the_figures_that_are_read_of_them(finished):
    sft = figures_of(read_manifest(finished / "sft", "sft"), SftFigures)
    assert (sft["loss"] > 0, sft["trainable_parameters"] > 1000, sft["memory_ladder"]) == (True, True, [])
    grpo_figures = figures_of(read_manifest(finished / "grpo", "grpo"), GrpoFigures)
    for rewarded in (grpo_figures["first"], grpo_figures["last"]):
        assert list(rewarded["rewards"]) == ["correctness", "strict_format", "variety"]
        assert rewarded["reward"] == pytest.approx(sum(rewarded["rewards"].values()))
        assert "importance_ratio" not in rewarded


def test_a_reward_with_the_name_of_a_figure_is_not_taken_for_it():
    fixed = {"reward_std": 0.5, "completions/mean_length": 7.0, "completions/clipped_ratio": 0.25}
    log = [{**fixed, "reward": total, "rewards/reward/mean": 9.0, "rewards/cut_off/mean": 8.0} for total in (1.0, 3.0)]
    assert grpo.means(log, ["reward", "cut_off"]) == {
        "reward": 2.0, "reward_std": 0.5, "rewards": {"reward": 9.0, "cut_off": 8.0}, "completion_tokens": 7.0,
        "cut_off": 0.25,
    }  # fmt: skip
    log = [{**entry, "sampling/importance_sampling_ratio/mean": 1.0, "sampling/sampling_logp_difference/mean": 0.0}
           for entry in log]  # fmt: skip
    assert (grpo.means(log, [])["importance_ratio"], grpo.means(log, [])["sampling_difference"]) == (1.0, 0.0)


@pytest.mark.torch
def test_every_completion_is_kept_with_what_it_was_paid(finished):
    rows = [json.loads(line) for line in (finished / "grpo" / "completions.jsonl").read_text().split("\n")[:-1]]
    assert [row["step"] for row in rows] == [step for step in range(1, 9) for _ in range(8)]
    assert {"prompt", "completion", "advantage", "variety", "strict_format", "correctness"} < set(rows[0])
    assert all(row["completion"] for row in rows)
    assert len({row["prompt"] for row in rows}) > 8
    for first in range(0, len(rows), 4):  # a group has one prompt, and its advantages cancel out
        group = rows[first : first + 4]
        assert len({row["prompt"] for row in group}) == 1
        assert abs(sum(row["advantage"] for row in group)) < 1e-2
        best = max(group, key=lambda row: row["variety"])
        assert best["advantage"] == max(row["advantage"] for row in group)


def test_what_lives_after_the_first_step_is_out_of_the_collectors_rounds_until_training_ends():
    callback = grpo.settle_heap()
    callback.on_step_end(None, None, None)
    settled = gc.get_freeze_count()
    try:
        assert settled > 10_000  # torch alone is more
        later = [[number] for number in range(1000)]
        callback.on_step_end(None, None, None)
        assert gc.get_freeze_count() == settled
        assert any(found is later for found in gc.get_objects())
    finally:
        callback.on_train_end(None, None, None)
    assert gc.get_freeze_count() == 0


@pytest.mark.torch
def test_an_sft_example_that_is_too_long_is_left_out_and_counted_and_none_left_is_an_error(finished, tmp_path):
    recipe = micro.write_recipe(tmp_path, sft={"max_tokens": 10})
    result = micro.run("sft", finished, tmp_path / "sft", recipe)
    assert result.exit_code == 1
    assert "examples are longer than [sft] max_tokens = 10" in result.output


@pytest.mark.torch
def test_other_code_of_prepare_data_retrains_nothing_while_its_rows_stay_the_same(finished, tmp_path, monkeypatch):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.setattr(
        "stages.lib.artifact.identity.code_digest", lambda stage: code_digest(stage) + "!" * (stage == "prepare-data")
    )
    said = {stage: micro.run(stage, run).output for stage in ("prepare-data", "sft", "grpo", "infer")}
    assert "prepare-data: finished" in said.pop("prepare-data")
    assert [text.partition(",")[0] for text in said.values()] == [f"{stage}: up to date" for stage in said]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_before_the_last_step_counts_and_others_of_no_use_are_removed(tmp_path):
    for step, complete in ((8, True), (9, True), (10, True), (11, False), (100, False), (20, True)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_text("")
        if complete:
            mark_complete(tmp_path, step)
    (tmp_path / "logs").mkdir()
    assert last_checkpoint(tmp_path, steps=20) == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-8", "checkpoint-9", "logs"]


FILES = ("optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth")


def write_checkpoint(folder: Path, step: int) -> Path:
    """Write a checkpoint of four small files, complete; return it."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    for name in FILES:
        (checkpoint / name).write_text(f"{name} of step {step}")
    mark_complete(folder, step)
    return checkpoint


TORN = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "of NUL bytes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
@pytest.mark.parametrize("file", FILES)
def test_each_file_of_a_checkpoint_is_looked_at(tmp_path, capsys, file, tear):
    before, newest = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    tear(newest / file)
    assert last_checkpoint(tmp_path, steps=9) == str(before)
    said = f"{newest}: is not whole, as after a power cut; it is now {tmp_path / 'torn-4'}, and is not used\n"
    assert capsys.readouterr().err == said
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "torn-4"}
    tear(before / file)
    assert last_checkpoint(tmp_path, steps=9) is None


def test_the_files_of_a_checkpoint_are_on_the_disk_before_it_is_complete(tmp_path, monkeypatch):
    synced: list[str] = []
    (tmp_path / "checkpoint-2").mkdir()
    for name in ("completions.jsonl", "checkpoint-2/optimizer.pt"):
        (tmp_path / name).write_text("x")
    where = lambda file: str(Path(f"/proc/self/fd/{file}").readlink().relative_to(tmp_path))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(where(file)))
    mark_complete(tmp_path, 2)
    assert synced == [
        "checkpoint-2/optimizer.pt", "checkpoint-2", "completions.jsonl", ".", "checkpoint-2/complete.tmp",
        "checkpoint-2",
    ]  # fmt: skip


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop():
    """Return the callback that heeds signals."""
    return make_callbacks({}, 1)[1]


@pytest.mark.torch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_term_hup_and_ctrl_c_save_and_stop_after_the_step_in_hand(stop, number):
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_train_begin(None, None, None)
    stop.on_step_end(None, SimpleNamespace(global_step=1), control)
    assert not control.should_training_stop
    os.kill(os.getpid(), number)
    stop.on_step_end(None, SimpleNamespace(global_step=2), control)
    assert (stop.signal, control.should_save, control.should_training_stop) == (number, True, True)


@pytest.mark.torch
def test_a_second_ctrl_c_ends_the_process_at_once(stop):
    stop.on_train_begin(None, None, None)
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    stop.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.torch
def test_a_signal_that_is_ignored_as_under_nohup_stays_so(stop):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop.on_train_begin(None, None, None)
    os.kill(os.getpid(), signal.SIGHUP)
    assert (stop.signal, signal.getsignal(signal.SIGHUP)) == (None, signal.SIG_IGN)


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert last_checkpoint(tmp_path, steps=20) is None
    assert last_checkpoint(tmp_path / "absent", steps=20) is None
