"""A dataset's own columns, from its files through prepare-data to a reward of the user's own, and its source."""

import json
from pathlib import Path

import pytest

from tests.support import micro
from tests.support.recipes import read_tables, write_tables

# Each completion is rewarded by its row's columns: what came through shows in completions.jsonl.
OWN = """\
import helper


async def columns(completions, level, tags, meta, row, unit, answer):
    for own in row:
        helper.check(own)
    assert [own.get("level") for own in row] == level
    return [helper.value(*each) for each in zip(level, tags, meta, unit, answer)]


class Variety:
    def __call__(self, completions, **kwargs):
        import numpy

        return numpy.array([len(set(turns[-1]["content"])) / 10 for turns in completions])


variety = Variety()
"""
HELPER = """\
def check(own):
    assert set(own) in ({"problem", "result", "level", "tags", "meta"}, {"Question", "Answer", "unit"}), own


def value(level, tags, meta, unit, answer):
    if unit is not None:
        return None  # not scored: a row of the CSV
    return level + len(tags) / 10 + meta["steps"][1]["cost"] / 100 + float(answer) / 1e6
"""


def arrange(folder: Path, base_model: Path) -> None:
    """Write a recipe with two files of other columns, the reward and its module, and the link to a base model."""
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "problem": f"A box holds {number} red and {number + 7} blue balls. How many balls does it hold?",
            "result": str(2 * number + 7), "level": number % 3, "tags": ["sum"] * (number % 2),
            "meta": {"steps": [{"cost": 1}, {"cost": number % 5}]},
        }
        for number in range(20)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "boxes.parquet")
    csv = [
        f"Tom walks {number} km and then {number + 3} km. How far does he walk?,{2 * number + 3},km"
        for number in range(20)
    ]
    (folder / "walks.csv").write_text("\n".join(["Question,Answer,unit", *csv]))
    tables = read_tables()
    for name, numbers in micro.NUMBERS.items():
        tables[name] |= numbers
    tables["rewards"] = {"functions": ["own.py:columns", "own.py:variety"], "weights": [1.0, 1.0]}
    tables["grpo"] |= {"prompts_per_step": 4}
    tables["model"]["rehearsal"] = False
    tables["data"]["sources"][0]["use"] = ["sft"]
    tables["data"]["sources"] += [
        {"name": str(folder / "boxes.parquet"), "use": ["grpo"], "question": "problem", "answer": "result"},
        {"name": str(folder / "walks.csv"), "use": ["grpo"], "question": "Question", "answer": "Answer"},
    ]
    tables["data"]["near_duplicate_jaccard"] = 1.0
    write_tables(folder / "micro.toml", tables)
    (folder / "own.py").write_text(OWN)
    (folder / "helper.py").write_text(HELPER)
    (folder / "base-model").symlink_to(base_model)


@pytest.mark.torch
@pytest.mark.slow
def test_every_column_of_every_source_reaches_the_reward_and_its_modules_are_its_source(finished, tmp_path):
    arrange(tmp_path, finished / "base-model")
    for stage in ("prepare-data", "sft", "grpo"):
        result = micro.run(stage, tmp_path)
        assert result.exit_code == 0, result.output

    rows = [json.loads(line) for line in (tmp_path / "prepare-data" / "grpo.jsonl").read_text().splitlines()]
    by_question = {row["prompt"][-1]["content"]: json.loads(row["row"]) for row in rows}
    assert len(by_question) == 40
    assert by_question["A box holds 4 red and 11 blue balls. How many balls does it hold?"] == {
        "problem": "A box holds 4 red and 11 blue balls. How many balls does it hold?", "result": "15", "level": 1,
        "tags": [], "meta": {"steps": [{"cost": 1}, {"cost": 4}]},
    }  # fmt: skip
    kept = [json.loads(line) for line in (tmp_path / "grpo" / "completions.jsonl").read_text().splitlines()]
    assert len(kept) == 8 * 4 * 4
    scored = 0
    for row in kept:
        own = next(own for question, own in by_question.items() if question in row["prompt"])
        if "unit" in own:
            assert row["columns"] is None
        else:
            scored += 1
            expected = own["level"] + len(own["tags"]) / 10 + own["meta"]["steps"][1]["cost"] / 100
            assert row["columns"] == pytest.approx(expected + float(own["result"]) / 1e6, abs=1e-6)
        assert row["variety"] == pytest.approx(len(set(row["completion"])) / 10, abs=1e-6)
    assert 0 < scored < len(kept)
    for name in ("sft.jsonl", "eval.jsonl"):
        assert '"row"' not in (tmp_path / "prepare-data" / name).read_text()

    with (tmp_path / "helper.py").open("a") as file:
        file.write("changed = True\n")
    assert "prepare-data: up to date" in micro.run("prepare-data", tmp_path).output
    result = micro.run("grpo", tmp_path)
    assert (result.exit_code, "grpo: is made again. Changed: helper.py\n" in result.output) == (0, True), result.output


@pytest.mark.torch
@pytest.mark.slow
def test_a_column_that_no_source_has_is_found_by_prepare_data(finished, tmp_path):
    arrange(tmp_path, finished / "base-model")
    (tmp_path / "own.py").write_text(OWN.replace("unit, answer)", "units, answer)"))
    result = micro.run("prepare-data", tmp_path)
    assert result.exit_code == 1
    assert "'own.py:columns' asks for units; expected names of columns: prompts, completions" in result.output
    assert not (tmp_path / "prepare-data").exists()
