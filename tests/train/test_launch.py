"""Two ranks on a CPU: one verdict, one message, and what they learn is what one rank learns."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.lib.artifact.digests import sha256_of
from stages.lib.errors import UserError
from stages.lib.train.launch import process_count, share_variables
from stages.lib.train.sampling import share_of
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
    told = os.environ.get("TOLD", "").split()  # by which signal and at the end of which step the stage is told to stop

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

    def tell(number):
        # The stage has the signal, and so has each rank, before any of them takes another step. It is sent when all
        # listen: who had it before would wait for ever.
        came, before = [], signal.getsignal(number)
        signal.signal(number, lambda *heard: (came.append(heard), before(*heard)))
        ears = [os.path.join(notes, f"listens-{told[1]}-{each}") for each in range(int(os.environ["PROCESSES"]))]
        open(ears[int(rank or 0)], "x").close()
        while not all(map(os.path.exists, ears)):
            time.sleep(0.01)
        if rank == "0":
            os.kill(os.getppid(), number)
        elif rank is None:
            os.kill(os.getpid(), number)
        while not came:
            time.sleep(0.01)
        signal.signal(number, before)

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
            if told[1:] == [str(state.global_step)]:
                tell(getattr(signal, told[0]))
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
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
    )  # fmt: skip


def ended(process: subprocess.Popen) -> str:
    """Wait for a stage as long as it works; return all that it said.

    It hangs when it and its ranks used less than a second of processor time in two minutes. Time on the wall says
    nothing: beside other work a stage takes many times as long.
    """
    used = -1.0
    while True:
        try:
            output, errors = process.communicate(timeout=120)
            return output + errors
        except subprocess.TimeoutExpired:
            before, used = used, sum(map(processor_seconds, (process.pid, *ranks_of(process))))
            if used < before + 1:
                process.kill()  # and with it its ranks
                raise


def processor_seconds(process: int) -> float:
    """Return the processor time that a process has used; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return 0.0


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


def gradients(out: Path, rank: int) -> list[Any]:
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
    for count, step in ((2, 3), (1, 5)):
        process = start("grpo", finished, out, count, TOLD=f"SIGTERM {step}")
        said = ended(process)
        assert process.returncode == 143, said
        assert said.count("stopped by SIGTERM") == said.count(f"saved at step {step}") == 1
        assert "Traceback" not in said
        assert (folder / f"checkpoint-{step}" / "complete").is_file()
    said = ended(start("grpo", finished, out, 2))
    assert "grpo: finished" in said
    rows = [json.loads(line)["step"] for line in (out / "completions.jsonl").read_text().splitlines()]
    assert rows == [step for step in range(1, 9) for _ in range(8)]


@pytest.mark.torch
@pytest.mark.slow
def test_hung_up_both_ranks_stop_at_one_step_and_leave_one_whole_checkpoint_of_it(finished, tmp_path):
    out = tmp_path / "sft"
    folder = out.with_name("sft.unfinished") / "checkpoints"
    process = start("sft", finished, out, 2, TOLD="SIGHUP 3")
    said = ended(process)
    assert process.returncode == 129, said
    assert said.count("stopped by SIGHUP") == said.count("saved at step 3") == 1
    assert [notes(out, rank)[-1]["step"] for rank in (0, 1)] == [3, 3]
    assert max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")) == 3
    assert (folder / "checkpoint-3" / "complete").is_file()
    assert "sft: finished" in ended(start("sft", finished, out, 1))


@pytest.mark.torch
@pytest.mark.slow
def test_a_stage_that_is_killed_leaves_no_rank_behind(finished, tmp_path):
    out = tmp_path / "sft"
    process = start("sft", finished, out, 2, PAUSE="0.3")
    wait_for(out.with_name("sft.unfinished") / "checkpoints" / "checkpoint-2" / "complete", process)
    started = ranks_of(process)
    assert len(started) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(is_running(rank) for rank in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(rank) for rank in started)


