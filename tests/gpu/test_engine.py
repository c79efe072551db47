"""Engine "unsloth" on an NVIDIA GPU: `make test-gpu`. Every stage runs as `make` runs it, in a process of its own.

The model is a Qwen3 network of random weights with the real Qwen2 vocabulary. It learns nothing in six steps, so what
is tested is what has to be true of any run: bench/gpu_learning.py is the run that learns.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from stages import base_model
from stages.lib.recipe.read import read_recipe
from tests.support import micro
from tests.support.recipes import write_tables

if shutil.which("nvidia-smi") is None:
    pytest.skip("needs an NVIDIA GPU: make test-gpu", allow_module_level=True)

ROOT = Path(__file__).parents[2]
INPUTS = micro.INPUTS | {"prepare-data": [], "merge": ["prepare-data", "grpo"]}
SIZES = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 1024, "initializer_range": 0.025,
}  # fmt: skip
# In place of the values of bench/gpu_learning.toml. Six steps, a checkpoint after every second.
VALUES = {
    "save": ["merged_16bit", "merged_4bit"],
    "vllm.memory_share": 0.2,
    "vllm.sequences": 64,
    "sft.steps": 6,
    "sft.warmup_steps": 1,
    "sft.log_steps": 1,
    "rewards.functions": ["own.py:variety", "strict_format"],
    "rewards.weights": [1.0, 1.0],
    "grpo.steps": 6,
    "grpo.prompts_per_step": 8,
    "grpo.save_steps": 2,
    "grpo.warmup_steps": 1,
    "grpo.max_completion_tokens": 256,
    "infer.problems": 40,
    "infer.batch_size": 40,
}


@dataclass
class Work:
    """A folder with a base model, problems, recipes and artifacts."""

    folder: Path

    def recipe(self, name: str, **changes: object) -> Path:
        """Write a recipe with other values, by "table__key"."""
        text = (ROOT / "bench" / "gpu_learning.toml").read_text()
        tables = tomllib.loads(text.format(base=self.folder / "base", problems=self.folder / "problems"))
        for key, value in (VALUES | {key.replace("__", "."): value for key, value in changes.items()}).items():
            table, _, key_there = key.rpartition(".")
            (tables[table] if table else tables)[key_there] = value
        return write_tables(self.folder / f"{name}.toml", tables)

    def run(
        self, stage: str, recipe: Path, out: str, inputs: dict[str, str] | None = None, before: str = "", code: int = 0
    ) -> tuple[dict, str]:
        """Run a stage, after the Python code `before` in its process; return its metrics and what it printed.

        It is to leave with `code`, no memory of the GPU behind it; the metrics are empty unless that is 0.
        """
        program = f"{before}\nimport runpy\nrunpy.run_module('stages.{stage.replace('-', '_')}', run_name='__main__')"
        given = [word for name in INPUTS[stage] if name != "base-model"
                 for word in (f"--{name}", str(self.folder / (inputs or {}).get(name, name)))]  # fmt: skip
        command = [sys.executable, "-c", program, "--recipe", str(recipe), *given, "--out", str(self.folder / out)]
        held = gpu_mib()
        result = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
        )
        assert result.returncode == code, result.stdout[-6000:]
        assert gpu_mib() <= held + 64  # it left no process behind that holds memory
        if code:
            return {}, result.stdout
        metrics = json.loads((self.folder / out / "manifest.json").read_text())["metrics"]
        print(f"{stage} -> {out}: {json.dumps(metrics)}")
        return metrics, result.stdout


def gpu_mib() -> int:
    """Return how much memory of the first GPU that may be seen is in use, by whomever."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", gpu]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Return a folder with the base, the problems, prepared data and the SFT adapter."""
    from tests.support import family_models

    made = Work(tmp_path_factory.mktemp("gpu"))
    (made.folder / "own.py").write_text(micro.OWN)
    family = replace(family_models.FAMILIES["qwen3"], template=family_models.FAMILIES["qwen2.5"].template)
    family_models.base(family, made.folder / "base", **SIZES)
    knobs = read_recipe(ROOT / "recipes" / "tiny.toml").base_model
    base_model.write_problems(replace(knobs, eval_problems=240, train_problems=400), made.folder / "problems")
    recipe = made.recipe("recipe")
    for stage in ("prepare-data", "sft"):
        made.run(stage, recipe, stage)
    return made


@pytest.fixture(scope="module")
def trained(work: Work) -> dict:
    """Return what GRPO came to."""
    return work.run("grpo", work.folder / "recipe.toml", "grpo")[0]


def curve(folder: Path, name: str) -> list[float]:
    """Return a metric by step, out of TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.glob("logs/**/events*")
    events = EventAccumulator(str(path)).Reload()
    return [event.value for event in events.Scalars(name)]


