"""Evaluation while training: it answers what the model would, changes nothing that is learnt, and keeps the best."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.lib.artifact.digests import sha256_of
from stages.lib.artifact.manifest import read_manifest
from stages.lib.ends import cut_after
from stages.lib.model.generate import Sampling, generate_completions, open_generator
from stages.lib.recipe.read import read_recipe
from stages.lib.report import terminal
from stages.lib.report.figures import GrpoFigures, figures_of
from stages.lib.train import validation
from tests.support import micro
from tests.support.once import once_a_run, run_folder

ROOT = Path(__file__).parents[2]
ROWS = 14
PACE = {"lr_scheduler": "constant", "save_steps": 2}  # so that a shorter run takes the same steps


def write_recipe(folder: Path, **grpo: Any) -> Path:
    return micro.write_recipe(folder, data={"validation_rows": ROWS}, grpo={**PACE, **grpo})


@once_a_run
def prepared() -> Path:
    """Return a folder with base-model, prepare-data with a validation set, and sft, of the micro recipe."""
    folder = run_folder() / "validation"
    folder.mkdir(exist_ok=True)
    write_recipe(folder)
    for stage in ("base-model", "prepare-data", "sft"):
        result = micro.run(stage, folder)
        assert result.exit_code == 0, result.output
    return folder


def run_grpo(out: Path, code: int = 0, **grpo: Any) -> Path:
    """Run grpo on what is `prepared` with other keys, to the folder `out`/grpo; return it."""
    out.mkdir(exist_ok=True)
    result = micro.run("grpo", prepared(), out / "grpo", write_recipe(out, **grpo))
    assert result.exit_code == code, result.output
    return out / "grpo"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> str:
    return sha256_of(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every second length of an answer for right: what so small a network says never is."""
    monkeypatch.setattr(validation, "mark", lambda form, text, *_: {"right": len(text) % 2 == 0})


