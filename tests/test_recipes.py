"""Every recipe loads, says what it is meant to, and prepares its data; a slip in a recipe is refused by name."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stages import prepare_data
from stages.lib.answers import formats
from stages.lib.answers.grade import shown_answer
from stages.lib.artifact.folder import write_artifact
from stages.lib.data.place import files_of_source
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import GYM, Recipe, is_hub_name
from stages.lib.rewards.names import load_rewards
from tests.support import family_models, micro, tiny_models
from tests.support.recipes import read_tables, write_tables

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "support"
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.toml")) if "+" not in path.stem}
TINY = RECIPES["tiny"].read_text()
# No published commit of these is known, so their recipes ask for one before they run.
UNPINNED = {"qwen3-1.7b-dapo": "unsloth/OpenMathReasoning-mini"}
FAMILIES = {
    "gemma3-1b-gsm8k": "gemma3", "gemma3-4b-gsm8k": "gemma3", "qwen3-1.7b-dapo": "qwen3", "qwen2.5-3b-gsm8k": "qwen2.5",
    "llama3.1-8b-gsm8k": "llama3.1", "phi4-14b-gsm8k": "phi4", "smollm2-135m-gsm8k": "smollm2",
    "qwen2.5-3b-gym": "qwen2.5", "smollm2-135m-gym": "smollm2",
}  # fmt: skip
SHIPPED = ["tiny", "tiny-gsm8k", "tiny-gym", *FAMILIES]


def test_the_recipes_are_there() -> None:
    assert set(SHIPPED) <= set(RECIPES)


# Every recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads(name: str) -> None:
    assert read_recipe(RECIPES[name]).path == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_dataset_is_fetched_only_at_a_commit_that_the_recipe_states(name: str, tmp_path: Path) -> None:
    for source in read_recipe(RECIPES[name]).data.sources:
        if source.name == UNPINNED.get(name):
            with pytest.raises(UserError, match=f"name = '{source.name}': there is no such .* the recipe states no"):
                files_of_source(source, None, None)
            (tmp_path / f"{source.split}.jsonl").write_text("{}")
            assert files_of_source(source, None, tmp_path) == [tmp_path / f"{source.split}.jsonl"]
        else:
            assert not is_hub_name(source.name) or re.fullmatch("[0-9a-f]{40}", source.revision)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_has_a_known_format_and_rewards_that_go_with_it(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES[name])
    assert [function.__name__ for function in load_rewards(recipe)] == recipe.rewards.functions


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_agrees_with_itself(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(RECIPES[name])
    assert recipe.infer.max_completion_tokens == recipe.grpo.max_completion_tokens
    assert recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens <= recipe.ollama.num_ctx
    assert recipe.sft.max_tokens <= recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens
    assert recipe.sft.warmup_steps < recipe.sft.steps
    assert recipe.grpo.warmup_steps < recipe.grpo.steps
    assert recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt >= 64


def test_what_is_fetched_from_the_hub_has_one_commit_in_all_recipes(tmp_path: Path) -> None:
    pins: dict[str, set[str]] = {}
    for recipe in (read_recipe(RECIPES[name]) for name in SHIPPED):
        for fetched in [recipe.model, *recipe.data.sources]:
            if fetched.name not in ("base-model", GYM):
                pins.setdefault(fetched.name, set()).add(fetched.revision)
    assert {name: len(revisions) for name, revisions in pins.items()} == dict.fromkeys(pins, 1)
    assert pins["openai/gsm8k"] == {"740312add88f781978c0658806c59bc2815b9866"}


def test_the_base_models_of_the_two_tiny_recipes_differ_by_their_seed_alone() -> None:
    ours = read_recipe(RECIPES["tiny-gsm8k"]).base_model
    assert dataclasses.replace(ours, seed=1) == read_recipe(RECIPES["tiny"]).base_model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_for_a_gpu_starts_from_the_defaults(name: str, tmp_path: Path) -> None:
    grpo = read_recipe(RECIPES[name]).grpo
    assert (grpo.loss_type, grpo.beta, grpo.epsilon, grpo.epsilon_high) == ("dapo", 0.0, 0.2, 0.28)
    assert (grpo.temperature, grpo.top_p, grpo.top_k, grpo.min_p) == (1.0, 1.0, 0, 0.0)
    assert grpo.mask_truncated_completions


@pytest.mark.parametrize(
    ("name", "model", "rank", "alpha", "tokens", "completions", "steps"),
    [
        ("smollm2-135m-gsm8k", "HuggingFaceTB/SmolLM2-135M-Instruct", 32, 32, 512, 8, 250),
        ("smollm2-135m-gym", "HuggingFaceTB/SmolLM2-135M-Instruct", 32, 32, 384, 8, 250),
        ("qwen2.5-3b-gym", "Qwen/Qwen2.5-3B-Instruct", 64, 64, 1280, 8, 250),
        ("gemma3-1b-gsm8k", "google/gemma-3-1b-it", 32, 32, 1024, 8, 250),
        ("gemma3-4b-gsm8k", "google/gemma-3-4b-it", 32, 32, 1024, 8, 250),
        ("qwen3-1.7b-dapo", "unsloth/Qwen3-1.7B-Base", 32, 64, 2048, 16, 500),
        ("qwen2.5-3b-gsm8k", "Qwen/Qwen2.5-3B-Instruct", 64, 64, 1024, 8, 250),
        ("llama3.1-8b-gsm8k", "meta-llama/Llama-3.1-8B-Instruct", 32, 32, 512, 6, 250),
        ("phi4-14b-gsm8k", "unsloth/Phi-4", 16, 16, 512, 8, 250),
    ],
)
def test_a_recipe_for_a_gpu_is_the_run_it_is_named_after(
    name: str, model: str, rank: int, alpha: int, tokens: int, completions: int, steps: int, tmp_path: Path
) -> None:
    recipe = read_recipe(RECIPES[name])
    assert recipe.model.name == model
    assert (recipe.lora.rank, recipe.lora.alpha) == (rank, alpha)
    assert recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens == tokens
    assert (recipe.grpo.completions_per_prompt, recipe.grpo.steps) == (completions, steps)


# Every recipe's data


NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ida", "Jon"]
THINGS = ["apples", "bolts", "cards", "discs", "eggs", "forks", "gears", "hats", "inks", "jars"]


def gsm8k(folder: Path) -> Path:
    """Write a small train and test set as GSM8K has them."""
    folder.mkdir(parents=True)
    for name, start, stop in (("train", 0, 80), ("test", 80, 90)):
        lines = []
        for i in range(start, stop):
            total = 1000 + 37 * i
            question = (
                f"{NAMES[i % 10]} has {i * 7 + 3} {THINGS[i // 10]} and gets {total - i * 7 - 3} more from "
                f"{NAMES[(i + 3) % 10]}. How many {THINGS[i // 10]} are there now?"
            )
            worked = f"{i * 7 + 3} + {total - i * 7 - 3} = <<{i * 7 + 3}+{total - i * 7 - 3}={total}>>{total:,}"
            lines.append(json.dumps({"question": question, "answer": f"{worked}\n#### {total:,}"}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def dapo(folder: Path) -> Path:
    """Write 100 rows with the columns of the published dataset, laid out as on the hub."""
    import pyarrow
    from pyarrow import parquet

    sample = parquet.read_table(DATA / "dapo" / "en" / "train-00000-of-00001.parquet")
    row = sample.to_pylist()[0]
    rows = [row | {"prompt": f"Compute ${i * 31} + {i * i * 17 + 5}$.", "solution": str(48 * i)} for i in range(100)]
    (folder / "en").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, sample.schema), folder / "en" / "train-00000-of-00001.parquet")
    return folder


def base_model(folder: Path) -> Path:
    """Write an artifact base-model/ as far as prepare-data reads it: problems and a tokenizer."""
    with write_artifact(folder, "base-model", {}, {}) as run:
        (run.folder / "model").mkdir()
        (run.folder / "problems").mkdir()
        (run.folder / "model" / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
        texts = [row["prompt"][1]["content"] + row["completion"][0]["content"] for row in tiny_models.rows(300, seed=4)]
        texts += [formats.get("xml").system_prompt, *NAMES, *THINGS]
        tiny_models.sentencepiece_tokenizer(run.folder / "model", texts)
        for name, seed in (("train", 1), ("eval", 2)):
            with (run.folder / "problems" / f"{name}.jsonl").open("w") as file:
                for row in tiny_models.rows(40, seed):
                    problem = {"question": row["prompt"][1]["content"], "answer": row["answer"], "solution": "I add."}
                    file.write(json.dumps(problem) + "\n")
    return folder


def tokenizer(name: str, folder: Path) -> Path:
    """Write the tokenizer of a recipe's family, with a configuration that makes the folder a model's."""
    family = family_models.FAMILIES[FAMILIES[name]]
    folder.mkdir()
    family.tokenizer(folder, family.template, family.end)
    config = {
        "architectures": [f"{family.network.removesuffix('Text')}ForCausalLM"],
        "model_type": re.sub("Text$", "_text", family.network).lower(),
    }
    (folder / "config.json").write_text(json.dumps(config))
    micro.write_weights(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_prepares_its_data_from_local_copies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There is a tokenizer here and no model: whether llama.cpp knows it, test_families.py asks.
    monkeypatch.setattr(prepare_data, "check_tokenizer", lambda *_: None)
    monkeypatch.setattr(prepare_data, "rehearse_beside", lambda *_: {"base": 1.0, "adapter": 0.0, "gguf": 0.0})
    local = {
        "openai/gsm8k": gsm8k(tmp_path / "gsm8k"),
        "open-r1/DAPO-Math-17k-Processed": dapo(tmp_path / "dapo"),
        "unsloth/OpenMathReasoning-mini": DATA / "openmath",
        "base-model": "base-model",
        GYM: GYM,
    }
    tables = read_tables(name)
    arguments = []
    if tables["model"]["name"] == "base-model":
        arguments = ["--base-model", str(base_model(tmp_path / "base-model"))]
        tables["data"]["max_prompt_tokens"] = tables["sft"]["max_tokens"] = 1000  # this one's tokenizer has seen little
        tables["ollama"]["num_ctx"] = 2048
    else:
        tables["model"] |= {"name": str(tokenizer(name, tmp_path / "model")), "revision": ""}
    for source in tables["data"]["sources"]:
        source |= {"name": str(local[source["name"]]), "revision": ""}
    tables["merge"]["prompts"] = tables["gguf"]["prompts"] = 1  # the copies are small
    recipe = write_tables(tmp_path / f"{name}.toml", tables)

    out = tmp_path / "prepare-data"
    result = CliRunner().invoke(prepare_data.main, ["--recipe", str(recipe), "--out", str(out), *arguments])
    assert result.exit_code == 0, result.output
    rows = {kind: [json.loads(line) for line in (out / f"{kind}.jsonl").open()] for kind in ("sft", "grpo", "eval")}
    answer_format = formats.get(tables["format"]["name"])
    taught = [answer_format.read(row["completion"][0]["content"]).answer for row in rows["sft"]]
    assert taught == [shown_answer(row["kind"], row["answer"]) for row in rows["sft"]]
    assert {kind: len(found) > 0 for kind, found in rows.items()} == {"sft": True, "grpo": True, "eval": True}
    assert not {row["id"] for row in rows["eval"]} & {row["id"] for row in rows["sft"] + rows["grpo"]}


GINA = "Gina has 22 apples and gets 11 more. How many apples has Gina now?"
DAN = "Dan has 60 apples and gets 34 more. How many apples has Dan now?"


def page_example(number: int, folder: Path) -> dict[str, Any]:
    """Return the tables of example `number` of docs/recipes.md; write its file, with 400 more rows, into data/."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    section = page[page.index("### Choices, formulas and tasks") : page.index("## Sources")]
    quiz, formulas, both, gym = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    rows, lines = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)[0] for kind in ("csv", "jsonl"))
    for i in range(400):
        name, thing, right = NAMES[i % 10], THINGS[i // 40], 50 + 3 * i
        rows += f"{name} puts {i + 2} {thing} beside {right - i - 2} others. How many?,{i},{right},1,2,B,I add {i}.\n"
        problem = f"{name} adds ${i + 1}x$ and ${i + 2}y$ for {thing}."
        lines += json.dumps({"problem": problem, "solution": f"So \\boxed{{{i + 1}x + {i + 2}y}}."}) + "\n"
    (folder / "data").mkdir()
    (folder / "data" / "quiz.csv").write_text(rows)
    (folder / "data" / "math.jsonl").write_text(lines)
    tables = read_tables("tiny-gym" if number == 2 else "tiny")
    tables["data"]["sources"] = tomllib.loads((quiz, formulas, gym)[number])["data"]["sources"]
    for name, table in tomllib.loads(both).items() if number < 2 else ():
        tables[name] |= table
    return tables


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "kind", "expected"),
    [
        (
            0,
            "choice",
            {
                f"{GINA}\nA) 32\nB) 11\nC) 34\nD) 33": "D) 33",
                f"{DAN}\nA) 93\nB) 94\nC) 95\nD) 26": "B) 94",
            },
        ),
        (
            1,
            "math",
            {"Solve $5x + 22 = 32$ for $x$.": "2", "Add $\\frac{1}{2}$ and $\\frac{1}{3}$.": "\\frac{5}{6}"},
        ),
        (2, "scored scorer=reasoning_gym", {}),
    ],
)
def test_the_examples_of_the_page_on_recipes_prepare_their_data(
    number: int, kind: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "check_tokenizer", lambda *_: None)  # as above
    monkeypatch.setattr(prepare_data, "rehearse_beside", lambda *_: {"base": 1.0, "adapter": 0.0, "gguf": 0.0})
    monkeypatch.chdir(tmp_path)
    tables = page_example(number, tmp_path)
    tables["data"]["max_prompt_tokens"] = tables["sft"]["max_tokens"] = 1000  # this tokenizer has seen little
    tables["ollama"]["num_ctx"] = 2048
    recipe = write_tables(tmp_path / "example.toml", tables)
    model, out = base_model(tmp_path / "base-model"), tmp_path / "prepare-data"
    arguments = ["--recipe", str(recipe), "--out", str(out), "--base-model", str(model)]
    result = CliRunner().invoke(prepare_data.main, arguments)
    assert result.exit_code == 0, result.output
    rows = {name: [json.loads(line) for line in (out / f"{name}.jsonl").open()] for name in ("sft", "grpo", "eval")}
    everywhere = [row for found in rows.values() for row in found]
    assert {row["kind"] for row in everywhere} == {kind}
    answers = {row["prompt"][1]["content"]: row["answer"] for row in everywhere}
    assert {question: answers.get(question) for question in expected} == expected
    assert min(map(len, rows.values())) >= 20
    assert not {row["id"] for row in rows["eval"]} & {row["id"] for row in rows["sft"] + rows["grpo"]}
    read = formats.get("xml").read
    taught = [read(row["completion"][0]["content"]).answer for row in rows["sft"]]
    assert taught == [shown_answer(kind, row["answer"]) for row in rows["sft"]]
    rewards = {reward.__name__: reward for reward in load_rewards(read_recipe(recipe))}
    right = rewards["reasoning_gym" if number == 2 else "correctness"]
    columns = {key: [row[key] for row in rows["sft"]] for key in ("answer", "kind")}
    assert set(right([row["completion"] for row in rows["sft"]], **columns)) == {1.0 if number == 2 else 2.0}