def logged(folder: Path) -> list[int]:
    """Return the steps that TensorBoard's files hold, of all processes that worked on a run, one after the other."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = []
    for path in sorted(folder.glob("logs/**/events*")):
        events = EventAccumulator(str(path)).Reload()
        if "train/reward" in events.Tags()["scalars"]:
            steps += [event.step for event in events.Scalars("train/reward")]
    return steps


def completions(folder: Path, step: int) -> list[str]:
    """Return what was sampled in a step of GRPO."""
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [row["completion"] for row in rows if row["step"] == step]


def test_vllm_samples_from_the_very_model_that_is_trained(trained):
    assert trained["memory_ladder"] == []
    for when in ("first", "last"):
        assert trained[when]["sampling_difference"] < 0.05
        assert abs(trained[when]["importance_ratio"] - 1) < 0.03
        assert trained[when]["completion_tokens"] > 8


def test_infer_examines_three_models_in_one_engine(work, trained):
    metrics, _ = work.run("infer", work.folder / "recipe.toml", "infer")
    assert [metrics[name]["problems"] for name in ("base", "sft", "grpo")] == [40, 40, 40]
    answers = [json.loads(line) for line in (work.folder / "infer" / "answers.jsonl").read_text().splitlines()]
    texts = {name: [row["completion"] for row in answers if row["model"] == name] for name in ("base", "sft", "grpo")}
    assert all(len(set(each)) > 1 for each in texts.values())
    assert texts["base"] != texts["sft"] != texts["grpo"]


def test_merge_hands_over_16_bits_and_nf4(work, trained):
    metrics, _ = work.run("merge", work.folder / "recipe.toml", "merge")
    assert metrics["merged_mean_kl"] < 1e-4 < metrics["base_mean_kl"]
    assert metrics["merged_mean_kl"] < metrics["merged_4bit"]["mean_kl"] < 0.3
    assert metrics["merged_4bit"]["bytes"] < 0.8 * metrics["bytes"]
    four_bits = work.folder / "merge" / "model-4bit"
    assert json.loads((four_bits / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert (four_bits / "tokenizer.json").is_file()
    assert not list(four_bits.glob("*.bin"))


def test_sparing_the_scoring_pass_changes_no_gradient(work, trained):
    keep = "from stages.lib.model import unsloth; unsloth.needs_scoring_pass = lambda recipe: True"
    metrics, _ = work.run("grpo", work.recipe("scoring", grpo__steps=1), "grpo-scoring", before=keep)
    assert completions(work.folder / "grpo-scoring", 1) == completions(work.folder / "grpo", 1)  # by the seed
    assert metrics["first"]["importance_ratio"] == pytest.approx(trained["first"]["importance_ratio"], abs=2e-3)
    for name in ("train/grad_norm", "train/loss"):
        scored, spared = curve(work.folder / "grpo-scoring", name)[0], curve(work.folder / "grpo", name)[0]
        assert scored == pytest.approx(spared, rel=0.03, abs=1e-4)


# From the third step on torch may take no more than 3/4 of what the first two steps took beyond what lay there before.
# The limit is kept in a file: the process that is started anew, one rung down, gets the same.
CAP = """
import os, pathlib, torch
from stages.lib.model import engine
limit = pathlib.Path(os.environ["CAP_FILE"])
start = engine.import_engine

