"""Runs held against each other, and sweeps: what is said of known answers, and what is written, shared and refused."""

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stages import compare, sweep
from tests.support import micro
from tests.support.npm import npm_folder, require
from tests.support.recipes import read_tables, write_tables

ROOT = Path(__file__).parents[1]
HOSTILE = "</td><script>window.hacked = 1</script>{{ 7 * 7 }}"


def put_run(folder: Path, finished: Path, name: str, rights: dict[str, bool], **tables: dict[str, object]) -> Path:
    """Write a recipe and a run of it that was evaluated, with known answers by question; return the recipe."""
    path = folder / f"{name}.toml"
    shutil.copy(micro.write_recipe(folder, **tables), path)
    run = folder / "artifacts" / name
    for stage in ("grpo", "infer"):
        shutil.copytree(finished / stage, run / stage)
    example = json.loads((run / "infer" / "answers.jsonl").read_text().splitlines()[0])
    rows = [
        example | {"id": number, "question": question, "answer": "7", "model": model, "right": right}
        for number, (question, right) in enumerate(rights.items())
        for model in ("base", "sft", "grpo")
    ]
    (run / "infer" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    micro.restate(run / "infer", "answers.jsonl")
    manifest = json.loads((run / "infer" / "manifest.json").read_text())
    share = sum(rights.values()) / len(rights)
    manifest["metrics"]["grpo"] |= {"problems": len(rights), "accuracy": share, "accuracy_interval": [0.0, 1.0]}
    (run / "infer" / "manifest.json").write_text(json.dumps(manifest))
    return path


def compared(folder: Path, *recipes: Path, price: str = "") -> Result:
    given = [word for path in recipes for word in ("--recipes", str(path))]
    more = ["--price", price] if price else []
    return CliRunner().invoke(compare.main, [*given, "--runs", str(folder / "artifacts"), *more])


def answers(right: int, of: int) -> dict[str, bool]:
    """Return `of` problems, of which the first `right` are answered rightly."""
    return {f"problem {number}": number < right for number in range(of)}


@pytest.mark.torch
def test_known_answers_give_the_paired_tests_and_what_differs(finished: Path, tmp_path: Path) -> None:
    one = put_run(tmp_path, finished, "one", answers(2, 20))
    two = put_run(tmp_path, finished, "two", answers(12, 20), grpo={"learning_rate": 1e-4})
    three = put_run(tmp_path, finished, "three", answers(11, 20), rewards={"length_cache_tokens": 9})
    result = compared(tmp_path, one, two, three, price="3.6")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "grpo.learning_rate 0.005 0.0001 0.005" in lines
    assert "rewards.length_cache_tokens (left out) (left out) 9" in lines
    # Ten of ten that differ: 2 / 2^10 = 0.00195, times three; nine of nine: 2 / 2^9 = 0.0039, times two.
    assert "one, then two 20 10 0 p = 0.002 p = 0.0059 two is better" in lines
    assert "one, then three 20 9 0 p = 0.0039 p = 0.0078 three is better" in lines
    assert "two, then three 20 0 1 p = 1 p = 1 no measurable difference" in lines
    seconds = sum(
        json.loads((tmp_path / "artifacts" / "two" / stage / "manifest.json").read_text())["wall"]["seconds"]
        for stage in ("grpo", "infer")
    )
    assert "Highest accuracy: two, 60.0%. Measurably better than one." in lines
    row = next(line for line in lines if line.startswith("two 0.0% 60.0% "))
    assert f"{seconds / 1000:.2f}" in row.split()
    page = (tmp_path / "artifacts" / "comparison.html").read_text()
    for text in ("three is better", "grpo.learning_rate", "p = 0.0059", "60.0%"):
        assert text in page


@pytest.mark.torch
def test_only_problems_that_both_answered_count(finished: Path, tmp_path: Path) -> None:
    one = put_run(tmp_path, finished, "one", {"a": True, "b": False, "c": True})
    two = put_run(tmp_path, finished, "two", {"b": True, "c": True, "d": False, "e": False})
    three = put_run(tmp_path, finished, "three", {"x": True})
    result = compared(tmp_path, one, two)
    assert "one, then two 2 1 0 p = 1" in " ".join(result.output.split())
    assert "The runs were not evaluated on the same problems" in result.output
    assert "Some runs share no problem" in compared(tmp_path, one, two, three).output


@pytest.mark.torch
def test_runs_that_differ_in_seeds_alone_are_one_line(finished: Path, tmp_path: Path) -> None:
    runs = [
        put_run(tmp_path, finished, f"{rate}-{seed}", answers(right, 10), grpo={"learning_rate": rate, "seed": seed})
        for rate, seed, right in ((0.1, 1, 4), (0.1, 2, 6), (0.2, 1, 8), (0.2, 2, 9))
    ]
    said = compared(tmp_path, *runs).output.splitlines()
    assert "grpo.learning_rate = 0.1: 2 runs, accuracy 50.0% on average (40.0% to 60.0%)" in said
    assert "grpo.learning_rate = 0.2: 2 runs, accuracy 85.0% on average (80.0% to 90.0%)" in said


@pytest.mark.torch
def test_drawn_answers_are_compared_where_a_run_has_them(finished: Path, tmp_path: Path) -> None:
    one = put_run(tmp_path, finished, "one", answers(2, 20))
    two = put_run(tmp_path, finished, "two", answers(4, 20))
    assert "pass@k" not in compared(tmp_path, one, two).output
    path = tmp_path / "artifacts" / "two" / "infer" / "manifest.json"
    manifest = json.loads(path.read_text())
    shares = {k: {"share": share, "interval": [0.0, 1.0]} for k, share in (("1", 0.2), ("8", 0.625))}
    own = {"problems": 20, "samples": 8, "pass_at": shares, "majority_at": shares | {"8": shares["1"]}}
    manifest["metrics"]["sampled"] = {"grpo": own}
    path.write_text(json.dumps(manifest))
    lines = compared(tmp_path, one, two).output.splitlines()
    head = next(line for line in lines if line.startswith("run "))
    row = next(line for line in lines if line.startswith("two "))
    assert "62.5% (k = 8)" in row
    assert "20.0% (k = 8)" in row
    assert {"pass@k", "maj@k"} <= set(head.split())
    assert "k = 8" not in next(line for line in lines if line.startswith("one "))
    assert "62.5% (k = 8)" in (tmp_path / "artifacts" / "comparison.html").read_text()


@pytest.mark.torch
def test_a_run_that_is_not_evaluated_says_what_to_run(finished: Path, tmp_path: Path) -> None:
    one = put_run(tmp_path, finished, "one", answers(1, 2))
    two = put_run(tmp_path, finished, "two", answers(1, 2))
    shutil.rmtree(tmp_path / "artifacts" / "two" / "infer")
    result = compared(tmp_path, one, two)
    assert result.exit_code == 1
    assert "two/infer: not finished, so there is nothing to compare. Run: make infer RECIPE=two" in result.output
    assert "expected two or more recipes, each once" in compared(tmp_path, one).output
    assert "expected two or more recipes, each once" in compared(tmp_path, one, one).output


@pytest.mark.torch
@pytest.mark.slow
def test_the_page_holds_in_chromium(finished: Path, tmp_path: Path) -> None:
    one = put_run(tmp_path, finished, "one", answers(2, 20))
    two = put_run(tmp_path, finished, "two", answers(12, 20), format={"system_prompt": HOSTILE + " <think> " * 40})
    assert compared(tmp_path, one, two).exit_code == 0
    browser = require("chromium", "chromium")
    command = ["node", "page.js", browser, str(tmp_path / "artifacts" / "comparison.html")]
    done = subprocess.run(command, cwd=npm_folder(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["title"] == "one, two: Temper's comparison"
    assert seen["scripts"]
    assert (seen["errors"], seen["requests"], seen["faults"]) == ([], [], [])
    assert seen["wider"] == {"360": 0, "1100": 0}, "the page is wider than its window"


# ---- the recipes of a sweep ----


def swept(folder: Path, wanted: str, recipe: str = "tiny") -> Result:
    path = folder / f"{recipe}.toml"
    if not path.exists():
        write_tables(path, read_tables())
    return CliRunner().invoke(sweep.main, ["--recipe", str(path), "--set", wanted])


def test_a_sweep_is_one_recipe_for_each_combination(tmp_path: Path) -> None:
    result = swept(tmp_path, "grpo.learning_rate=1e-5,5e-5 grpo.seed=0,1,2")
    names = result.output.split()
    assert names[:3] == [f"tiny+learning_rate-1e-05+seed-{seed}" for seed in (0, 1, 2)]
    assert len(names) == 6
    assert sorted(path.stem for path in tmp_path.glob("*.toml")) == sorted([*names, "tiny"])
    for name in names:
        tables, expected = tomllib.loads((tmp_path / f"{name}.toml").read_text()), read_tables()
        expected["grpo"] |= {"learning_rate": 1e-5 if "1e-05" in name else 5e-5, "seed": int(name[-1])}
        assert tables == expected


@pytest.mark.parametrize(("wanted", "name", "table", "key", "value"), [
    ("model.dtype=float32", "tiny+dtype-float32", "model", "dtype", "float32"),
    ('lora.target_modules=["q_proj"],["q_proj", "o_proj"]', "tiny+target_modules-q_proj-o_proj", "lora",
     "target_modules", ["q_proj", "o_proj"]),
    ("health.max_kl=0.5", "tiny+max_kl-0.5", "health", "max_kl", 0.5),
    ("grpo.seed=1 sft.seed=2", "tiny+grpo.seed-1+sft.seed-2", "sft", "seed", 2),
    ("sft.packing=true,false", "tiny+packing-False", "sft", "packing", False),
])  # fmt: skip
def test_a_value_is_toml_or_a_word(tmp_path, wanted, name, table, key, value):
    assert name in swept(tmp_path, wanted).output.split()
    assert tomllib.loads((tmp_path / f"{name}.toml").read_text())[table][key] == value


def test_a_key_of_a_source_is_set_by_its_place(tmp_path: Path) -> None:
    name = swept(tmp_path, "data.sources[0].max_rows=7").output.strip()
    sources = tomllib.loads((tmp_path / f"{name}.toml").read_text())["data"]["sources"]
    assert [source.get("max_rows") for source in sources] == [7, *[None] * (len(sources) - 1)]


@pytest.mark.parametrize(("wanted", "said"), [
    ("grpo.learning_rte=1", "[grpo] learning_rte is not known"),
    ("grpo.learning_rate=0,1e-5", "[grpo] learning_rate = 0; expected over 0"),
    ("grpo.learning_rate=1e-5,fast", "expected float, found str"),
    ("grpo.learning_rate", "expected keys once each"),
    ("grpo.seed=1 grpo.seed=2", "grpo.seed is there twice"),
    ("grpo.seed=1,1", "expected each value once"),
    ("grpo.seed.deeper=1", "there is no such key in a recipe"),
    ("data.sources[9].max_rows=1", "there is no such key in a recipe"),
    ("--out=x", "expected keys once each"),
    (f"grpo.seed={','.join(map(str, range(101)))}", "gives more than 100 recipes"),
    ("tracking.project=" + "a" * 200, "makes a recipe name of 213 characters; expected at most 200"),
])  # fmt: skip
def test_what_cannot_be_swept_is_refused_and_nothing_is_written(tmp_path, wanted, said):
    result = swept(tmp_path, wanted)
    assert result.exit_code == 1, result.output
    assert said in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_value_never_leaves_the_recipes_folder_or_becomes_another_line(tmp_path: Path) -> None:
    result = swept(tmp_path, 'ollama.license="../../x\\n[grpo]\\nsteps = 1"')
    assert result.exit_code == 0, result.output
    assert result.output.strip() == "tiny+license-..-..-x-grpo-steps-1"
    written = tmp_path / "tiny+license-..-..-x-grpo-steps-1.toml"
    assert tomllib.loads(written.read_text())["ollama"]["license"] == "../../x\n[grpo]\nsteps = 1"


def test_a_recipe_of_ones_own_is_not_overwritten(tmp_path: Path) -> None:
    own = tmp_path / "tiny+seed-1.toml"
    own.write_text("# mine")
    result = swept(tmp_path, "grpo.seed=0,1")
    assert "tiny+seed-1.toml: this recipe is not of a sweep and would be overwritten" in result.output
    assert own.read_text() == "# mine"
    assert not (tmp_path / "tiny+seed-0.toml").exists()


@pytest.mark.torch
@pytest.mark.slow
def test_make_sweep_runs_three_recipes_shares_what_is_the_same_and_compares(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("stages", "docker", "make"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", copy)
    (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
    (copy / "recipes").mkdir()
    micro.write_recipe(copy / "recipes", grpo={"steps": 2})

    def made(wanted: str) -> tuple[int, str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("RECIPE", "DATA", "MAKEFLAGS")}
        done = subprocess.run(
            ["make", "sweep", "RECIPE=micro", f"SET={wanted}", "RUNTIME=local"],
            cwd=copy, env=kept, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    code, _, said = made("grpo.seed=1,2 grpo.temperature=1.0,0.0")
    assert code == 2
    assert "[grpo] temperature = 0.0; expected over 0" in said
    assert not list((copy / "artifacts").glob("micro*"))
    assert not list((copy / "recipes").glob("micro+*"))

    names = ["micro+seed-1", "micro+seed-2", "micro+seed-3"]
    code, out, said = made("grpo.seed=1,2,3")
    assert code == 0, said
    assert ["grpo.seed", "1", "2", "3"] in [line.split() for line in out.splitlines()]
    assert "no measurable difference" in out
    assert (copy / "artifacts" / "comparison.html").is_file()
    # What a change of grpo.seed does not reach was made once; what it reaches, three times.
    weights = {
        stage: {
            (copy / "artifacts" / name / stage / "adapter" / "adapter_model.safetensors").read_bytes() for name in names
        }
        for stage in ("sft", "grpo")
    }
    assert {stage: len(files) for stage, files in weights.items()} == {"sft": 1, "grpo": 3}
    began = [json.loads((copy / "artifacts" / name / "sft" / "manifest.json").read_text())["wall"] for name in names]
    assert began[0] == began[1] == began[2]

    # Again: nothing trains. One that was lost is made, and the others are left.
    before = {path: path.read_bytes() for path in (copy / "artifacts").rglob("manifest.json")}
    shutil.rmtree(copy / "artifacts" / "micro+seed-2" / "infer")
    code, out, said = made("grpo.seed=1,2,3")
    assert code == 0, said
    remade = [path for path, content in before.items() if path.read_bytes() != content]
    assert remade == [copy / "artifacts" / "micro+seed-2" / "infer" / "manifest.json"]
