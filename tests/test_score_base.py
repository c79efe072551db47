"""score-base: what it makes of rewards, when it advises against GRPO, which problems it chooses, and one run of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import grpo, score_base
from stages.lib.artifact.folder import write_artifact
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import ScoreBase
from stages.lib.report.figures import ScoreBaseFigures, figures_of
from tests.support import tiny_models
from tests.support.once import once_a_run, run_folder
from tests.support.recipes import read_tables, write_tables

KNOBS = ScoreBase(problems=3, completions_per_problem=2, batch_size=2, seed=0, min_pass_rate=0.0, max_pass_rate=1.0)


def row(form: float, correct: float, *, right: bool = False, ended: bool = True, well_formed: bool = True) -> dict:
    rewards = {"form": form, "correct": correct}
    marks = {"right": right, "ended": ended, "well_formed": well_formed, "tokens": 4}
    return {"rewards": rewards, "total": form + correct, **marks}


MIXED = [
    row(0.5, 2.0, right=True), row(0.5, 0.0),
    row(0.0, 0.0, well_formed=False, ended=False), row(0.5, 0.0),
    row(0.5, 2.0, right=True), row(0.5, 2.0, right=True),
]  # fmt: skip


def test_what_each_reward_pays_and_how_often_it_tells_a_group_apart():
    metrics = score_base.score(MIXED, [1.0, 1.0], 2)
    form, correct = metrics["rewards"]
    assert (form["name"], form["mean"], form["least"], form["most"]) == ("form", pytest.approx(5 / 12), 0.0, 0.5)
    assert form["zero_variance"] == pytest.approx(2 / 3)
    assert (correct["name"], correct["mean"], correct["weight"]) == ("correct", 1.0, 1.0)
    assert correct["spread"] == pytest.approx(1.0954451)  # of a sample, as TRL logs it
    assert metrics["total"]["zero_variance"] == pytest.approx(1 / 3)


def test_shares_are_of_completions_and_counts_of_problems():
    metrics = score_base.score(MIXED, [1.0, 1.0], 2)
    assert (metrics["problems"], metrics["completions"], metrics["tokens"]) == (3, 6, 4.0)
    assert metrics["right"] == 0.5
    assert (metrics["well_formed"], metrics["cut_off"]) == (pytest.approx(5 / 6), pytest.approx(1 / 6))
    assert (metrics["never_right"], metrics["always_right"]) == (1, 1)


@pytest.mark.parametrize(
    ("values", "zero_variance"),
    [
        ([1.0, 1.0, 0.0, 0.0], 1.0),  # constant in each group, not over all
        ([1.0, 0.0, 1.0, 0.0], 0.0),
        ([0.0, 0.0, 0.499, 0.5], 0.5),  # one character of chatter is a difference
        ([0.1 + 0.2, 0.3, 0.0, 0.0], 1.0),  # the rounding of a sum is none
        ([-1.0, 1.0, 0.0, 0.0], 0.5),
    ],
)
def test_a_group_has_no_variance_when_all_in_it_are_paid_the_same(values, zero_variance):
    assert score_base.summary(values, 2)["zero_variance"] == zero_variance


def metrics(model: str = "sft", *, rows: list[dict], weights: tuple[float, float] = (1.0, 1.0), **more: int) -> dict:
    return {"model": model, **score_base.score(rows, list(weights), 2), **more}


RIGHT, WRONG = row(0.5, 2.0, right=True), row(0.5, 0.0)
BAD, CUT = row(0.0, 0.0, well_formed=False), row(0.0, 0.0, well_formed=False, ended=False)


def test_nothing_speaks_against_rewards_that_differ():
    assert score_base.advise(metrics(rows=MIXED), prompts_per_step=8) == []


def test_one_group_with_variance_is_enough():
    assert score_base.advise(metrics(rows=[RIGHT, RIGHT, BAD, BAD, RIGHT, BAD]), prompts_per_step=8) == []


def test_a_constant_reward_is_named_with_what_it_pays_even_though_groups_differ():
    first, remedy = score_base.advise(metrics(rows=[RIGHT, WRONG, WRONG, RIGHT]), prompts_per_step=8)
    assert first == "[rewards] form (0.5): the same for all 4 completions, so GRPO learns nothing from it"
    assert "give it weight 0" in remedy


def test_a_constant_reward_of_weight_0_is_only_a_metric():
    rows = [{**RIGHT, "total": 2.0}, {**WRONG, "total": 0.0}]
    assert score_base.advise(metrics(rows=rows, weights=(0.0, 1.0)), prompts_per_step=8) == []


def test_a_constant_reward_of_negative_weight_counts():
    assert "form (0.5)" in score_base.advise(metrics(rows=[RIGHT, WRONG], weights=(-1.0, 1.0)), prompts_per_step=8)[0]


def test_groups_without_variance_count_though_no_reward_is_constant():
    flat, remedy = score_base.advise(metrics(rows=[RIGHT, RIGHT, BAD, BAD]), prompts_per_step=8)
    assert flat == "in each of the 2 groups all completions are rewarded alike, so every advantage is 0"
    assert "raise [grpo] temperature" in remedy


def test_rewards_that_cancel_each_other_leave_no_variance():
    rows = [row(1.0, 0.0), row(0.0, 1.0)]
    assert "every advantage is 0" in score_base.advise(metrics(rows=rows), prompts_per_step=8)[0]


def test_weights_of_0_alone_leave_no_variance():
    rows = [{**each, "total": 0.0} for each in MIXED]
    assert "every advantage is 0" in score_base.advise(metrics(rows=rows, weights=(0.0, 0.0)), prompts_per_step=8)[0]


@pytest.mark.parametrize(
    ("model", "rows", "remedy"),
    [
        ("sft", [CUT, CUT], "raise [grpo] max_completion_tokens"),
        ("base", [BAD, BAD], "score the SFT model, with --sft"),
        ("sft", [BAD, CUT], "train SFT for longer, or on more examples"),
        ("base", [WRONG, BAD], "take easier problems"),
        ("sft", [WRONG, WRONG], "take easier problems"),
        ("sft", [RIGHT, RIGHT], "take harder problems"),
    ],
)
def test_the_remedy_fits_the_completions(model, rows, remedy):
    assert remedy in score_base.advise(metrics(model, rows=rows), prompts_per_step=8)[-1]


@pytest.mark.parametrize(("subset", "refused"), [(0, True), (7, True), (8, False), (9, False)])
def test_a_subset_must_fill_a_step(subset, refused):
    advice = score_base.advise(metrics(rows=MIXED, subset=subset), prompts_per_step=8)
    assert bool(advice) == refused
    assert not refused or f"{subset} of 3 problems have a pass rate within" in advice[0]


@pytest.mark.parametrize(
    ("low", "high", "chosen"),
    [
        (0.0, 1.0, None),  # all, so no subset is asked for
        (0.0, 0.5, ["half", "never"]),
        (0.5, 0.5, ["half"]),  # the bounds are within
        (0.25, 1.0, ["half", "always"]),
        (0.6, 0.9, []),
    ],
)
def test_the_subset_holds_the_problems_within_the_bounds_in_order(low, high, chosen):
    problems = [{"id": "half"}, {"id": "never"}, {"id": "always"}]
    knobs = ScoreBase(**{**vars(KNOBS), "min_pass_rate": low, "max_pass_rate": high})
    found = score_base.choose(problems, MIXED, knobs)
    assert found == (None if chosen is None else [{"id": name} for name in chosen])


def test_a_bound_of_a_tenth_holds_one_of_ten():
    rows = [RIGHT] + [WRONG] * 9
    knobs = ScoreBase(**{**vars(KNOBS), "completions_per_problem": 10, "min_pass_rate": 0.1, "max_pass_rate": 0.1})
    assert score_base.choose([{"id": "1"}], rows, knobs) == [{"id": "1"}]


def test_problems_are_drawn_by_the_seed_each_once_in_order():
    problems = [{"id": number} for number in range(1000)]
    drawn = [each["id"] for each in score_base.draw(problems, ScoreBase(**{**vars(KNOBS), "problems": 50}))]
    again = [each["id"] for each in score_base.draw(problems, ScoreBase(**{**vars(KNOBS), "problems": 50}))]
    other = [each["id"] for each in score_base.draw(problems, ScoreBase(**{**vars(KNOBS), "problems": 50, "seed": 1}))]
    assert drawn == again == sorted(set(drawn)) != other
    assert len(drawn) == 50
    assert drawn[-1] > 500


def test_all_problems_are_taken_where_there_are_no_more():
    assert score_base.draw([{"id": 1}, {"id": 2}], KNOBS) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("per_problem = 8", "per_problem = 1", "completions_per_problem = 1; expected 2 or more"),
        ("problems = 100", "problems = 0", "[score_base] problems = 0; expected 1 or more"),
        ("batch_size = 200", "batch_size = 100", "batch_size = 100 is not a multiple of completions_per_problem = 8"),
        ("min_pass_rate = 0.0", "min_pass_rate = -0.1", "expected 0 to 1"),
        ("max_pass_rate = 1.0", "max_pass_rate = 100.0", "expected 0 to 1"),
        ("min_pass_rate = 0.0  #", "min_pass_rate = 1.5  #", "min_pass_rate = 1.5; expected 0 to 1"),
        ("min_pass_rate = 0.0", "min_pass_rat = 0.0", "did you mean 'min_pass_rate'"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path, old, new, message):
    path = tmp_path / "recipe.toml"
    text = Path("recipes/tiny.toml").read_text()
    start = text.index("[score_base]")
    path.write_text(text[:start] + text[start:].replace(old, new, 1))
    with pytest.raises(UserError, match=re.escape(message)):
        read_recipe(path)


def test_bounds_that_hold_no_pass_rate_are_refused(tmp_path):
    text = Path("recipes/tiny.toml").read_text()
    text = text.replace("min_pass_rate = 0.0", "min_pass_rate = 0.9").replace(
        "max_pass_rate = 1.0", "max_pass_rate = 0.1"
    )
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UserError, match=r"min_pass_rate = 0\.9 is over max_pass_rate = 0\.1"):
        read_recipe(tmp_path / "recipe.toml")


# ---- what GRPO takes from it ---------------------------------------------------------------------------------------


def scored(folder: Path, figures: dict) -> Path:
    with write_artifact(folder, "score-base", {}, {}) as run:
        (run.folder / "grpo.jsonl").write_text("{}\n")
        run.metrics.update(figures)
    return folder


def test_grpo_takes_its_problems_from_the_subset(tmp_path):
    folder = scored(tmp_path / "score-base", {**metrics(rows=MIXED, subset=1), "advice": []})
    assert grpo.subset(folder) == folder / "grpo.jsonl"


@pytest.mark.parametrize(
    ("advice", "more", "message"),
    [([], {}, "holds no subset"), (["every answer is right"], {"subset": 1}, "- every answer is right")],
)
def test_grpo_refuses_what_has_no_subset_or_was_advised_against(tmp_path, advice, more, message):
    with pytest.raises(UserError, match=message):
        grpo.subset(scored(tmp_path / "score-base", {**metrics(rows=MIXED, **more), "advice": advice}))


# ---- a run ---------------------------------------------------------------------------------------------------------


@once_a_run
def base_model() -> Path:
    """Return a finished base-model/ of a network that has learned nothing, with its publisher's favourite sampling."""
    folder = run_folder() / "score-base" / "base-model"
    with write_artifact(folder, "base-model", {}, {}) as run:
        tiny_models.trained_gemma(run.folder / "model", steps=0)
        favourite = {"do_sample": True, "top_k": 1, "repetition_penalty": 9.0, "eos_token_id": [1, 5]}
        (run.folder / "model" / "generation_config.json").write_text(json.dumps(favourite))
    return folder