def start_capped(recipe):
    start(recipe)
    from transformers import TrainerCallback, trainer

    class Cap(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                torch.cuda.reset_peak_memory_stats()
                self.before = torch.cuda.memory_allocated()
            if state.global_step == 2:
                if not limit.exists():
                    peak = torch.cuda.max_memory_allocated()
                    limit.write_text(str(self.before + 0.75 * (peak - self.before)))
                torch.cuda.empty_cache()
                share = float(limit.read_text()) / torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(share)

    trainer.DEFAULT_CALLBACKS.append(Cap)

engine.import_engine = start_capped
"""


def test_out_of_memory_in_a_step_goes_on_one_rung_down_from_the_last_checkpoint(work, trained, monkeypatch):
    monkeypatch.setenv("CAP_FILE", str(work.folder / "cap"))
    metrics, said = work.run("grpo", work.recipe("ladder", grpo__seed=1), "grpo-ladder", before=CAP)
    print(re.findall(r"out of GPU memory at .*", said), (work.folder / "cap").read_text())
    assert completions(work.folder / "grpo-ladder", 1) != completions(work.folder / "grpo", 1)  # by another seed
    (step, *more) = metrics["memory_ladder"]
    assert step["at_step"] == 2
    assert (step["from"]["micro_batch_size"], step["to"]["micro_batch_size"]) == (64, 32)
    assert "out of memory" in step["reason"]
    assert len(more) <= 1
    assert logged(work.folder / "grpo-ladder") == [1, 2, 3, 4, 5, 6]  # the first two were not repeated
    # As many completions in each step as before, in smaller parts.
    assert [len(completions(work.folder / "grpo-ladder", number)) for number in range(1, 7)] == [64] * 6


def test_training_in_4_bits_merges_into_the_16_bit_base_and_says_what_that_costs(work):
    recipe = work.recipe("four", model__load_in_4bit=True, save=["merged_16bit"], grpo__steps=2, sft__steps=2)
    work.run("sft", recipe, "four-sft")
    metrics, _ = work.run("grpo", recipe, "four-grpo", {"sft": "four-sft"})
    assert metrics["last"]["sampling_difference"] < 0.1
    merged, said = work.run("merge", recipe, "four-merge", {"grpo": "four-grpo"})
    assert merged["merged_mean_kl"] < 1e-4 < merged["trained_in_4bit"]["mean_kl"] < 0.3
    assert "the model as it was in training, in 4 bits" in said


def test_term_saves_and_ends_and_the_same_command_carries_on(work, trained, monkeypatch):
    recipe = work.recipe("term", grpo__seed=2, grpo__steps=3)
    monkeypatch.setenv("TERM_AT_CALL", "2")
    _, said = work.run("grpo", recipe, "grpo-term", code=143)
    assert "stopped by SIGTERM, saved at step 2" in said
    monkeypatch.delenv("TERM_AT_CALL")
    metrics, said = work.run("grpo", recipe, "grpo-term")
    assert "carrying on from" in said
    assert logged(work.folder / "grpo-term") == [1, 2, 3]
    assert metrics["last"]["sampling_difference"] < 0.05


# What is free of the GPU's memory after each step, while vLLM sleeps. Awake it has nine tenths, whatever it was told.
FREE = """
from stages.lib.model import engine
start = engine.import_engine

def start_watched(recipe):
    start(recipe)
    import torch
    from transformers import TrainerCallback, trainer

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            free, total = torch.cuda.mem_get_info()
            print(f"free after step {state.global_step}: {free / total:.2f}", flush=True)

    trainer.DEFAULT_CALLBACKS.append(Watch)

engine.import_engine = start_watched
"""


def test_standby_gives_vllm_memory_back_while_training(work):
    recipe = work.recipe("standby", vllm__standby=True, grpo__steps=2)
    metrics, said = work.run("grpo", recipe, "standby-grpo", before=FREE)
    assert metrics["memory_ladder"] == []
    (share,) = re.findall(r"Standby mode is enabled\. Changing `gpu_memory_utilization` to (0\.\d+)", said)
    free = [float(each) for each in re.findall(r"free after step \d: (\d\.\d\d)", said)]
    print(f"standby: vLLM's share {share}, free after each step {free}")
    assert len(free) == 2
    assert min(free) > 1 - float(share) + 0.2
    assert metrics["last"]["sampling_difference"] < 0.05