# What is refused


def refusal(folder: Path, text: str) -> str:
    """Return the message that reading `text` as a recipe ends with, less the file it names first."""
    path = folder / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_recipe(path)
    assert refused.value.message.startswith(f"{path}: ")
    assert refused.value.exit_code == 1
    return refused.value.message.removeprefix(f"{path}: ")


def changed(old: str, new: str) -> str:
    """Return the tiny recipe with the first `old` replaced."""
    assert old in TINY, f"recipes/tiny.toml has no {old!r}"
    return TINY.replace(old, new, 1)


def without(table: str) -> str:
    """Return the tiny recipe less one table."""
    return "\n[".join(part for part in TINY.split("\n[") if not re.match(rf"\[?{table}[].]", part))


LORA_KEYS = "known: alpha, dropout, rank, target_modules"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 16", "rnak = 16", f"[lora] rnak is not known (did you mean 'rank'?); {LORA_KEYS}"),
        ("rank = 16", "rank = 16\nRank = 16", f"[lora] Rank is not known (did you mean 'rank'?); {LORA_KEYS}"),
        ("rank = 16", "rank = 16\nx9 = 1", f"[lora] x9 is not known; {LORA_KEYS}"),
        (
            "[format]\n", '[format]\nsystem_promt = "Hi"\n',
            "[format] system_promt is not known (did you mean 'system_prompt'?); known: name, system_prompt, "
            "template_kwargs",
        ),
        ("rank = 16\n", "", "[lora] rank is missing"),
        ('question = "question"\n', "", "[data.sources] question is missing"),
        ("rank = 16", 'rank = "16"', "[lora] rank = '16'; expected int, found str"),
        ("rank = 16", "rank = 16.0", "[lora] rank = 16.0; expected int, found float"),
        ("rank = 16", "rank = true", "[lora] rank = True; expected int, found bool"),
        ("dropout = 0.0", "dropout = false", "[lora] dropout = False; expected float, found bool"),
        ("packing = false", "packing = 0", "[sft] packing = 0; expected bool, found int"),
        ('["all-linear"]', '"all-linear"', "[lora] target_modules = 'all-linear'; expected a list"),
        ("weights = [1.0,", 'weights = ["1",', "[rewards] weights, item 1 = '1'; expected float, found str"),
        (
            'use = ["sft", "grpo"]', 'use = ["sft", "grop"]',
            "[data.sources] use, item 2 = 'grop'; expected one of sft, grpo, eval (did you mean 'grpo'?)",
        ),
        (
            'engine = "trl"', 'engine = "trt"',
            "[model] engine = 'trt'; expected one of trl, unsloth (did you mean 'trl'?)",
        ),
        ('engine = "trl"', "engine = 3", "[model] engine = 3; expected one of trl, unsloth"),
        (
            'loss_type = "dapo"', 'loss_type = "DAPO"',
            "[grpo] loss_type = 'DAPO'; expected one of grpo, bnpo, dr_grpo, dapo",
        ),
        (
            'optimizer = "adamw_torch"', 'optimizer = "adamw"',
            "[sft] optimizer = 'adamw'; expected one of adamw_torch, adamw_torch_fused, adafactor, adagrad, rmsprop, "
            "sgd, adamw_8bit, adamw_bnb_8bit, lion_32bit, lion_8bit, paged_adamw_32bit, paged_adamw_8bit, "
            "paged_lion_32bit, paged_lion_8bit (did you mean 'adamw_8bit'?)",
        ),
        (
            'dtype = "float16"', 'dtype = "float32"',
            "[merge] dtype = 'float32'; expected one of bfloat16, float16 (did you mean 'float16'?)",
        ),
    ],
)  # fmt: skip
def test_a_slip_in_one_table_is_refused_by_key_and_nearest_match(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert refusal(tmp_path, changed(old, new)) == message


def test_an_unknown_table_is_refused_with_its_nearest_match(tmp_path: Path) -> None:
    found = refusal(tmp_path, TINY.replace("[lora]", "[laro]"))
    assert found.startswith("[laro] is not known (did you mean 'lora'?); known: base_model, data, format, ")


@pytest.mark.parametrize(
    "table", ["model", "format", "lora", "sft", "rewards", "grpo", "infer", "merge", "gguf", "ollama"]
)
def test_a_table_that_is_not_there_is_missed(table: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, without(table)) == f"[{table}] is missing"


def test_a_value_where_a_table_belongs_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, 'format = "xml"\n' + without("format")) == "[format] = 'xml'; expected a table [format]"


