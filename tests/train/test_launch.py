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
    import random
    import numpy, torch, transformers
    from transformers import Trainer, TrainerCallback, trainer
    from trl import GRPOTrainer

    number = int(rank or 0)
    notes = os.environ["NOTES"]
    fails = os.environ.get("FAILS", "").split()  # how, in which rank, in which step; once

    def draw(self, prompt_ids, images, fields, num_generations, has_tool_images=False):
        chosen = []
        for place, ids in enumerate(prompt_ids, number * len(prompt_ids)):
            chance = random.Random(f"{self.state.global_step} {place} {ids}")
            chosen.append([chance.randrange(10, 300) for _ in range(chance.randint(2, 12))])
        return chosen, None

    if "SAME_COMPLETIONS" in os.environ:  # of a step, whatever rank has them
        GRPOTrainer._generate_single_turn = draw

    def fail(how):
        open(os.path.join(notes, "failed"), "x").close()
        if how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        save = torch.save
        torch.save = lambda what, path, *more, **options: save(what, "/dev/full", *more, **options)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if fails[1:] == [str(number), str(state.global_step)] and not os.path.exists(f"{notes}/failed"):
                fail(fails[0])

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            own = [p.grad.double() for p in model.parameters() if p.requires_grad]
            self.gradient = [each.norm().item() for each in own]
            if "SAME_COMPLETIONS" in os.environ:
                whole = numpy.concatenate([each.numpy().ravel() for each in own])
                numpy.save(os.path.join(notes, f"gradient-{state.global_step}-{number}.npy"), whole)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad)
            adapter = hashlib.sha256(weights).hexdigest()
            line = {"step": state.global_step, "adapter": adapter, "gradient": self.gradient}
            with open(os.path.join(notes, f"{number}.jsonl"), "a") as file:
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


def gradients(out: Path, rank: int) -> list["numpy.ndarray"]:
    import numpy

    return [numpy.load(out.parent / "notes" / f"gradient-{step}-{rank}.npy") for step in range(4)]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"loss_type": "dapo"}, {"loss_type": "grpo", "beta": 0.1}, {"sampled_prompts": 4, "micro_batch_size": 2}],
    ids=["dapo", "grpo with a reference", "sampled prompts"],
)
def test_two_ranks_of_grpo_take_the_gradient_of_one_on_the_same_completions(finished, tmp_path, changes):
    """The gradient of two ranks differs from that of one only by the order of its float32 sums.

    A sum of n terms is off by about n u of its terms, with u = 2**-24 (Higham, Accuracy and Stability of Numerical
    Algorithms, 4.2). Here n is 8 completions x 12 tokens at most, once forward and once backward: 1.1e-5 of the whole
    gradient. Seen were under 1e-6; the loss "bnpo", which does depend on the micro-batches, is off by 0.18. The
    learning rate is so low that all four steps start from the same weights.
    """
    import numpy

    bound = 2 * 8 * 12 * 2.0**-24
    unmoved = {"steps": 4, "learning_rate": 1e-20, "max_grad_norm": 1e9}
    recipe = micro.write_recipe(tmp_path, grpo={**unmoved, **changes})
    for count in (1, 2):
        out = tmp_path / str(count) / "grpo"
        out.parent.mkdir()
        said = ended(start("grpo", finished, out, count, recipe, SAME_COMPLETIONS="1"))
        assert "grpo: finished" in said, said
    for one, two, partner in zip(*(gradients(tmp_path / c / "grpo", r) for c, r in ("10", "20", "21")), strict=True):
        assert numpy.array_equal(two, partner)
        size = numpy.linalg.norm(one)
        assert size > 0
        assert numpy.linalg.norm(one - two) < bound * size


@pytest.mark.torch
@pytest.mark.slow
def test_two_ranks_of_grpo_sample_apart_for_one_prompt_and_keep_all_completions(finished, tmp_path):
    recipe = micro.write_recipe(tmp_path, grpo={"prompts_per_step": 1, "completions_per_prompt": 8})
    out = tmp_path / "grpo"
    said = ended(start("grpo", finished, out, 2, recipe))
    assert "grpo: finished" in said
    assert notes(out, 0) == notes(out, 1)
    assert len(notes(out, 0)) == 8
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    for step in range(1, 9):
        own = [row for row in rows if row["step"] == step]
        assert len({json.dumps(row["prompt"]) for row in own}) == 1
        texts = [json.dumps(row["completion"]) for row in own]
        assert texts[:4] != texts[4:]


@pytest.mark.torch
@pytest.mark.slow
def test_two_ranks_of_grpo_are_given_the_prompts_of_one_in_its_order(finished, tmp_path):
    out = tmp_path / "grpo"
    assert "grpo: finished" in ended(start("grpo", finished, out, 2))
    prompts = [
        [(row["step"], row["prompt"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (out / "completions.jsonl", finished / "grpo" / "completions.jsonl")
    ]
    assert prompts[0] == prompts[1]


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