def arrange(folder: Path, functions: list[str], **bounds: float) -> Path:
    """Write a recipe for 6 problems x 4 with these rewards and, beside where the output goes, its inputs."""
    tables = read_tables() | {"rewards": {"functions": functions, "weights": [1.0] * len(functions)}}
    tables["score_base"] |= {"problems": 6, "completions_per_problem": 4, "batch_size": 16, "seed": 0} | bounds
    tables["grpo"]["max_completion_tokens"] = tables["infer"]["max_completion_tokens"] = 24
    recipe = write_tables(folder / "recipe.toml", tables)
    shutil.copytree(base_model(), folder / "base-model")
    with write_artifact(folder / "prepare-data", "prepare-data", {}, {}) as run:
        lines = [json.dumps(row) + "\n" for row in tiny_models.rows(20, seed=7)]
        (run.folder / "grpo.jsonl").write_text("".join(lines))
    return recipe


def run(recipe: Path, *inputs: str):
    out = recipe.parent / "score-base"
    return tiny_models.run_stage("score_base", recipe, out, "prepare-data", "base-model", *inputs), out


@pytest.mark.torch
def test_a_run_that_fails_keeps_what_it_measured_and_fails_again_without_sampling_again(tmp_path):
    (tmp_path / "own.py").write_text("def always(completions, **kwargs):\n    return [0.25] * len(completions)\n")
    recipe = arrange(tmp_path, ["xmlcount", "own.py:always"])
    first, out = run(recipe)
    assert first.exit_code == 1, first.output
    assert "always (0.25): the same for all 24 completions" in first.output
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert len({row["id"] for row in rows}) == 6
    assert all(row["total"] == row["rewards"]["xmlcount"] + 0.25 for row in rows)
    assert len({row["completion"] for row in rows[:4]}) > 1  # the publisher's top_k = 1 does not count
    assert not (out / "grpo.jsonl").exists()
    before = (out / "manifest.json").read_bytes()

    second, _ = run(recipe)
    assert (second.exit_code, "up to date" in second.output) == (1, True)
    assert second.output.splitlines()[-2:] == first.output.splitlines()[-2:]
    assert (out / "manifest.json").read_bytes() == before

    with (tmp_path / "own.py").open("a") as file:
        file.write("# another payment\n")
    third, _ = run(recipe)
    assert (third.exit_code, "up to date" in third.output) == (1, False)  # the user's own file is an input
    assert [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()] == rows  # the seed decides