def is_running(process: int) -> bool:
    """Say whether a process is there and no zombie."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.torch
@pytest.mark.slow
def test_out_of_memory_in_one_rank_both_start_anew_from_the_checkpoint_one_rung_down(finished, tmp_path):
    out = tmp_path / "grpo"
    said = ended(start("grpo", finished, out, 2, FAILS="memory 1 3"))
    assert "grpo: finished" in said
    assert said.count("out of GPU memory at step 3: micro_batch_size 4 -> 2, and on from the last checkpoint") == 1
    assert "Traceback" not in said
    assert notes(out, 0) == notes(out, 1)
    assert [note["step"] for note in notes(out, 0)] == [1, 2, 3, 3, 4, 5, 6, 7, 8]  # a checkpoint every 2 steps
    (rung,) = json.loads((out / "manifest.json").read_text())["metrics"]["memory_ladder"]
    assert (rung["at_step"], rung["to"]["micro_batch_size"]) == (3, 2)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_said_once_and_the_run_goes_on_from_the_checkpoint_before(finished, tmp_path, count):
    out = tmp_path / "sft"
    process = start("sft", finished, out, count, FAILS="disk 0 3")
    said = ended(process)
    assert process.returncode == 1
    assert said.count("a file can't be written; the disk has ") == 1
    assert "Traceback" not in said
    said = ended(start("sft", finished, out, count))
    assert "sft: carrying on from" in said
    assert "sft: finished" in said
    steps = [note["step"] for note in notes(out, 0)]
    assert steps == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    if count == 1:
        name = "adapter/adapter_model.safetensors"
        assert sha256_of(out / name) == sha256_of(finished / "sft" / name)


@pytest.mark.torch
@pytest.mark.slow
def test_a_health_check_ends_both_ranks_at_one_step_with_one_message(finished, tmp_path):
    changes = {"functions": ["own.py:variety"], "weights": [1.0]}
    recipe = micro.write_recipe(tmp_path, rewards=changes, grpo={"log_steps": 1})
    recipe.write_text(recipe.read_text() + "\n[health]\nlog_entries = 3\n")
    (tmp_path / "own.py").write_text("def variety(completions):\n    return [0.5] * len(completions)\n")
    out = tmp_path / "grpo"
    process = start("grpo", finished, out, 2, recipe)
    said = ended(process)
    assert process.returncode == 1
    assert said.count("stopped at step 3 by the constant_reward check") == 1
    assert "Traceback" not in said
    assert [[note["step"] for note in notes(out, rank)] for rank in (0, 1)] == [[1, 2, 3], [1, 2, 3]]
    assert not out.exists()


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


def test_batches_are_shared_out_whole_and_in_turn():
    assert share_of(20, 8, 0, 1) == list(range(20))
    assert share_of(20, 8, 0, 2) == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19]
    assert share_of(20, 8, 1, 2) == [8, 9, 10, 11, 12, 13, 14, 15]
    assert [share_of(7, 200, number, 3) for number in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [share_of(1, 200, number, 2) for number in range(2)] == [[0], []]


@pytest.mark.parametrize(
    ("visible", "own"), [(None, ["0", "1"]), ("2,5", ["2", "5"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]), ("", ["", ""])]
)
def test_a_process_that_samples_sees_its_own_gpu_alone_and_waits_for_no_partner(monkeypatch, visible, own):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    variables = [share_variables(number, 2) for number in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in variables] == own
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"} & set(variables[0])


@pytest.mark.torch
@pytest.mark.slow
def test_two_processes_of_infer_write_the_file_of_one(finished, tmp_path):
    out = tmp_path / "infer"
    said = ended(start("infer", finished, out, 2))
    assert "infer: finished" in said, said
    assert (out / "answers.jsonl").read_bytes() == (finished / "infer" / "answers.jsonl").read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["environment"]["world_size"] == 2
    assert manifest["metrics"] == json.loads((finished / "infer" / "manifest.json").read_text())["metrics"]
    assert not (out / "checkpoints").exists()


@pytest.mark.torch
@pytest.mark.slow
def test_two_processes_of_infer_end_together_with_one_message_when_one_is_killed_and_quietly_on_term(
    finished, tmp_path
):
    for number, code, expected in (
        (
            signal.SIGKILL,
            1,
            ["Error: rank 1 of 2 was ended by SIGKILL. All ranks were ended. Run the same command again"],
        ),
        (signal.SIGTERM, 143, []),
    ):
        process = start("infer", finished, tmp_path / "infer", 2)
        wait_for(tmp_path / "infer.unfinished" / "checkpoints" / "ranks" / "1.log", process)
        while len(ranks_of(process)) < 2:
            time.sleep(0.01)
        if number == signal.SIGKILL:
            os.kill(ranks_of(process)[1], number)
        else:
            process.send_signal(number)
        said = ended(process)
        assert process.returncode == code, said
        assert [line for line in said.splitlines() if "rank" in line] == expected
        assert "Traceback" not in said
        assert not (tmp_path / "infer").exists()


@pytest.mark.torch
def test_a_signal_that_comes_while_the_ranks_agree_is_heeded_at_the_next_step(monkeypatch):
    from types import SimpleNamespace

    from stages.lib.train import callbacks

    _, stop = callbacks.make_callbacks({}, 1)
    sent = []

    def agree(value):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
            return 0  # the other rank has no signal yet, and this one had none when it was asked
        return value

    monkeypatch.setattr(callbacks.ranks, "largest", agree)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    before = signal.getsignal(signal.SIGTERM)
    stop.on_train_begin(None, None, control)
    stops = []
    for step in (1, 2):
        stop.on_step_end(None, SimpleNamespace(global_step=step), control)
        stops.append(control.should_training_stop)
    stop.on_train_end(None, None, control)
    assert stops == [False, True]
    assert signal.getsignal(signal.SIGTERM) == before
