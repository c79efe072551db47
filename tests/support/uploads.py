"""A finished run with small files and figures of its own, written as the stages write theirs, for tests of sharing."""

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.artifact.folder import write_artifact
from stages.lib.recipe.read import read_recipe
from stages.lib.report.figures import (
    AdapterFile,
    BaseModelFigures,
    Evaluation,
    GgufFigures,
    GgufFile,
    GrpoFigures,
    InferFigures,
    Lengths,
    MergeFigures,
    OllamaModelfileFigures,
    PrepareDataFigures,
    ProblemSet,
    Rewarded,
    SftFigures,
)

ROOT = Path(__file__).parents[2]
STAGES = ("prepare-data", "sft", "grpo", "infer", "merge", "gguf", "ollama-modelfile")
MODELFILE = '''\
FROM ./model.q8_0.gguf
TEMPLATE """{{range .Messages}}{{.Content}}
{{end}}"""
SYSTEM """Think,
then answer."""
PARAMETER stop "<end>"
PARAMETER stop "<eos>"
PARAMETER num_ctx 1024
PARAMETER temperature 0.5
'''


def bits(seed: int, size: int) -> bytes:
    """Return so many bytes that are always the same for one seed."""
    return random.Random(seed).randbytes(size)


TOKENIZER = {"tokenizer.json": b'{"version": "1.0"}', "chat_template.jinja": b"{{ messages }}"}
ADAPTER = {"base_model_name_or_path": "/home/ann/models/secret", "r": 16, "revision": None}
FILES: dict[str, dict[str, bytes]] = {
    "base-model": {"model/model.safetensors": bits(0, 100)},
    "prepare-data": {"eval.jsonl": b"{}\n"},
    "sft": {"adapter/adapter_model.safetensors": bits(1, 100)},
    "grpo": {
        "adapter/adapter_config.json": json.dumps(ADAPTER).encode(),
        "adapter/adapter_model.safetensors": bits(2, 30_000),
        **{f"tokenizer/{name}": content for name, content in TOKENIZER.items()},
        "completions.jsonl": b"{}\n",
    },
    "infer": {"answers.jsonl": b"{}\n"},
    "merge": {
        "model/config.json": b"{}",
        "model/model-00001-of-00002.safetensors": bits(3, 250_000),
        "model/model-00002-of-00002.safetensors": bits(4, 120_000),
        "model/tokenizer.model": bits(5, 5_000),
        **{f"model/{name}": content for name, content in TOKENIZER.items()},
        "model-4bit/config.json": b'{"quantization_config": {}}',
        "model-4bit/model.safetensors": bits(6, 40_000),
    },
    "gguf": {
        "adapter-f16.gguf": bits(7, 20_000),
        "model.q8_0.gguf": bits(8, 150_000),
        "model.q4_k_m.gguf": bits(9, 90_000),
        "parity.json": b"{}\n",
        "parity.png": bits(10, 3_000),
    },
    "ollama-modelfile": {"Modelfile": MODELFILE.encode(), "model.q8_0.gguf": bits(8, 150_000)},
}


def adapter_file(mean_kl: float, size: int) -> AdapterFile:
    """Return the figures of a GGUF file that is held against the merged model."""
    return {
        "bytes": size, "positions": 6400, "mean_kl": mean_kl, "p99_kl": 10 * mean_kl, "max_kl": 100 * mean_kl,
        "same_top": 0.9721, "perplexity": 1.2346, "reference_perplexity": 1.2345, "max_mean_kl": 0.1,
    }  # fmt: skip


def gguf_file(accuracy: float, mean_kl: float, size: int) -> GgufFile:
    """Return the figures of one GGUF file of the model."""
    return {
        **adapter_file(mean_kl, size), "accuracy": accuracy, "accuracy_low": accuracy - 0.05,
        "accuracy_high": accuracy + 0.05, "ended": 198, "flipped_to_right": 3, "flipped_to_wrong": 7,
        "same_text": 0.925, "answer": "42",
    }  # fmt: skip


def evaluation(accuracy: float) -> Evaluation:
    """Return the figures of one evaluation."""
    bounds = [round(accuracy - 0.02, 3), round(accuracy + 0.02, 3)]
    return {
        "accuracy": accuracy, "accuracy_interval": bounds, "cut_off": 0.013, "problems": 1319, "tokens": 87.25,
        "well_formed": 0.987,
    }  # fmt: skip


def rewarded(correctness: float) -> Rewarded:
    """Return what a tenth of the steps of GRPO came to."""
    rewards = {"xmlcount": 0.25, "soft_format": 0.3, "strict_format": 0.2, "int": 0.1, "correctness": correctness}
    reward = round(sum(rewards.values()), 3)
    return {"reward": reward, "reward_std": 0.4, "rewards": rewards, "completion_tokens": 41.5, "cut_off": 0.1}