@pytest.mark.torch
def test_a_run_of_the_sft_model_samples_as_the_recipe_says_and_writes_the_subset(tmp_path):
    with write_artifact(tmp_path / "sft", "sft", {}, {}) as made:
        tiny_models.adapter(base_model() / "model", made.folder, steps=0)
    (tmp_path / "own.py").write_text(
        "def vowels(completions, completion_ids, answer, prompts):\n"
        "    assert len(completions) == len(completion_ids) == len(answer) == len(prompts)\n"
        "    return [sum(letter in 'aeiou' for letter in each[0]['content']) / 100 for each in completions]\n"
    )
    recipe = arrange(tmp_path, ["own.py:vowels"], max_pass_rate=0.99, problems=20)
    result, out = run(recipe, "sft")
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["metrics"]["model"], manifest["metrics"]["advice"]) == ("sft", [])
    assert set(manifest["inputs"]) == {"prepare-data", "base-model", "sft"}
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len({row["completion"] for row in rows[:4]}) > 1  # nor under an adapter
    chosen = [json.loads(line) for line in (out / "grpo.jsonl").read_text().splitlines()]
    assert len(chosen) == figures_of(manifest, ScoreBaseFigures)["subset"] >= 8
    assert set(chosen[0]) == {"id", "prompt", "completion", "answer"}  # rows as prepare-data has them
    assert grpo.subset(out) == out / "grpo.jsonl"

    again, _ = run(recipe, "sft")
    assert (again.exit_code, "up to date" in again.output, "weighted sum" in again.output) == (0, True, True)