@pytest.mark.parametrize(
    ("where", "name", "revision"),
    [
        ("[model]", "google/gemma-3-1b-it", ""),
        ("[model]", "google/gemma-3-1b-it", "main"),
        ("[model]", "google/gemma-3-1b-it", "dcc83ea841ab"),
        ("[model]", "google/gemma-3-1b-it", "DCC83EA841AB6100D6B47A070329E1BA4CF78752"),
        ("[model]", "google/gemma-3-1b-it", "dcc83ea841ab6100d6b47a070329e1ba4cf787522"),
        ("[model]", "folder/misspelt", ""),
        ("[[data.sources]]", "openai/gsm8k", "main"),
        ("[[data.sources]]", "openai/gsm8k", "refs/convert/parquet"),
    ],
)
def test_what_is_fetched_from_the_hub_without_a_whole_commit_is_refused(
    where: str, name: str, revision: str, tmp_path: Path
) -> None:
    start = TINY.index(where)
    named = TINY[start:].replace('name = "base-model"', f'name = "{name}"\nrevision = "{revision}"', 1)
    assert refusal(tmp_path, TINY[:start] + named) == (
        f"{where} name = '{name}' is fetched from the hub, so revision must be a commit (40 hex digits); "
        f"found '{revision}'"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weights = [1.0, ", "weights = [", "[rewards] has 5 functions and 4 weights"),
        (
            "weights = [1.0, 1.0, 1.0, 1.0, 1.0]", "weights = [0, 0.0, 0, 0, 0]",
            "[rewards] weights = [0.0, 0.0, 0.0, 0.0, 0.0]; expected one or more that are not 0",
        ),
        (
            'functions = ["xmlcount", "soft_format", "strict_format", "int", "correctness"]', "functions = []",
            "[rewards] functions = []; expected one or more",
        ),
        ('"correctness"]', '"int"]', "[rewards] 'int': another reward is already logged as 'int'; rename one"),
        (
            'target_modules = ["all-linear"]', "target_modules = []",
            '[lora] target_modules = []; expected module names, or ["all-linear"]',
        ),
        (
            "hidden_size = 256 ", "hidden_size = 260 ",
            "[base_model] hidden_size = 260; expected a multiple of 2 x attention_heads = 8",
        ),
        (
            "key_value_heads = 2", "key_value_heads = 3",
            "[base_model] attention_heads = 4 is not a multiple of key_value_heads = 3",
        ),
        (
            "num_ctx = 1024", "num_ctx = 255",
            "[ollama] num_ctx = 255; expected 256 or more: [data] max_prompt_tokens = 192 and [grpo] "
            "max_completion_tokens = 64 together",
        ),
        (
            "micro_batch_size = 8", "micro_batch_size = 3",
            "[sft] batch_size = 8 is not a multiple of micro_batch_size = 3",
        ),
        (
            "micro_batch_size = 8", "micro_batch_size = 0",
            "[sft] micro_batch_size = 0; expected 1 or more",
        ),
        (
            "micro_batch_size = 64", "micro_batch_size = 48",
            "[grpo] prompts_per_step x completions_per_prompt = 64 is not a multiple of micro_batch_size = 48",
        ),
        (
            "completions_per_prompt = 8", "completions_per_prompt = 2",
            "[grpo] prompts_per_step x completions_per_prompt = 16 is not a multiple of micro_batch_size = 64",
        ),
        (
            "prompts_per_step = 8", "prompts_per_step = 8\nsampled_prompts = 7",
            "[grpo] sampled_prompts = 7; expected at least prompts_per_step = 8, out of which a step trains",
        ),
        ("problems = 1000\n", "problems = 1000\nsamples = 8\n",
         "[infer] samples = 8 needs sample_temperature; there is none"),
        ("problems = 1000\n", "problems = 1000\nsamples = 8\nsample_temperature = 1.0\nsample_top_p = 1.0\n",
         "[infer] samples = 8 needs sample_seed; there is none"),
        ("problems = 1000\n", "problems = 1000\nsample_top_p = 0.5\n",
         "[infer] sample_top_p = 0.5 goes with samples, such as 8; found samples = 0"),
        (
            "prompts_per_step = 8", "prompts_per_step = 8\nevaluate_steps = 10",
            "[grpo] evaluate_steps = 10 needs problems: state [data] validation_rows, such as 200",
        ),
        (
            "prompts_per_step = 8", 'prompts_per_step = 8\nkeep = "best"',
            "[grpo] keep = 'best' goes by evaluations: state evaluate_steps, such as 10",
        ),
        (
            "prompts_per_step = 8", 'prompts_per_step = 8\nkeep = "first"',
            "[grpo] keep = 'first'; expected one of last, best",
        ),
        ("max_prompt_tokens = 192", "max_prompt_tokens = 192\nvalidation_rows = -1",
         "[data] validation_rows = -1; expected 0 or more"),
        ("log_steps = 10\n", "log_steps = 501\n", "[sft] log_steps = 501; expected at most steps = 500"),
        ("log_steps = 10\n", "log_steps = 0\n", "[sft] log_steps = 0; expected 1 or more"),
        ("save_steps = 100", "save_steps = 0", "[sft] save_steps = 0; expected 1 or more"),
        (
            'types = ["f16", "q8_0", "q5_k_m", "q4_k_m"]', "types = []",
            "[gguf] types = []; expected one or more, each once",
        ),
        (
            'types = ["f16", "q8_0", "q5_k_m", "q4_k_m"]', 'types = ["q8_0", "Q8_0"]',
            "[gguf] types = ['q8_0', 'Q8_0']; expected one or more, each once",
        ),
        (
            'quantization = "q8_0"', 'quantization = "q6_k"',
            "[ollama] quantization = 'q6_k' is not among [gguf] types ['f16', 'q8_0', 'q5_k_m', 'q4_k_m']",
        ),
        ("max_prompt_tokens = 192", "max_prompt_tokens = 0", "[data] max_prompt_tokens = 0; expected 1 or more"),
        ('save = ["merged_16bit", "lora", "gguf"]\n', "", "save is missing"),
        ('save = ["merged_16bit", "lora", "gguf"]', 'save = "gguf"', "save = 'gguf'; expected a list"),
        ('save = ["merged_16bit", "lora", "gguf"]', "save = []", "save = []; expected one or more, each once"),
        (
            'save = ["merged_16bit", "lora", "gguf"]', 'save = ["gguf", "gguf"]',
            "save = ['gguf', 'gguf']; expected one or more, each once",
        ),
        (
            'save = ["merged_16bit", "lora", "gguf"]', 'save = ["merged_16bits"]',
            "save, item 1 = 'merged_16bits'; expected one of merged_16bit, merged_4bit, lora, gguf (did you mean "
            "'merged_16bit'?)",
        ),
        (
            'name = "xml"', 'name = "xlm"',
            "[format] name: unknown answer format 'xlm' (did you mean 'xml'?); known: think, xml",
        ),
        (
            '"correctness"]', '"corectness"]',
            "[rewards] 'corectness' is not known (did you mean 'correctness'?); known: xmlcount, soft_format, "
            "strict_format, int, correctness, math_correct, python_tests, reasoning_gym, length_penalty, "
            "repetition_penalty, or your own as 'FILE.py:FUNCTION'",
        ),
        (
            '"correctness"]', '"check_answer"]',
            "[rewards] 'check_answer' is of suite 'think', but [format] name = 'xml'; its own: xmlcount, soft_format, "
            "strict_format, int, correctness, math_correct, python_tests, reasoning_gym, length_penalty, "
            "repetition_penalty",
        ),
        ('"correctness"]', '"length_penalty"]', "[rewards] length_cache_tokens is missing: length_penalty needs it"),
        (
            '"correctness"]', '"own.py"]',
            "[rewards] 'own.py': expected 'FILE.py:FUNCTION', the file relative to the recipe",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, changed(old, new)) == message


def with_value(table: str, key: str, value: str) -> str:
    """Return the tiny recipe with another value for a key, or with a key that it leaves to its default."""
    head, _, rest = TINY.partition(f"[{table}]\n")
    inside, start, after = rest.partition("\n[")
    line = f"{key} = {value}"
    inside, found = re.subn(rf"^{key} = .*$", lambda _: line, inside, flags=re.MULTILINE)
    return f"{head}[{table}]\n" + ("" if found else f"{line}\n") + inside + start + after


@pytest.mark.parametrize(
    ("table", "key", "value", "expected"),
    [
        ("base_model", "seed", -1, "0 to 4294967295"),
        ("base_model", "drill_share", 1.0, "0 or more and under 1"),
        ("base_model", "working_share", 1.5, "0 to 1"),
        ("base_model", "vocabulary_size", 326, "327 or more"),
        ("base_model", "steps", 0, "1 or more"),
        ("base_model", "layers", 0, "1 or more"),
        ("base_model", "attention_heads", 0, "1 or more"),
        ("lora", "rank", 0, "1 or more"),
        ("lora", "alpha", 0, "1 or more"),
        ("lora", "dropout", 1.0, "0 or more and under 1"),
        ("sft", "steps", 0, "1 or more"),
        ("sft", "max_tokens", 1, "2 or more"),
        ("sft", "learning_rate", 0.0, "over 0"),
        ("sft", "adam_beta2", 1.0, "0 or more and under 1"),
        ("grpo", "seed", 2**32, "0 to 4294967295"),
        ("grpo", "steps", 0, "1 or more"),
        ("grpo", "prompts_per_step", 0, "1 or more"),
        ("grpo", "num_iterations", 0, "1 or more"),
        ("grpo", "max_completion_tokens", 0, "1 or more"),
        ("grpo", "temperature", 0.0, "over 0"),
        ("grpo", "top_p", 0.0, "over 0 and at most 1"),
        ("grpo", "top_k", -1, "0 or more"),
        ("grpo", "min_p", 1.5, "0 to 1"),
        ("grpo", "repetition_penalty", 0.0, "over 0"),
        ("grpo", "beta", -0.1, "0 or more"),
        ("grpo", "epsilon", 1.0, "over 0 and under 1"),
        ("grpo", "epsilon_high", 0.0, "over 0"),
        ("grpo", "warmup_steps", -1, "0 or more"),
        ("grpo", "weight_decay", -0.1, "0 or more"),
        ("grpo", "max_grad_norm", -1.0, "0 or more"),
        ("grpo", "show_completions_steps", 0, "1 or more"),
        ("score_base", "seed", -1, "0 to 4294967295"),
        ("infer", "problems", 0, "1 or more"),
        ("infer", "batch_size", 0, "1 or more"),
        ("infer", "max_completion_tokens", 0, "1 or more"),
        ("merge", "prompts", 0, "1 or more"),
        ("merge", "positions_per_prompt", 1, "2 or more"),
        ("merge", "max_mean_kl", 0.0, "over 0"),
        ("gguf", "prompts", 0, "1 or more"),
        ("gguf", "positions_per_prompt", 1, "2 or more"),
        ("gguf", "importance_prompts", -1, "0 or more"),
        ("gguf", "max_lost_ends", -1, "0 or more"),
        ("gguf.max_mean_kl", "q8_0", 0.0, "over 0"),
        ("ollama", "num_ctx", 0, "1 or more"),
        ("ollama", "temperature", -0.1, "0 or more"),
        ("ollama", "top_p", 1.1, "over 0 and at most 1"),
        ("ollama", "top_k", -1, "0 or more"),
        ("ollama", "min_p", -0.1, "0 to 1"),
        ("ollama", "repeat_penalty", 0.0, "over 0"),
    ],
)
def test_a_number_out_of_bounds_is_refused(table: str, key: str, value: float, expected: str, tmp_path: Path) -> None:
    found = refusal(tmp_path, with_value(table, key, str(value)))
    assert found == f"[{table}] {key} = {value}; expected {expected}"


def numbers(kind: type, where: str) -> Iterator[tuple[str, str]]:
    """Yield every number that a table holds, by its dotted name, with the words of its bound, "" where it has none."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for each in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(each):
                yield from numbers(each, f"{where}{name}.")
            elif each in (int, float) and typing.get_origin(hint) is not typing.Annotated:
                yield f"{where}{name}", ""
            elif typing.get_origin(each) is typing.Annotated:
                yield f"{where}{name}", each.__metadata__[0].words


def test_every_number_of_a_recipe_has_a_bound_or_is_checked_beside_others() -> None:
    bounds = list(numbers(Recipe, ""))
    assert len(bounds) == len(dict(bounds)) > 90
    assert sorted(name for name, words in bounds if not words) == [
        "data.sources.max_rows", "data.sources.shares", "grpo.min_completion_tokens", "rewards.length_cache_tokens",
        "rewards.repetition_max_penalty", "rewards.repetition_ngram_tokens", "rewards.weights",
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1" + 400 * "0"])
@pytest.mark.parametrize(
    ("table", "key", "spelled"),
    [
        ("grpo", "temperature", "[grpo] temperature"),
        ("ollama", "temperature", "[ollama] temperature"),
        ("gguf.max_mean_kl", "q8_0", "[gguf.max_mean_kl] q8_0"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(table: str, key: str, spelled: str, value: str, tmp_path: Path) -> None:
    found = refusal(tmp_path, with_value(table, key, value))
    assert found == f"{spelled} = {float(value)}; expected a finite number"


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    found = refusal(tmp_path, changed("weights = [1.0, ", "weights = [nan, "))
    assert found == "[rewards] weights, item 1 = nan; expected a finite number"


@pytest.mark.parametrize("name", ["iq3_xs", "IQ2_M", "q2_k_s", "iq1_s"])
def test_a_type_that_needs_an_importance_matrix_is_refused_without_one(name: str, tmp_path: Path) -> None:
    types = changed('"q4_k_m"]', f'"{name}"]')
    assert refusal(tmp_path, types) == (
        "[gguf] importance_prompts = 0; expected 1 or more: without an importance matrix llama.cpp does not make "
        f"{name}"
    )
    (tmp_path / "mine.toml").write_text(types.replace("[gguf]\n", "[gguf]\nimportance_prompts = 50\n"))
    assert read_recipe(tmp_path / "mine.toml").gguf.types[-1] == name


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("format", "system_prompt", "Be\u00a0brief.", "Modelfile, SYSTEM: holds '\\xa0', which is not printable"),
        ("format", "system_prompt", 'Say """.', 'Modelfile, SYSTEM: holds """, which ends a value there'),
        ("ollama", "license", "MIT\u200b", "Modelfile, LICENSE: holds '\\u200b', which is not printable"),
    ],
)
def test_a_text_that_no_modelfile_can_hold_is_refused(
    table: str, key: str, value: str, message: str, tmp_path: Path
) -> None:
    found = refusal(tmp_path, with_value(table, key, json.dumps(value)))
    assert found.startswith(f"[{table}] {key}: {message}")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ("{messages = 1}", "'messages' is none of the template's own variables, such as enable_thinking"),
        ('{"enable thinking" = true}', "'enable thinking' is none of the template's own variables"),
        ('{"x = 1 %}{{ bos_token }}{% set y" = 1}', "'x = 1 %}{{ bos_token }}{% set y' is none of the template's own"),
        ('{effort = "high\\n"}', "effort = 'high\\n'; expected one line of printable characters"),
    ],
)
def test_a_variable_that_no_chat_template_can_set_is_refused(kwargs: str, message: str, tmp_path: Path) -> None:
    found = refusal(tmp_path, changed("[format]\n", f"[format]\ntemplate_kwargs = {kwargs}\n"))
    assert found.startswith(f"[format] template_kwargs: {message}")


def test_a_variable_of_the_chat_template_is_a_truth_value_a_whole_number_or_a_text(tmp_path: Path) -> None:
    found = refusal(tmp_path, changed("[format]\n", "[format]\ntemplate_kwargs = {effort = 0.5}\n"))
    assert found == "[format.template_kwargs] effort = 0.5; expected one of bool, int, str; found float"


def test_a_key_that_came_later_is_in_the_identity_only_where_it_is_set(tmp_path: Path) -> None:
    def format_table(line: str) -> dict:
        (tmp_path / "mine.toml").write_text(changed("[format]\n", f"[format]\n{line}\n"))
        return read_recipe(tmp_path / "mine.toml").tables("format")["format"]

    assert set(format_table("")) == {"name", "system_prompt"}
    kwargs = {"enable_thinking": False, "effort": "high"}
    assert format_table('template_kwargs = {enable_thinking = false, effort = "high"}')["template_kwargs"] == kwargs


@pytest.mark.parametrize("key", ["question", "answer"])
def test_a_source_without_the_name_of_a_column_is_refused(key: str, tmp_path: Path) -> None:
    found = refusal(tmp_path, changed(f'{key} = "{key}"', f'{key} = ""'))
    assert found == f"[[data.sources]] 'base-model' {key} = ''; expected the name of a column"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ('answers = "numbers"', "answers = 'numbers'; expected "),
        ('answers = "scored"', "'base-model' scorer = ''; expected one of: reasoning_gym"),
        ('answers = "scored"\nscorer = "mine"', "'base-model' scorer = 'mine'; expected one of: reasoning_gym"),
        ('scorer = "mine"', "'base-model' scorer = 'mine' goes with answers = 'scored'; found 'number'"),
        ('answers = "text"\ndecimal = ","', "'base-model' decimal = ',' goes with answers = 'number'; found 'text'"),
        ('decimal = ";"', "decimal = ';'; expected "),
        ("tolerance = 1.0", "tolerance = 1.0; expected 0 or more and under 1"),
        ("tolerance = -0.1", "tolerance = -0.1; expected 0 or more and under 1"),
    ],
)
def test_a_kind_of_answers_that_is_not_known_or_misses_its_settings_is_refused(
    stated: str, message: str, tmp_path: Path
) -> None:
    found = refusal(tmp_path, changed('answer = "answer"', f'answer = "answer"\n{stated}'))
    assert "data.sources]" in found
    assert message in found


@pytest.mark.parametrize("tokens", [0, 65])
def test_a_least_completion_that_no_rung_could_have_is_refused(tokens: int, tmp_path: Path) -> None:
    text = changed("max_completion_tokens = 64\n", f"max_completion_tokens = 64\nmin_completion_tokens = {tokens}\n")
    assert refusal(tmp_path, text).startswith(f"[grpo] min_completion_tokens = {tokens}; expected at least [rewards]")


def test_an_own_reward_whose_file_is_not_there_is_refused(tmp_path: Path) -> None:
    found = refusal(tmp_path, changed('"correctness"]', '"own.py:mine"]'))
    assert found == f"[rewards] 'own.py:mine': there is no file {(tmp_path / 'own.py').resolve()}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def variety(completions): ...\n",
            "{path} has no function 'varieti' (did you mean 'variety'?); it has: variety",
        ),
        ("def varieti(completions:\n", "{path}, line 1: SyntaxError: '(' was never closed"),
    ],
)
def test_an_own_reward_that_its_file_does_not_have_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(source)
    found = refusal(tmp_path, changed('"correctness"]', '"own.py:varieti"]'))
    assert found == "[rewards] 'own.py:varieti': " + message.format(path=(tmp_path / "own.py").resolve())


def test_an_own_reward_is_not_run_when_the_recipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit(9)\ndef mine(completions): ...\n")
    (tmp_path / "mine.toml").write_text(changed('"correctness"]', '"own.py:mine"]'))
    assert read_recipe(tmp_path / "mine.toml").rewards.functions[-1] == "own.py:mine"


UNSLOTH = TINY.replace('engine = "trl"', 'engine = "unsloth"').replace('dtype = "float32"', 'dtype = "bfloat16"')
UNSLOTH += "\n[vllm]\nmemory_share = 0.5\nsequences = 64\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (UNSLOTH.partition("[vllm]")[0], "needs a .vllm. table; there is none"),
        (UNSLOTH.replace("= 0.5\nseq", "= 1.5\nseq"), r"^\[vllm\] memory_share = 1.5; expected over 0 and under 1$"),
        (UNSLOTH.replace("sequences = 64", "sequences = 0"), r"^\[vllm\] sequences = 0; expected 1 or more$"),
        (UNSLOTH.replace('"dapo"', '"dr_grpo"'), "'group' with loss_type = 'dr_grpo': engine 'unsloth'"),
        (UNSLOTH.replace('"bfloat16"', '"float32"', 1), "dtype = 'float32' with engine = 'unsloth'; exp"),
        (UNSLOTH + "[health]\nmin_entropy = 0.1\n", "max_entropy: engine 'unsloth' measures no entropy"),
        (UNSLOTH.replace("rank = 16", "rank = 640"), "rank = 640; vLLM takes at most 512"),
        (TINY.replace('engine = "trl"', 'engine = "trl"\nload_in_4bit = true'), "4bit = true needs engine = 'unsloth'"),
    ],
)  # fmt: skip
def test_what_an_engine_can_not_do_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(tmp_path, text))


def test_an_engine_that_was_given_all_it_needs_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(UNSLOTH)
    assert read_recipe(tmp_path / "mine.toml").model.engine == "unsloth"


def test_one_completion_a_prompt_is_no_group(tmp_path: Path) -> None:
    text = TINY.replace("prompts_per_step = 8", "prompts_per_step = 64").replace("per_prompt = 8", "per_prompt = 1")
    assert refusal(tmp_path, text) == (
        "[grpo] completions_per_prompt = 1; expected 2 or more: a reward counts against its group's mean"
    )


def test_an_unknown_quantization_is_refused_with_its_nearest_match(tmp_path: Path) -> None:
    found = refusal(tmp_path, changed('"q4_k_m"]', '"q4_k_mm"]'))
    assert found.startswith("[gguf] types: 'q4_k_mm' is no type of llama.cpp (did you mean 'q4_k_m'?); f32, f16, ")


def test_a_type_that_llama_cpp_does_not_quantize_to_is_refused(tmp_path: Path) -> None:
    found = refusal(tmp_path, changed('"q4_k_m"]', '"nvfp4"]'))
    assert found.startswith("[gguf] types: 'nvfp4' is no type of llama.cpp")


def test_base_model_without_its_table_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, without("base_model")) == (
        "[model] name = 'base-model' asks for a [base_model] table; there is none"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[model\n", "not TOML: Expected ']'"),
        (b'[model]\nname = "\xff"', "not TOML: 'utf-8' codec can't decode byte 0xff"),
        (b"[model]\n[model]\n", "not TOML: Cannot declare ('model',) twice"),
        (b"a = " + b"[" * 100_000, "not TOML: maximum recursion depth exceeded"),
        (b"[sft]\nsteps = " + b"9" * 5000, "not TOML: Exceeds the limit (4300 digits)"),
        (b"a = 1\n" + b"a." * 20_000 + b"a = 1", "line 2 has 20,000 dots; expected at most 200. Break the line"),
        (b"#" * 300_000, "has more than 262,144 bytes; expected a recipe in TOML"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_what_is_not_toml_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_recipe(path)
    assert refused.value.message.startswith(f"{path}: {message}")


def test_a_recipe_without_an_end_is_not_read_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "zeros.toml").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("zeros", "pipe"):
        with pytest.raises(UserError, match=f"{name}.toml: is no file; expected a recipe in TOML"):
            read_recipe(tmp_path / f"{name}.toml")


def test_a_byte_order_mark_of_a_windows_editor_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPES["tiny"].read_bytes())
    assert read_recipe(path).model == read_recipe(RECIPES["tiny"]).model
    asked = [sys.executable, ROOT / "make" / "recipe.py", "base-model", str(path)]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "yes\n"


def test_a_recipe_that_is_not_there_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_recipe(tmp_path / "none.toml")
    assert refused.value.message == f"{tmp_path}/none.toml: there is no such recipe. Run: make help"


@pytest.mark.parametrize("name", ["models/llama", "./llama", "llama"])
def test_a_local_folder_needs_no_revision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(changed('name = "base-model"', f'name = "{name}"'))
    assert read_recipe(tmp_path / "mine.toml").model.name == name


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(changed("temperature = 1.0", "temperature = 1"))
    assert read_recipe(tmp_path / "mine.toml").grpo.temperature == 1.0


def test_keys_that_change_no_result_are_in_no_identity():
    tables = read_recipe(ROOT / "recipes" / "tiny.toml").tables("sft", "grpo")
    assert not {"save_steps", "log_steps", "show_completions_steps"} & {*tables["sft"], *tables["grpo"]}
    assert {"steps", "seed"} <= set(tables["sft"])
    assert {"steps", "min_completion_tokens"} <= set(tables["grpo"])


def test_keys_of_evaluation_are_in_no_identity_where_they_are_at_rest_and_in_it_where_they_are_not(tmp_path):
    tables = read_tables()
    plain = read_recipe(write_tables(tmp_path / "plain.toml", tables)).tables("data", "grpo")
    tables["data"] |= {"validation_rows": 0}
    tables["grpo"] |= {"evaluate_steps": 0, "keep": "last"}
    assert read_recipe(write_tables(tmp_path / "off.toml", tables)).tables("data", "grpo") == plain
    tables["data"] |= {"validation_rows": 200}
    tables["grpo"] |= {"evaluate_steps": 48, "keep": "best"}
    on = read_recipe(write_tables(tmp_path / "on.toml", tables)).tables("data", "grpo")
    assert {key: on["data"][key] for key in on["data"].keys() - plain["data"].keys()} == {"validation_rows": 200}
    added = {key: on["grpo"][key] for key in on["grpo"].keys() - plain["grpo"].keys()}
    assert added == {"evaluate_steps": 48, "keep": "best"}