def problem_set(rows: int, **dropped: int) -> ProblemSet:
    """Return the figures of a set; the names of reasons have _ for a blank."""
    lengths: Lengths = {"measured": rows, "p50": 61, "p90": 70, "p99": 81, "max": 93}
    reasons = {reason.replace("_", " "): count for reason, count in dropped.items()}
    return {"rows": rows, "dropped": reasons, "prompt_tokens": lengths}


METRICS: dict[str, Mapping[str, Any]] = {
    "base-model": BaseModelFigures(parameters=1_313_280, tokens=900_000, loss=0.512),
    "prepare-data": PrepareDataFigures(
        sources=[
            {"name": "base-model", "split": "train", "use": ["sft", "grpo"], "rows": 8123, "dropped": {}},
            {"name": "base-model", "split": "eval", "use": ["eval"], "rows": 1517, "dropped": {"no answer": 3}},
        ],
        sets={
            "eval": problem_set(1517),
            "grpo": problem_set(8001, too_close_to_eval=122),
            "sft": problem_set(7999, duplicate=2, too_close_to_eval=122),
        },
    ),
    "sft": SftFigures(
        examples=7999, dropped_too_long=0, loss=0.21345, trainable_parameters=131_072, memory_ladder=[]
    ),
    "grpo": GrpoFigures(first=rewarded(0.5), last=rewarded(0.875), memory_ladder=[]),
    "infer": InferFigures(
        base=evaluation(0.031), sft=evaluation(0.252), grpo=evaluation(0.743),
        steps={
            "base to sft": {"gained": 301, "lost": 9, "p": 1.5e-76},
            "sft to grpo": {"gained": 655, "lost": 7, "p": 2.5e-158},
        },
    ),
    "merge": MergeFigures(
        parameters=1_313_280, bytes=2_700_000, positions=3200, prompts=50, merged_mean_kl=4.6e-7, merged_max_kl=1.2e-5,
        merged_same_top=0.9987, base_mean_kl=10.75,
        merged_4bit={"bytes": 40_000, "mean_kl": 0.0342, "max_kl": 0.456, "same_top": 0.9432},
    ),
    "gguf": GgufFigures(
        files={"q8_0": gguf_file(0.735, 3.5e-4, 150_000), "q4_k_m": gguf_file(0.705, 1.3e-2, 90_000)},
        reference={
            "accuracy": 0.74, "accuracy_low": 0.68, "accuracy_high": 0.8, "ended": 199, "positions": 6400,
            "prompts": 200,
        },
        llama_server={"conversations": 207, "tokens": 20_345, "differences": []},
        lora={**adapter_file(6.7e-5, 20_000), "max_kl": 8.9e-4, "same_top": 0.9978},
    ),
    "ollama-modelfile": OllamaModelfileFigures(
        conversations=48, stops=["<end>", "<eos>"], system_prompt=True,
        earlier_answers_as_trained=True, file="model.q8_0.gguf", architecture="gemma3", prompted_by="TEMPLATE",
    ),
}  # fmt: skip
TABLES = {
    "base-model": ["base_model"], "prepare-data": ["model", "data", "format"], "sft": ["model", "lora", "sft"],
    "grpo": ["model", "rewards", "grpo"], "infer": ["model", "infer"], "merge": ["model", "merge"], "gguf": ["gguf"],
    "ollama-modelfile": ["ollama"],
}  # fmt: skip
INPUTS = {
    "base-model": [], "prepare-data": ["base-model"], "sft": ["base-model", "prepare-data"],
    "grpo": ["base-model", "prepare-data", "sft"], "infer": ["base-model", "prepare-data", "sft", "grpo"],
    "merge": ["base-model", "prepare-data", "grpo"], "gguf": ["prepare-data", "merge"],
    "ollama-modelfile": ["merge", "gguf"],
}  # fmt: skip


def write_run(folder: Path) -> Path:
    """Write tiny.toml and all artifacts of a run of it to `folder`; return it."""
    shutil.copy(ROOT / "recipes" / "tiny.toml", folder)
    recipe = read_recipe(folder / "tiny.toml")
    for stage, files in FILES.items():
        inputs = {name: (folder / name, ["*"]) for name in INPUTS[stage]}
        tables = recipe.tables(*TABLES[stage]) | ({"save": ["lora"]} if stage == "gguf" else {})
        with write_artifact(folder / stage, stage, tables, inputs) as run:
            for name, content in files.items():
                (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (run.folder / name).write_bytes(content)
            run.metrics.update(METRICS[stage])
    return folder


def arguments(run: Path, *more: str) -> list[str]:
    """Return the options of push for the run in the folder `run`."""
    given = [word for stage in STAGES for word in (f"--{stage}", str(run / stage))]
    return ["--recipe", str(run / "tiny.toml"), "--hub", "ann/tiny", *given, *more]
