"""The page of a run: what it says of a finished run and of one under way, and how it behaves in a real browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from stages import report
from stages.lib.answers.stats import mcnemar
from stages.lib.report import page
from tests.support.npm import npm_folder, require

# What a model may write, and what a page must not do with it.
HOSTILE = (
    "</script><script>window.hacked = 1</script>"
    '<img src="https://example.com/x" onerror="window.hacked = 1">{{ 7 * 7 }}'
)
ANSWERS = {  # by problem: is the answer of base, sft, grpo right, and did grpo's end
    1: (False, False, True, True),
    2: (False, True, False, False),
    3: (True, True, True, True),
    4: (False, False, False, True),
    5: (False, False, True, True),
}


def draw(folder: Path, *more: str) -> str:
    arguments = ["--recipe", str(folder / "micro.toml"), "--artifacts", str(folder), *more]
    result = CliRunner().invoke(report.main, arguments)
    assert result.exit_code == 0, result.output
    return (folder / "report.html").read_text()


def rewrite(folder: Path) -> None:
    """Put known answers and a hostile text in place of what the untrained network wrote."""
    answers = folder / "infer" / "answers.jsonl"
    example = json.loads(answers.read_text().splitlines()[0])
    rows = []
    for number, (base, sft, grpo, ended) in ANSWERS.items():
        for model, right in (("base", base), ("sft", sft), ("grpo", grpo)):
            known = {"id": number, "model": model, "right": right, "ended": ended, "completion": HOSTILE}
            rows.append(example | known | {"question": HOSTILE})
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((folder / "infer" / "manifest.json").read_text())
    for name in ("base", "sft", "grpo"):
        manifest["metrics"][name] |= {"problems": 5, "accuracy": 0.4, "accuracy_interval": [0.118, 0.769]}
    manifest["metrics"]["steps"]["sft to grpo"] = {"gained": 2, "lost": 1, "p": mcnemar(2, 1)}
    (folder / "infer" / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.torch
def test_the_page_of_an_unfinished_run_says_where_it_stands(copied: Path) -> None:
    text = draw(copied)
    assert "merge is not begun; gguf is not begun; ollama-modelfile is not begun" not in text  # infer is: a verdict is
    shutil.rmtree(copied / "infer")
    shutil.move(copied / "grpo", copied / "grpo.unfinished")
    (copied / "grpo.unfinished" / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    shutil.move(copied / "grpo.unfinished" / "completions.jsonl", copied / "grpo.unfinished" / "checkpoints")
    shutil.move(copied / "grpo.unfinished" / "logs", copied / "grpo.unfinished" / "checkpoints")
    (copied / "grpo.unfinished" / "manifest.json").unlink()
    with (copied / "grpo.unfinished" / "checkpoints" / "completions.jsonl").open("a") as file:
        file.write('{"step": 9, "prom')  # a line that the run is writing
    text = draw(copied)
    assert "This run is not finished: grpo is under way or stopped, checkpoint at step 4; infer is not begun" in text
    assert "reward, weighted sum" in text
    assert "64 sampled" in text


@pytest.mark.torch
def test_evaluations_while_training_are_a_curve_and_the_kept_step_is_named(copied: Path) -> None:
    assert "validation accuracy" not in draw(copied)
    rows = [{"step": step, "right": right, "accuracy": right / 20, "tokens": 9.0, "cut_off": 0.0}
            for step, right in ((0, 4), (4, 9), (8, 7))]  # fmt: skip
    (copied / "grpo" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((copied / "grpo" / "manifest.json").read_text())
    manifest["metrics"]["validation"] = {"problems": 20, "keep": "best", "kept": rows[1], "evaluations": rows}
    (copied / "grpo" / "manifest.json").write_text(json.dumps(manifest))
    text = draw(copied)
    assert 'aria-label="validation accuracy, greedy, %: 20 at step 0, 35 at step 8"' in text
    assert "Kept: the adapter after step 4 (the best on validation), 45.0% right of 20 validation problems" in text


@pytest.mark.torch
def test_drawn_answers_are_a_table_where_there_are_any(copied: Path) -> None:
    assert "drawn answers" not in draw(copied)
    path = copied / "infer" / "manifest.json"
    manifest = json.loads(path.read_text())
    own = {"share": 0.625, "interval": [0.4, 0.8]}
    figures = {"problems": 20, "samples": 1, "pass_at": {"1": own}, "majority_at": {"1": own | {"share": 0.5}}}
    manifest["metrics"]["sampled"] = {"grpo": figures}
    path.write_text(json.dumps(manifest))
    cells = "".join(f"<td class=n>{text}</td>" for text in ("1", "62.5%", "40.0% to 80.0%", "50.0%", "40.0% to 80.0%"))
    assert f"<tr><td>grpo</td>{cells}</tr>" in draw(copied)


@pytest.mark.torch
def test_a_price_is_multiplied_by_the_hours(copied: Path) -> None:
    seconds = 0.0
    for stage in ("base-model", "prepare-data", "sft", "grpo", "infer"):
        manifest = json.loads((copied / stage / "manifest.json").read_text())
        manifest["wall"]["seconds"] = 1800.0
        (copied / stage / "manifest.json").write_text(json.dumps(manifest))
        seconds += 1800.0
    assert "All finished stages together: 2 h 30 min, 7.50 at 3.0 an hour." in draw(copied, "--price", "3")


def test_a_folder_that_is_not_there_says_what_to_run(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "tiny.toml"
    result = CliRunner().invoke(report.main, ["--recipe", str(recipe), "--artifacts", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.output.strip().endswith("so nothing of this recipe was made yet. Run: make all")


@pytest.mark.parametrize(("p", "after", "expected"), [
    (0.001, 0.5, "GRPO raised accuracy: 25.0% before, 50.0% after, on 400 held-out problems (120 gained, 20 lost, "
                 "exact McNemar test, p = 0.001). The base model: 1.0%."),
    (0.001, 0.125, "GRPO lowered accuracy: 25.0% before, 12.5% after"),
    (0.06, 0.5, "GRPO did not measurably change accuracy: 25.0% before, 50.0% after"),
])  # fmt: skip
def test_the_verdict_goes_by_the_paired_test(p: float, after: float, expected: str) -> None:
    own = {"problems": 400, "accuracy": 0.25}
    steps = {"sft to grpo": {"gained": 120, "lost": 20, "p": p}}
    infer = {"base": own | {"accuracy": 0.01}, "sft": own, "grpo": own | {"accuracy": after}, "steps": steps}
    assert page.verdict(infer).startswith(expected)


@pytest.mark.parametrize(("prompt", "problem"), [
    ("system\n\nuser\nHow many\nbuses?\nassistant\n", "How many\nbuses?"),
    ("user\nHow many?\nmodel\n", "How many?"),
    ("\n How many?", "How many?"),
    ("user fees are 3. What does the model cost?", "user fees are 3. What does the model cost?"),
])  # fmt: skip
def test_the_names_of_roles_around_a_problem_are_left_out(prompt: str, problem: str) -> None:
    assert page.without_roles(prompt) == problem


def test_a_long_run_keeps_the_best_and_the_worst_of_each_step() -> None:
    rows = [
        {"step": step, "problem": "", "completion": "", "reward": float(number), "advantage": 0.0, "rewards": {}}
        for step in range(1, 251)
        for number in range(64)
    ]
    chosen = page.chosen_completions(rows)
    assert len(chosen) == 1500
    for step in range(1, 251):
        rewards = {row["reward"] for row in chosen if row["step"] == step}
        assert {0.0, 63.0} <= rewards


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (91, "2 min"), (11_100, "3 h 05 min")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text


@pytest.mark.torch
@pytest.mark.slow
def test_in_chromium_filters_work_nothing_is_fetched_and_axe_finds_no_serious_fault(copied: Path) -> None:
    rewrite(copied)
    draw(copied)
    browser = require("chromium", "chromium")
    command = ["node", "page.js", browser, str(copied / "report.html")]
    done = subprocess.run(command, cwd=npm_folder(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["title"] == "micro: Temper's report"
    assert seen["verdict"].startswith("GRPO did not measurably change accuracy: 40.0% before, 40.0% after")
    assert seen["shown"] == {"gained": 2, "lost": 1, "truncated": 1, "wrong": 2, "all": 5, "nothing": 0}
    assert seen["steps"] == ["Step 1"]
    assert seen["scripts"], "a completion's text became markup or ran"
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["faults"] == []
    assert seen["wider"] == {"360": 0, "1100": 0}, "the page is wider than its window"
