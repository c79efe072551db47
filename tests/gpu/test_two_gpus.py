"""Two NVIDIA GPUs: what the CPU's tests of two ranks show, with NCCL and an engine a GPU. `make test-gpu`."""

import json
import shutil
import subprocess

import pytest

from stages.lib.machine import exchange
from tests.gpu import test_engine

SMI = shutil.which("nvidia-smi")
if SMI is None or subprocess.run([SMI, "-L"], capture_output=True, text=True, check=True).stdout.count("GPU ") < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)

work = test_engine.work  # the fixture: a base model, problems and the SFT adapter
# Before a stage: each rank notes the digest of its adapter after every step.
WATCHED = """
import hashlib, os
from stages.lib.model import engine
load = engine.import_engine

def import_watched(*given):
    load(*given)
    from transformers import TrainerCallback, trainer

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            own = [weight for weight in model.parameters() if weight.requires_grad]
            digest = hashlib.sha256(b"".join(weight.detach().float().cpu().numpy().tobytes() for weight in own))
            with open(os.environ["NOTES"] + "/" + os.environ["RANK"], "a") as file:
                print(state.global_step, digest.hexdigest(), file=file)

    trainer.DEFAULT_CALLBACKS.append(Note)

engine.import_engine = import_watched
"""


def test_copies_between_two_gpus_arrive_and_nccl_comes_to_the_right_sum(monkeypatch):
    monkeypatch.setenv("RUNTIME", "local")
    monkeypatch.setenv("GPUS", "0,1")
    found = list(exchange.findings(exchange.start(2, "nccl")))
    assert [finding.name for finding in found] == ["peer-to-peer", "all_reduce"]
    assert found[0].status in ("ok", "warn"), found[0].line  # warn: PCIe without peer-to-peer
    assert found[1].status == "ok", found[1].line


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_two_gpus_have_the_same_adapter_after_every_step(work, monkeypatch, tmp_path, stage):
    monkeypatch.setenv("TEMPER_GPUS", "0,1")
    monkeypatch.setenv("NOTES", str(tmp_path))
    work.run(stage, work.folder / "recipe.toml", f"two-{stage}", before=WATCHED)
    environment = json.loads((work.folder / f"two-{stage}" / "manifest.json").read_text())["environment"]
    assert environment["world_size"] == 2
    first, second = ((tmp_path / rank).read_text().splitlines() for rank in "01")
    assert first == second
    assert len({line.split()[1] for line in first}) == 6  # each of the six steps moved it


def test_two_engines_answer_the_problems_of_one_in_their_order(work, monkeypatch):
    inputs = {"grpo": "two-grpo"}
    monkeypatch.setenv("TEMPER_GPUS", "0,1")
    work.run("infer", work.folder / "recipe.toml", "two-infer", inputs)
    monkeypatch.setenv("TEMPER_GPUS", "0")
    work.run("infer", work.folder / "recipe.toml", "one-infer", inputs)
    rows = [
        [json.loads(line) for line in (work.folder / name / "answers.jsonl").read_text().splitlines()]
        for name in ("one-infer", "two-infer")
    ]
    assert len(rows[0]) == len(rows[1]) > 0
    assert [(row["model"], row["id"]) for row in rows[0]] == [(row["model"], row["id"]) for row in rows[1]]