@pytest.mark.torch
def test_the_figures_are_those_of_the_saved_adapters_greedy_answers(tmp_path: Path, marked: None) -> None:
    out = run_grpo(tmp_path / "on", evaluate_steps=3)
    found = lines(out)
    assert [line["step"] for line in found] == [0, 3, 6, 8]
    recipe = read_recipe(tmp_path / "on" / "micro.toml", prepared() / "base-model")
    rows = [json.loads(line) for line in (prepared() / "prepare-data" / "validation.jsonl").read_text().splitlines()]
    assert len(rows) == ROWS
    adapters = {"before": prepared() / "sft" / "adapter", "after": out / "adapter"}
    with open_generator(recipe, adapters, 12, seed=0) as generator:
        prompts = generator.tokenizer.apply_chat_template(
            [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=False
        )
        for name, line in (("before", found[0]), ("after", found[-1])):
            ids = generate_completions(generator, prompts, Sampling(12), 8, adapter=name)
            texts = [
                generator.tokenizer.decode(each[: -(each[-1] in generator.ends) or None], skip_special_tokens=True)
                for each in ids
            ]
            assert line == {
                "step": line["step"],
                "right": sum(len(text) % 2 == 0 for text in texts),
                "accuracy": sum(len(text) % 2 == 0 for text in texts) / ROWS,
                "tokens": sum(map(len, ids)) / ROWS,
                "cut_off": sum(each[-1] not in generator.ends for each in ids) / ROWS,
            }
            assert all(cut_after(each, generator.ends) == each for each in ids)
    figures = figures_of(read_manifest(out, "grpo"), GrpoFigures)
    assert figures["validation"] == {"problems": ROWS, "keep": "last", "kept": found[-1], "evaluations": found}


@pytest.mark.torch
def test_it_changes_nothing_that_is_learnt_and_off_adds_nothing(tmp_path: Path) -> None:
    on, off = run_grpo(tmp_path / "on", evaluate_steps=2), run_grpo(tmp_path / "off")
    assert adapter(on) == adapter(off)
    assert sha256_of(on / "completions.jsonl") == sha256_of(off / "completions.jsonl")
    assert not (off / "validation.jsonl").exists()
    assert "validation" not in read_manifest(off, "grpo")["metrics"]
    assert not {"evaluate_steps", "keep"} & set(read_manifest(off, "grpo")["recipe"]["grpo"])
    assert set(read_manifest(off, "grpo")["inputs"]["prepare-data"]) == {"grpo.jsonl"}
    assert set(read_manifest(on, "grpo")["inputs"]["prepare-data"]) == {"grpo.jsonl", "validation.jsonl"}


# How many answers of each evaluation are right, from the one before the first step on: steps 0, 2, 4, 6, 8.
COUNTS = {"amid": [13, 1, 5, 5, 2], "last": [0, 1, 2, 3, 4], "first": [0, 4, 1, 2, 4]}
BEST = {"amid": 4, "last": 8, "first": 2}


def count_as(monkeypatch: pytest.MonkeyPatch, counts: dict[int, int]) -> None:
    """Let the evaluation after a step find so many right answers."""
    real = validation.figures_of_answers

    def figures(step: int, found: Any) -> Any:
        return real(step, [(place < counts[step], *rest) for place, (_, *rest) in enumerate(found)])

    monkeypatch.setattr(validation, "figures_of_answers", figures)


@pytest.mark.torch
@pytest.mark.parametrize("case", COUNTS)
def test_the_best_is_the_earliest_with_most_right_answers_and_its_adapter_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    count_as(monkeypatch, dict(zip(range(0, 10, 2), COUNTS[case], strict=True)))
    out = run_grpo(tmp_path / "best", evaluate_steps=2, keep="best")
    kept = figures_of(read_manifest(out, "grpo"), GrpoFigures)["validation"]["kept"]
    assert kept["step"] == BEST[case]
    assert kept["accuracy"] == max(COUNTS[case][1:]) / ROWS
    short = run_grpo(tmp_path / "short", steps=BEST[case], log_steps=1)
    assert adapter(out) == adapter(short)


@pytest.mark.torch
@pytest.mark.parametrize(("case", "call"), [("amid", "7"), ("last", "4"), ("first", "3")])
def test_terminated_and_carried_on_the_same_adapter_and_evaluations_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, call: str
) -> None:
    count_as(monkeypatch, dict(zip(range(0, 10, 2), COUNTS[case], strict=True)))
    knobs = {"evaluate_steps": 2, "keep": "best"}
    whole = run_grpo(tmp_path / "whole", **knobs)
    monkeypatch.setenv("TERM_AT_CALL", call)
    run_grpo(tmp_path / "resumed", code=143, **knobs)
    monkeypatch.delenv("TERM_AT_CALL")
    resumed = run_grpo(tmp_path / "resumed", **knobs)
    assert adapter(resumed) == adapter(whole)
    assert lines(resumed) == lines(whole)
    assert micro.vouched(resumed) == micro.vouched(whole)


class Killed(BaseException):
    """Stands for KILL in this process: nothing catches it."""


