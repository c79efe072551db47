"""A finished run with small files and figures of its own, written as the stages write theirs, for tests of sharing."""

import json
import random
import shutil
from pathlib import Path

from stages.lib.artifact.folder import write_artifact
from stages.lib.recipe.read import read_recipe

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


def quantized(accuracy: float, mean_kl: float, size: int) -> dict[str, float | int]:
    """Return the figures of one GGUF file."""
    return {
        "accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05, "bytes": size,
        "ended": 198, "flipped_to_right": 3, "flipped_to_wrong": 7, "max_kl": 100 * mean_kl, "mean_kl": mean_kl,
        "p99_kl": 10 * mean_kl, "same_text": 0.925, "same_top": 0.9721, "positions": 6400,
    }  # fmt: skip


def examined(accuracy: float) -> dict[str, object]:
    """Return the figures of one examination."""
    bounds = [round(accuracy - 0.02, 3), round(accuracy + 0.02, 3)]
    return {
        "accuracy": accuracy, "accuracy_interval": bounds, "cut_off": 0.013, "problems": 1319, "tokens": 87.25,
        "well_formed": 0.987,
    }  # fmt: skip


PAID = {"xmlcount": 0.25, "soft_format": 0.3, "strict_format": 0.2, "int": 0.1, "correctness": 0.5, "reward": 1.35}
METRICS: dict[str, dict] = {
    "base-model": {"parameters": 1_313_280},
    "prepare-data": {
        "sources": [{"name": "base-model", "rows": 8123}, {"name": "base-model", "rows": 1517}],
        "sets": {
            "eval": {"rows": 1517, "dropped": {}},
            "grpo": {"rows": 8001, "dropped": {"too close to eval": 122}},
            "sft": {"rows": 7999, "dropped": {"too close to eval": 122, "duplicate": 2}},
        },
    },
    "sft": {"examples": 7999, "loss": 0.21345, "trainable_parameters": 131_072, "memory_ladder": []},
    "grpo": {"first": PAID, "last": {**PAID, "correctness": 0.875, "reward": 1.725}, "memory_ladder": []},
    "infer": {
        "base": examined(0.031), "sft": examined(0.252), "grpo": examined(0.743),
        "steps": {
            "base to sft": {"gained": 301, "lost": 9, "p": 1.5e-76},
            "sft to grpo": {"gained": 655, "lost": 7, "p": 2.5e-158},
        },
    },
    "merge": {
        "parameters": 1_313_280, "positions": 3200, "prompts": 50, "merged_mean_kl": 4.6e-7, "merged_max_kl": 1.2e-5,
        "merged_same_top": 0.9987, "base_mean_kl": 10.75,
        "merged_4bit": {"bytes": 40_000, "mean_kl": 0.0342, "max_kl": 0.456, "same_top": 0.9432},
    },
    "gguf": {
        "files": {"q8_0": quantized(0.735, 3.5e-4, 150_000), "q4_k_m": quantized(0.705, 1.3e-2, 90_000)},
        "reference": {
            "accuracy": 0.74, "accuracy_low": 0.68, "accuracy_high": 0.8, "ended": 199, "positions": 6400,
            "prompts": 200,
        },
        "lora": {"bytes": 20_000, "mean_kl": 6.7e-5, "max_kl": 8.9e-4, "same_top": 0.9978, "positions": 6400},
    },
    "ollama-modelfile": {"system_prompt": True},
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
        inputs = {name: folder / name for name in INPUTS[stage]}
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
