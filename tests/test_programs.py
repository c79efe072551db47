"""A recipe whose answers are programs: prepare-data, sft, grpo and infer on a CPU, judged in the sandbox."""

import json
from pathlib import Path

import pytest

from stages.lib.answers.formats import XML
from stages.lib.answers.grade import mark
from tests.support import micro
from tests.support.recipes import read_tables, write_tables

NAMES = "add sub mul low top"
BODIES = {"add": "a+b", "sub": "a-b", "mul": "a*b", "low": "min(a,b)", "top": "max(a,b)"}
RESULTS = {"add": "7", "sub": "3", "mul": "10", "low": "2", "top": "5"}


def arrange(folder: Path, base_model: Path) -> None:
    """Write a recipe on the micro run's base model, whose rows ask for one of five functions."""
    rows = [
        {
            "question": f"{name} {'x' * (1 + number % 9)}{number}",
            "tests": [f"assert f(5, 2) == {RESULTS[name]}", f"assert f(5, 2) == f(*[5, 2]) == {RESULTS[name]}"],
            "program": f"def f(a,b):return {BODIES[name]}",
        }
        for number, name in enumerate(NAMES.split() * 12)
    ]
    for split, part in (("train", rows[:40]), ("test", rows[40:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tables = read_tables()
    for name, numbers in micro.NUMBERS.items():
        tables[name] |= numbers
    source = {"question": "question", "answer": "tests", "answers": "python", "solution": "program"}
    tables["data"] |= {"sources": [
        {"name": str(folder / "train.jsonl"), "use": ["sft", "grpo"], **source},
        {"name": str(folder / "test.jsonl"), "use": ["eval"], **source},
    ], "near_duplicate_jaccard": 1.0, "contamination_overlap": 1.0}  # fmt: skip
    tables["model"]["rehearsal"] = False
    tables["merge"]["prompts"] = tables["gguf"]["prompts"] = tables["infer"]["problems"] = 20
    tables["sft"] |= {"steps": 160, "save_steps": 80, "learning_rate": 2e-2, "max_tokens": 400, "warmup_steps": 5}
    tables["grpo"] |= {"steps": 4, "prompts_per_step": 4, "micro_batch_size": 16, "max_completion_tokens": 120,
                       "temperature": 0.1}  # fmt: skip
    tables["infer"]["max_completion_tokens"] = 120
    tables["data"]["max_prompt_tokens"] = 240
    tables["rewards"] = {"functions": ["python_tests", "correctness"], "weights": [1.0, 0.0]}
    write_tables(folder / "micro.toml", tables)
    (folder / "base-model").symlink_to(base_model)


@pytest.mark.torch
@pytest.mark.slow
def test_programs_go_through_the_stages_and_only_those_that_pass_are_rewarded(finished, tmp_path):
    arrange(tmp_path, finished / "base-model")
    for stage in ("prepare-data", "sft", "grpo", "infer"):
        result = micro.run(stage, tmp_path)
        assert result.exit_code == 0, result.output
    sets = [json.loads(line) for line in (tmp_path / "prepare-data" / "grpo.jsonl").read_text().splitlines()]
    tests = {row["prompt"][-1]["content"]: row["answer"] for row in sets}
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 4 * 4
    for row in rows:
        answer = next(answer for question, answer in tests.items() if question in row["prompt"])
        is_right = mark(XML, row["completion"], answer, "python")["right"]
        assert (row["python_tests"], row["correctness"]) == (float(is_right), 2.0 * is_right)
    assert 0 < sum(row["python_tests"] for row in rows) < len(rows)