@pytest.mark.torch
@pytest.mark.parametrize("step", [4, 8])
def test_killed_right_after_an_evaluation_a_newer_best_is_forgotten_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The checkpoints are at 3 and 6: the adapter that a checkpoint needs is there, and a later one does not count."""
    counts = {0: 0, 2: 2, 4: 5, 6: 7, 8: 9}
    count_as(monkeypatch, counts)
    knobs = {"evaluate_steps": 2, "keep": "best", "save_steps": 3}
    whole = run_grpo(tmp_path / "whole", **knobs)
    real = validation.keep_adapter

    def keep_and_die(trainer: Any, folder: Path, now: int) -> None:
        real(trainer, folder, now)
        if now == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(validation, "keep_adapter", keep_and_die)
        (tmp_path / "killed").mkdir()
        recipe = write_recipe(tmp_path / "killed", **knobs)
        with pytest.raises(Killed):
            words = micro.arguments("grpo", prepared(), tmp_path / "killed" / "grpo", recipe)
            micro.command_of("grpo").main(words, standalone_mode=False)
    assert (tmp_path / "killed" / "grpo.unfinished" / "checkpoints" / f"best-{step}").is_dir()
    resumed = run_grpo(tmp_path / "killed", **knobs)
    assert adapter(resumed) == adapter(whole)
    assert lines(resumed) == lines(whole)


def test_the_adapters_that_no_checkpoint_needs_are_deleted(tmp_path: Path) -> None:
    rights = {0: 9, 2: 1, 4: 5, 6: 5, 8: 7}
    rows = [{"step": step, "right": right, "accuracy": right / 9} for step, right in rights.items()]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 4, 8):
        (tmp_path / f"best-{step}").mkdir()
    (tmp_path / "best-new").mkdir()
    for step in (3, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    validation.drop_adapters(tmp_path)
    names = {path.name for path in tmp_path.glob("best-*")}
    assert names == {"best-2", "best-4"}  # that of step 8 is found again by a run that goes on from 6
    shutil.rmtree(tmp_path / "checkpoint-3")
    validation.drop_adapters(tmp_path)
    assert {path.name for path in tmp_path.glob("best-*")} == {"best-4"}


def test_the_step_before_training_is_never_the_best() -> None:
    assert validation.best([{"step": 0, "right": 9}, {"step": 2, "right": 1}, {"step": 4, "right": 1}])["step"] == 2


def test_what_is_said_at_the_end_names_the_kept_step_and_warns_where_grpo_did_not_help() -> None:
    made = [{"step": step, "right": right, "accuracy": right / 20, "tokens": 9.0, "cut_off": 0.0}
            for step, right in ((0, 4), (10, 9), (20, 7))]  # fmt: skip
    figures = {"problems": 20, "keep": "best", "kept": made[1], "evaluations": made}
    assert terminal.validation(figures) == (
        "grpo: validation accuracy 20.0% at step 0, 45.0% at step 10, 35.0% at step 20; kept: step 10"
    )
    worse = figures | {"kept": made[0] | {"step": 10, "right": 3}}
    assert terminal.validation(worse).endswith("It was higher before GRPO: lower [grpo] learning_rate, or look at the "
                                               "rewards")  # fmt: skip


DRAWN = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.2}


@pytest.mark.torch
def test_with_vllm_trls_own_call_is_greedy_in_the_body_and_draws_again_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL's code runs as it is; vLLM's engine and its SamplingParams are stand-ins, since a CPU has no vLLM."""
    import torch
    from trl.generation import vllm_generation

    asked: list[dict[str, Any]] = []
    output = SimpleNamespace(prompt_token_ids=[1, 2], outputs=[SimpleNamespace(token_ids=[7, 8])])
    engine = object.__new__(vllm_generation.VLLMGeneration)
    vars(engine).update(DRAWN)
    vars(engine).update(
        mode="colocate", enable_sleep_mode=False, tensor_parallel_size=1, structured_outputs_regex=None, logprobs=0,
        max_completion_length=12, generation_kwargs={"stop_token_ids": [5]}, accelerator=None,
        model=torch.nn.Identity(),
        llm=SimpleNamespace(generate=lambda prompts, **_: [output] * len(prompts)),
    )  # fmt: skip
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **given: asked.append(given), raising=False)
    monkeypatch.setattr(vllm_generation, "extract_logprobs", lambda outputs: (None, None))
    trainer = SimpleNamespace(use_vllm=True, vllm_generation=engine, _last_loaded_step=4)
    with pytest.raises(RuntimeError, match="amid it"), validation.greedy(trainer):
        assert engine.generate([[1, 2]], None, 1)[1] == [[7, 8]]
        raise RuntimeError("amid it")
    engine.generate([[1, 2]], None, 1)
    names = [*DRAWN, "stop_token_ids", "max_tokens"]
    greedy, drawn = ({name: each[name] for name in names} for each in asked)
    rest = {"stop_token_ids": [5], "max_tokens": 12}
    assert greedy == {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} | rest
    assert drawn == DRAWN | rest
    assert trainer._last_loaded_step == -1  # the next step loads the weights that standby put away


@pytest.mark.torch
@pytest.mark.slow
def test_two_ranks_share_the_problems_out_and_find_what_one_finds(tmp_path: Path) -> None:
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        recipe = write_recipe(folder, evaluate_steps=2, keep="best", steps=2)
        words = [sys.executable, "-m", "stages.grpo", *micro.arguments("grpo", prepared(), folder / "grpo", recipe)]
        environment = {**os.environ, "PROCESSES": str(count)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[count] = lines(folder / "grpo")
        assert [line["step"] for line in found[count]] == [0, 2]
    assert found[1][0] == found[2][0]  # of the same adapter; after a step they differ, since the draws do
    assert read_manifest(tmp_path / "2" / "grpo", "grpo")["environment"]["world_size"] == 2