@pytest.mark.torch
def test_a_recipe_without_the_table_is_told_to_have_one(tmp_path):
    recipe = arrange(tmp_path, ["xmlcount"])
    recipe.write_text(re.sub(r"\[score_base\]\n.*?\n(?=\[)", "", recipe.read_text(), flags=re.DOTALL))
    result, out = run(recipe)
    assert (result.exit_code, out.exists()) == (1, False)
    assert "has no [score_base] table" in result.output


@pytest.mark.torch
@pytest.mark.slow
def test_two_processes_draw_apart_and_rewards_see_all_completions_in_one_call(tmp_path):
    (tmp_path / "own.py").write_text(
        "def place(completions):\n    return [float(number) for number in range(len(completions))]\n"
    )
    recipe = arrange(tmp_path, ["own.py:place"], problems=1, completions_per_problem=8, batch_size=8)
    out = tmp_path / "score-base"
    given = [word for name in ("prepare-data", "base-model") for word in (f"--{name}", str(tmp_path / name))]
    command = [sys.executable, "-m", "stages.score_base", "--recipe", str(recipe), *given, "--out", str(out)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env={**os.environ, "PROCESSES": "2"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (out / "manifest.json").is_file(), done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    texts = [row["completion"] for row in rows]
    assert texts[:4] != texts[4:]  # of one prompt, by one process and by the other
    assert [row["rewards"]["place"] for row in rows] == list(range(8))
    assert json.loads((out / "manifest.json").read_text())["environment"]["world_size"] == 2
