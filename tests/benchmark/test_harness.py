"""Public benchmarks: names that are no options, local copies, figures right by hand, and the harness on a model."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stages import benchmark
from stages.lib.benchmark.harness import checked_names, from_folder, plain
from stages.lib.errors import UserError
from tests.support import tiny_models

TASK = """\
task: temper_sums
dataset_path: ann/sums
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["</answer>"], do_sample: false, max_gen_toks: 48}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - name: last-number
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[0-9]+)"}
      - {function: take_first}
metadata: {version: 1.0}
"""


@pytest.mark.parametrize(
    "text", ["--help", "gsm8k,--device", "../x", "a/b", "tasks/x.yaml,", "", "gsm8k,,x", "$(id)", "*"]
)
def test_what_is_no_name_of_a_task_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no name of a task; expected such as gsm8k,math_hard"):
        checked_names(text)


def test_names_are_taken_once_in_their_order() -> None:
    assert checked_names("gsm8k, math_hard,gsm8k,arc-c.v2") == ("gsm8k", "math_hard", "arc-c.v2")


@pytest.mark.parametrize(
    ("made", "name", "fetched"),
    [
        (["gsm8k/test.jsonl"], "main", ("gsm8k", {})),  # splits beside each other: the part has no folder
        (["gsm8k/main/test.jsonl"], "main", ("gsm8k/main", {})),
        (["gsm8k/README.md"], "main", ("gsm8k", {"name": "main"})),  # the hub's repository, which names its parts
        (["gsm8k/README.md"], None, ("gsm8k", {})),
    ],
)
def test_a_local_copy_is_read_in_place_of_the_hubs(
    tmp_path: Path, made: list[str], name: str | None, fetched: tuple[str, dict[str, str]]
) -> None:
    for each in made:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text("")
    calls: list[Any] = []
    load = from_folder(tmp_path, lambda *where, **rest: calls.append((where, rest)))
    load("openai/gsm8k", name, split="test")
    place, parts = fetched
    assert calls == [((str(tmp_path / place),), {**parts, "split": "test"})]
    load("json", data_files="mine.jsonl")
    assert calls[1] == (("json", None), {"data_files": "mine.jsonl"})
    with pytest.raises(UserError, match=r"MATH-lighteval: there is no local copy of DigitalLearning/MATH-lighteval"):
        load("DigitalLearning/MATH-lighteval", "algebra")


FOUND = {
    "results": {"sums": {"alias": "sums", "exact_match,last": 0.5, "exact_match_stderr,last": 0.1, "sample_len": 4}},
    "samples": {
        "sums": [
            {"doc_id": number, "filter": "last", "metrics": ["exact_match"], "exact_match": right}
            for number, right in enumerate([1.0, 0.0, 0.0, 1.0])
        ]
    },
    "n-samples": {"sums": {"original": 200, "effective": 4}},
}


def test_of_the_harness_results_metrics_values_and_counts_are_kept() -> None:
    assert plain(FOUND) == {
        "metrics": {"sums": {"exact_match,last": 0.5}},
        "values": {"sums": {"exact_match,last": {"0": 1.0, "1": 0.0, "2": 0.0, "3": 1.0}}},
        "counts": {"sums": 4},
    }


def found(values: list[float], mean: float) -> dict[str, Any]:
    by_problem = {str(number): value for number, value in enumerate(values)}
    return {"metrics": {"sums": {"em,last": mean}}, "values": {"sums": {"em,last": by_problem}}, "counts": {"sums": 9}}


def test_right_and_wrong_answers_are_compared_as_pairs() -> None:
    (row,) = benchmark.compared(found([1, 0, 0, 0, 0, 0], 1 / 6), found([0, 1, 1, 1, 1, 1], 5 / 6))
    assert (row["gained"], row["lost"], row["p"]) == (5, 1, 0.21875)  # exact: (1 + 6) / 32
    assert row["problems"] == 6
    assert row["base_interval"] == pytest.approx([0.0301, 0.5635], abs=1e-4)
    assert benchmark.table([row]).split("\n")[1].split() == [
        "sums", "em,last", "6", "16.7%", "(3.0%", "to", "56.4%)", "83.3%", "(43.6%", "to", "97.0%)", "5/1", "p", "=",
        "0.22",
    ]  # fmt: skip


def test_a_metric_that_is_no_share_has_no_test() -> None:
    (row,) = benchmark.compared(found([12.5, 3.0], 7.75), found([10.0, 2.0], 6.0))
    assert "p" not in row
    assert benchmark.table([row]).split("\n")[1].split() == ["sums", "em,last", "2", "7.75", "6"]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Return a folder with a task of one's own, and the copy of its dataset."""
    folder = tmp_path / "benchmarks"
    (folder / "sums").mkdir(parents=True)
    (folder / "sums.yaml").write_text(TASK)
    unsafe = TASK.replace("temper_sums", "temper_unsafe") + "unsafe_code: true\n"
    (folder / "unsafe.yaml").write_text(unsafe)
    rows = tiny_models.rows(24, seed=3)
    with (folder / "sums" / "test.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps({"question": row["prompt"][-1]["content"], "answer": row["answer"]}) + "\n")
    return folder


def run(local: Path, out: Path, *more: str, form: str = "merged") -> Any:
    folder = tiny_models.made()
    words = ["--recipe", str(folder / "tiny.toml"), "--merge", str(tiny_models.merged())]
    words += ["--base-model", str(folder / "base-model"), "--artifacts", str(out), "--local", str(local), "--of", form]
    return CliRunner().invoke(benchmark.main, [*words, *more])


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_a_task_of_ones_own_runs_offline_on_base_and_result(local: Path, tmp_path: Path, form: str) -> None:
    more = ["--gguf", str(tiny_models.quantized())] if form == "gguf" else []
    result = run(local, tmp_path, "--tasks", "temper_sums", "--limit", "16", "--chat", *more, form=form)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / f"benchmark-{form}.json").read_text())
    assert (written["lm_eval"], written["limit"], written["tasks"]) == ("0.4.13", 16, ["temper_sums"])
    assert written["engine"] == {"merged": "hf", "gguf": "gguf"}[form]
    (row,) = written["rows"]
    assert (row["task"], row["metric"], row["problems"]) == ("temper_sums", "exact_match,last-number", 16)
    assert {16 * row["base"], 16 * row["result"]} <= set(range(17))
    assert 16 * (row["result"] - row["base"]) == row["gained"] - row["lost"]
    assert "temper_sums" in result.output


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("temper_sum", "has no task 'temper_sum' (did you mean 'temper_sums'?)"),
        ("gsm8k", "gsm8k: there is no local copy of openai/gsm8k, which a task of TASKS reads"),
        ("humaneval", "TASKS: a task reads what is not in "),
        ("temper_unsafe", "temper_unsafe which is marked as unsafe"),
    ],
)
def test_what_can_not_be_run_says_why(local: Path, tmp_path: Path, tasks: str, message: str) -> None:
    result = run(local, tmp_path, "--tasks", tasks)
    assert result.exit_code == 1
    assert message in result.output
    assert not list(tmp_path.glob("benchmark-*.json"))
