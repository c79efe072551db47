"""Two ranks on a CPU: one verdict, one message, and what they learn is what one rank learns."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.artifact.digests import sha256_of
from stages.lib.errors import UserError
from stages.lib.train.launch import process_count
from tests.support import micro

ROOT = Path(__file__).parents[2]

# The stage as `python -m` runs it, but each rank notes its gradient and its adapter after every step, and does what the
# environment asks for.
WATCHED = """\
import hashlib, json, os, runpy, signal, sys, time
stage, rank = sys.argv.pop(1), os.environ.get("RANK")
if rank is not None or os.environ.get("PROCESSES") == "1":
    import transformers
    from transformers import Trainer, TrainerCallback, trainer

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradient = [p.grad.double().norm().item() for p in model.parameters() if p.requires_grad]

        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad)
            adapter = hashlib.sha256(weights).hexdigest()
            line = {"step": state.global_step, "adapter": adapter, "gradient": self.gradient}
            with open(os.path.join(os.environ["NOTES"], f"{rank or 0}.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\\n")
            time.sleep(float(os.environ.get("PAUSE", "0")))

    trainer.DEFAULT_CALLBACKS.append(Watch)
sys.argv[0] = stage
runpy.run_module(stage, run_name="__main__", alter_sys=True)
"""


def start(stage: str, finished: Path, out: Path, processes: int, recipe: Path | None = None, **environment: str):
    """Start `stage` with so many ranks; each notes what it did in a file beside `out`."""
    notes = out.parent / "notes"
    notes.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WATCHED, f"stages.{stage}", *micro.arguments(stage, finished, out, recipe)]
    environment = {**os.environ, "PROCESSES": str(processes), "NOTES": str(notes), **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> str:
    """Wait for a stage; return all that it said."""
    output, errors = process.communicate(timeout=240)
    return output + errors


def notes(out: Path, rank: int) -> list[dict]:
    return [json.loads(line) for line in (out.parent / "notes" / f"{rank}.jsonl").read_text().splitlines()]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Return the processes that a stage started, in order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(each) for each in children)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"TEMPER_GPUS": "none"}, 1),
        ({"TEMPER_GPUS": "3"}, 1),
        ({"TEMPER_GPUS": "0,1"}, 2),
        ({"TEMPER_GPUS": "all", "CUDA_VISIBLE_DEVICES": "2,5,7"}, 3),
        ({"PROCESSES": "4"}, 4),
    ],
)
def test_a_process_is_started_for_each_gpu_that_was_named(environment, count):
    assert process_count(environment) == count


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_another_word_than_a_number_of_processes_is_refused(asked):
    with pytest.raises(UserError, match="PROCESSES="):
        process_count({"PROCESSES": asked})


@pytest.mark.torch
@pytest.mark.slow
def test_two_ranks_of_sft_take_the_gradient_of_one_and_have_the_same_adapter_after_every_step(finished, tmp_path):
    seen = {}
    for count in (1, 2):
        out = tmp_path / str(count) / "sft"
        out.parent.mkdir()
        process = start("sft", finished, out, count)
        assert "sft: finished" in ended(process)
        seen[count] = notes(out, 0)
    assert notes(tmp_path / "2" / "sft", 1) == seen[2]
    assert len(seen[2]) == 8
    for one, two in zip(seen[1], seen[2], strict=True):
        assert max(one["gradient"]) > 0
        assert two["gradient"] == pytest.approx(one["gradient"], rel=1e-3, abs=1e-7)
    manifest = json.loads((tmp_path / "2" / "sft" / "manifest.json").read_text())
    assert manifest["environment"]["world_size"] == 2


@pytest.mark.torch
@pytest.mark.slow
def test_two_ranks_of_grpo_sample_apart_learn_alike_and_keep_all_completions(finished, tmp_path):
    out = tmp_path / "grpo"
    said = ended(start("grpo", finished, out, 2))
    assert "grpo: finished" in said
    assert notes(out, 0) == notes(out, 1)
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    alone = [json.loads(line) for line in (finished / "grpo" / "completions.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(row["step"], row["prompt"]) for row in alone]
    first = [row["completion"] for row in rows if row["step"] == 1]
    assert first[:4] != first[4:]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_killed_rank_ends_the_others_in_seconds_and_carried_on_it_ends_with_the_same_bytes(finished, tmp_path, stage):
    whole = tmp_path / "whole" / stage
    whole.parent.mkdir()
    assert f"{stage}: finished" in ended(start(stage, finished, whole, 2))
    out = tmp_path / stage
    process = start(stage, finished, out, 2, PAUSE="0.3")
    checkpoint = out.with_name(f"{stage}.unfinished") / "checkpoints" / "checkpoint-2" / "complete"
    wait_for(checkpoint, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    said = ended(process)
    assert time.monotonic() - killed < 10
    assert process.returncode == 1
    assert said.count("rank 1 of 2 was ended by SIGKILL") == 1
    assert "Traceback" not in said
    said = ended(start(stage, finished, out, 2))
    assert f"{stage}: carrying on from" in said
    assert sha256_of(out / "adapter/adapter_model.safetensors") == sha256_of(
        whole / "adapter/adapter_model.safetensors"
    )


@pytest.mark.torch
@pytest.mark.slow
def test_terminated_all_ranks_save_one_checkpoint_which_one_rank_carries_on_and_back(finished, tmp_path):
    out = tmp_path / "grpo"
    folder = out.with_name("grpo.unfinished") / "checkpoints"
    steps = []
    for count in (2, 1):
        process = start("grpo", finished, out, count, PAUSE="0.3")
        wait_for(folder / f"checkpoint-{2 if count == 2 else steps[0] + 1}" / "complete", process)
        process.send_signal(signal.SIGTERM)
        said = ended(process)
        assert process.returncode == 143, said
        (step,) = [int(word) for word in said.split("saved at step ")[1].split()[:1]]
        steps.append(step)
        assert said.count("stopped by SIGTERM") == 1
        assert "Traceback" not in said
        assert (folder / f"checkpoint-{step}" / "complete").is_file()
    assert steps[0] < steps[1] < 8
    said = ended(start("grpo", finished, out, 2))
    assert "grpo: finished" in said
    rows = [json.loads(line)["step"] for line in (out / "completions.jsonl").read_text().splitlines()]
    assert rows == [step for step in range(1, 9) for _ in range(8)]


OWN = """
import os
def variety(completions):
    if os.environ["RANK"] == "1":
        raise ValueError("no such answer")
    return [0.5 * (len(turns[-1]["content"]) % 2) for turns in completions]
"""


@pytest.mark.torch
@pytest.mark.slow
def test_a_reward_that_raises_in_one_rank_is_said_once(finished, tmp_path):
    recipe = micro.write_recipe(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    out = tmp_path / "grpo"
    process = start("grpo", finished, out, 2, recipe)
    said = ended(process)
    assert process.returncode == 1
    assert said.count("no such answer") == 1
    assert not out.exists()


@pytest.mark.torch
def test_a_step_that_ranks_cannot_share_is_refused_before_any_is_started(finished, tmp_path):
    process = start("grpo", finished, tmp_path / "grpo", 3)
    said = ended(process)
    assert process.returncode == 1
    assert "[grpo] prompts_per_step x completions_per_prompt = 8 can't be shared by 3 processes alike" in said
