"""The model card: what the hub reads of it, what it states, and that nothing in it can break out of its place."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report.card import cell, fence, write
from stages.lib.report.repository import KINDS, File, repositories
from tests.support import uploads

pytestmark = pytest.mark.slow  # writes whole runs and some ninety cards

ALL = repositories("ann/tiny", list(KINDS))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return uploads.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def manifests(run) -> dict:
    return {stage: read_manifest(run / stage, stage) for stage in uploads.STAGES}


@pytest.fixture
def recipe(run) -> Recipe:
    return read_recipe(run / "tiny.toml")


def changed(recipe: Recipe, **tables: dict[str, object]) -> Recipe:
    """Return the recipe with other values in some tables."""
    return dataclasses.replace(
        recipe, **{name: dataclasses.replace(getattr(recipe, name), **values) for name, values in tables.items()}
    )


def with_figures(manifests: dict, stage: str, **figures: object) -> dict:
    """Return the manifests with other figures of one stage."""
    metrics = manifests[stage]["metrics"] | figures
    return manifests | {stage: manifests[stage] | {"metrics": metrics}}


def of_the_hub(recipe: Recipe) -> Recipe:
    """Return the recipe as if its model and data came from the hub."""
    sources = [
        dataclasses.replace(recipe.data.sources[0], name="openai/gsm8k", revision=COMMIT, config="main"),
        dataclasses.replace(recipe.data.sources[1], name="/home/ann/private/exam.jsonl", config=""),
    ]
    model = {"name": "google/gemma-3-1b-it", "revision": COMMIT}
    return dataclasses.replace(changed(recipe, model=model, data={"sources": sources}), base_model=None)


def written(kind: str, recipe: Recipe, manifests: dict, names: dict[str, str] = ALL) -> str:
    files = [File("model.safetensors", b"abc", 3, "ba7816bf" * 8)]
    return write(kind, names, recipe, manifests, files)


def front(kind: str, recipe: Recipe, manifests: dict, names: dict[str, str] = ALL) -> dict:
    """Return the front matter as huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(written(kind, recipe, manifests, names)).data.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_hubs_own_parser_reads_every_card_back(kind, recipe, manifests):
    from huggingface_hub import ModelCard

    text = written(kind, of_the_hub(changed(recipe, ollama={"license": "gemma"})), manifests)
    card = ModelCard(text)
    assert card.data.license == "gemma"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.datasets == ["openai/gsm8k"]
    assert {"temper", "sft", "grpo"} <= set(card.data.tags)
    assert card.text.startswith(f"\n# {ALL[kind].removeprefix('ann/')}\n")
    assert str(card) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "measured"),
    [
        ("merged_16bit", [("accuracy (1319 problems, greedy)", 0.743)]),
        ("lora", [("accuracy (1319 problems, greedy)", 0.743)]),
        (
            "gguf",
            [("accuracy of q4_k_m (200 problems, greedy)", 0.705), ("accuracy of q8_0 (200 problems, greedy)", 0.735)],
        ),
        ("merged_4bit", None),
    ],
)  # fmt: skip
def test_the_index_has_the_accuracies_that_were_measured_on_these_files_and_no_other(kind, measured, recipe, manifests):
    from huggingface_hub import ModelCard

    results = ModelCard(written(kind, recipe, manifests)).data.eval_results
    assert (results and sorted((result.metric_name, result.metric_value) for result in results)) == measured
    assert {result.metric_type for result in results or []} <= {"accuracy"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pushed", "base", "relation"),
    [
        ("merged_16bit", ["merged_16bit", "gguf"], "google/gemma-3-1b-it", "finetune"),
        ("lora", ["merged_16bit", "lora"], "google/gemma-3-1b-it", "adapter"),
        ("gguf", ["merged_16bit", "gguf"], "ann/tiny", "quantized"),
        ("gguf", ["gguf"], "google/gemma-3-1b-it", "finetune"),  # it is no quantization of the base
        ("merged_4bit", ["merged_16bit", "merged_4bit"], "ann/tiny", "quantized"),
    ],
)
def test_the_origin_is_what_the_hub_draws_its_tree_from(kind, pushed, base, relation, recipe, manifests):
    data = front(kind, of_the_hub(recipe), manifests, repositories("ann/tiny", pushed))
    assert (data["base_model"], data["base_model_relation"]) == (base, relation)


def test_a_base_that_is_not_on_the_hub_is_not_named_as_if_it_were(recipe, manifests):
    for kind in ("merged_16bit", "lora"):
        assert not {"base_model", "base_model_relation", "datasets"} & set(front(kind, recipe, manifests))


@pytest.mark.parametrize(
    ("license", "stated"),
    [
        ("", {}),
        ("apache-2.0", {"license": "apache-2.0"}),
        ("qwen-research", {"license": "other", "license_name": "qwen-research"}),
        ("My Own\nText: of *many* lines", {"license": "other", "license_name": "my-own"}),
        ('"evil": [', {"license": "other", "license_name": "evil"}),
    ],
)
def test_a_licence_is_one_the_hub_knows_or_other(license, stated, recipe, manifests):
    data = front("merged_16bit", changed(recipe, ollama={"license": license}), manifests)
    assert {key: value for key, value in data.items() if key.startswith("license")} == stated
    assert ("states none" in written("gguf", changed(recipe, ollama={"license": license}), manifests)) == (not license)


@pytest.mark.parametrize(("configs", "stated"), [(("en", "en"), ["en"]), (("main", "en"), None), (("", ""), None)])
def test_a_language_is_stated_only_where_the_data_names_it(configs, stated, recipe, manifests):
    sources = [dataclasses.replace(each, config=of) for each, of in zip(recipe.data.sources, configs, strict=True)]
    assert front("gguf", changed(recipe, data={"sources": sources}), manifests).get("language") == stated


@pytest.mark.parametrize("kind", KINDS)
def test_the_examination_stands_in_every_card_with_intervals_and_paired_tests(kind, recipe, manifests):
    text = written(kind, recipe, manifests)
    assert "| base | 3.1% | 1.1% to 5.1% | 98.7% | 87.2 | 1.3% | 1,319 |" in text
    assert "| after GRPO | 74.3% | 72.3% to 76.3% | 98.7% | 87.2 | 1.3% | 1,319 |" in text
    assert "- sft to grpo: 655 problems gained, 7 lost (exact McNemar test, p = 2.5e-158)" in text
    assert "| `correctness` | 1 | 0.500 | 0.875 |" in text
    assert "| sft | 7,999 | 2 duplicate, 122 too close to eval |" in text
    assert "| `model.safetensors` | 3 | `" + "ba7816bf" * 8 in text
    assert f"```toml\n{(recipe.path).read_text().strip()}\n```" in text


def test_each_card_states_the_fidelity_of_its_own_files(recipe, manifests):
    gguf = written("gguf", recipe, manifests)
    assert (
        "| q8_0 | 0.1 | 3.5e-04 | 3.5e-03 | 3.5e-02 | 97.21% | 92.5% | 73.5% | 68.5% to 78.5% | 7 / 3 | 198 of 200 |"
    ) in gguf  # fmt: skip
    assert "The merged model answers 74.0% of the prompts (68.0% to 80.0%) rightly" in gguf
    assert "mean KL divergence of 4.6e-07 nats (at most 1.2e-05)" in written("merged_16bit", recipe, manifests)
    four = written("merged_4bit", recipe, manifests)
    assert "mean KL divergence of 3.4e-02 nats (at most 4.6e-01)" in four
    assert "Its accuracy was not measured." in four
    assert "mean KL divergence of 6.7e-05 nats (at most 8.9e-04)" in written("lora", recipe, manifests)


def test_an_adapter_without_a_gguf_is_not_said_to_have_one(recipe, manifests):
    metrics = {key: value for key, value in manifests["gguf"]["metrics"].items() if key != "lora"}
    text = written("lora", recipe, manifests | {"gguf": manifests["gguf"] | {"metrics": metrics}})
    assert "GGUF against the merged model" not in text
    assert "llama-cli" not in text


@pytest.mark.parametrize(
    ("prompted_by", "runs", "said"),
    [
        ("TEMPLATE", True, "The `Modelfile` says the same:"),
        ("the GGUF file", True, "The `Modelfile` says the same:"),
        ("TEMPLATE by PARSER", False, "(`PARSER passthrough`), which `ollama run hf.co/...` does not read:"),
        ("Ollama's own renderer", True, "It was not compared with the prompts of training."),
    ],
)
def test_the_card_says_how_ollama_gets_the_prompts_of_training(prompted_by, runs, said, recipe, manifests):
    text = written("gguf", recipe, with_figures(manifests, "ollama-modelfile", prompted_by=prompted_by))
    assert said in text
    assert ("ollama run hf.co/ann/" in text) == runs
    assert 'resolveChatWrapper(model, {type: "jinjaTemplate"})' in text


def test_a_training_that_ran_short_of_memory_says_so(recipe, manifests):
    rung = {"micro_batch_size": 8, "max_completion_tokens": 64}
    step = {"at_step": 12, "from": rung, "to": rung | {"max_completion_tokens": 32}, "reason": "CUDA out of memory"}
    text = written("gguf", recipe, with_figures(manifests, "grpo", memory_ladder=[step]))
    assert (
        "Memory was short: training went on with other values than the recipe's:\n\n"
        "- grpo, step 12: max_completion_tokens went from 64 to 32\n\n<details>"
    ) in text
    assert "Memory was short" not in written("gguf", recipe, manifests)


@pytest.mark.parametrize(
    "system", ["Think.", 'Say "x"\\n\n\'\'\'\n"""\n  {braces} $HOME `tick`', "```\n````\n# no head", "é\t中"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_python_of_a_card_holds_the_very_system_prompt_and_no_text_ends_its_block(kind, system, recipe, manifests):
    text = written(kind, changed(recipe, format={"system_prompt": system}), manifests)
    blocks = re.findall(r"^(`{3,})(\w*)\n(.*?)^\1$", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks[0][1:] == ("text", system + "\n")
    code = [block for _, language, block in blocks if language == "python"]
    assert len(code) == (1 if kind == "gguf" else 2)
    for block in code:
        (value,) = [
            node.value for node in ast.parse(block).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "system"
        ]  # fmt: skip
        assert ast.literal_eval(value) == system


def test_a_thought_that_the_prompt_begins_is_explained(recipe, manifests):
    text = written("gguf", changed(recipe, format={"name": "think"}), manifests)
    assert "The prompt itself ends with `<think>`." in text
    assert "<think>\nthe reasoning, step by step</think><SOLUTION>42</SOLUTION>" in text


def test_tables_name_no_path_of_this_disk(recipe, manifests):
    text = written("gguf", of_the_hub(recipe), manifests)
    assert "/home/ann" not in text.replace(recipe.path.read_text().strip(), "")
    assert f"| openai/gsm8k | train | {COMMIT} | sft, grpo | 8,123 |" in text
    assert "| exam.jsonl | eval |  | eval | 1,517 |" in text


def test_a_cell_can_not_end_its_table():
    assert cell("x | y\n# z") == "x \\| y # z"


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_of_a_user_ends_a_block_of_code(kind, recipe, manifests, tmp_path):
    (tmp_path / "own.toml").write_text("# x\n```\n# head")
    own = dataclasses.replace(recipe, path=tmp_path / "own.toml")
    own = changed(own, ollama={"license": "x\n````\n# head"}, format={"system_prompt": "x\n```\n# head"})
    card = written(kind, own, manifests)
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?^\1$", "", card)
    assert card.count("# head") - outside.count("# head") >= 4
    assert "# head" not in outside


def test_no_text_of_a_user_ends_a_cell_of_a_table(recipe, manifests):
    evil = "a | b\n# c"
    sources = [dataclasses.replace(each, name=f"/{evil}", split=evil, revision=evil) for each in recipe.data.sources]
    rewards = {"functions": [f"{evil}.py:int"], "weights": [1.0]}
    dropped = {
        "rows": 1,
        "dropped": {evil: 1},
        "prompt_tokens": manifests["prepare-data"]["metrics"]["sets"]["sft"]["prompt_tokens"],
    }
    spoilt = with_figures(manifests, "prepare-data", sets={"sft": dropped})
    where = manifests["sft"]["environment"] | {"packages": {evil: evil}}
    spoilt |= {"sft": manifests["sft"] | {"environment": where}}
    recipe = changed(recipe, data={"sources": sources}, rewards=rewards)
    card = write("gguf", ALL, recipe, spoilt, [File(evil, b"", 0, "0" * 64)])
    tables = re.findall(r"(?m)(?:^\|.*\n)+", card)
    widths = [{len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} for table in tables]
    assert widths == [{8}, {12}, {6}, {4}, {5}, {4}, {3}]
    assert card.count("a \\| b # c") == 6 + 1 + 1 + 2 + 1
    assert "\n# c" not in card


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("a", "```toml\na\n```"),
        ("a\n\n", "```toml\na\n\n```"),
        ("a\n```\nb", "````toml\na\n```\nb\n````"),
        ("`" * 7, "`" * 8 + "toml\n" + "`" * 7 + "\n" + "`" * 8),
    ],
)
def test_a_block_of_code_ends_where_its_text_does(text, block):
    assert fence(text, "toml") == block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["{{ 7 * 191 }}", "{% include 'card.py' %}", "{# gone #}", "{% raw %}", "{{ kinds"])
def test_no_text_of_a_user_is_read_as_a_template(kind, text, run, recipe, manifests, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(f"# {text}")
    sources = [dataclasses.replace(each, split=text, name=f"/data/{text}") for each in recipe.data.sources]
    recipe = changed(recipe, ollama={"license": text}, format={"system_prompt": text}, data={"sources": sources})
    recipe = dataclasses.replace(changed(recipe, model={"name": f"/models/{text}"}), base_model=None, path=own)
    card = written(kind, recipe, manifests)
    shown = {f"```text\n{text}\n```": 2, f"```toml\n# {text}\n```": 1, f"`{text}`, a model from a local folder": 1}
    assert {each: card.count(each) for each in shown} == shown
    assert card.count(f"| {text} | {text} |") == 2
    assert "1337" not in card


def test_a_manifest_that_lacks_a_figure_of_the_card_is_named(recipe, manifests):
    figures = {key: value for key, value in manifests["merge"]["metrics"].items() if key != "parameters"}
    with pytest.raises(UserError, match=r"the manifest of merge: metrics\.parameters is missing; expected int"):
        written("gguf", recipe, manifests | {"merge": manifests["merge"] | {"metrics": figures}})


def test_the_card_says_what_training_in_4_bits_cost_where_that_was_measured(recipe, manifests):
    cost = {"mean_kl": 0.0123, "max_kl": 1.5, "same_top": 0.9512}
    assert "in 4 bits" not in written("merged_16bit", recipe, manifests, {"merged_16bit": "ann/tiny"})
    assert (
        "It was trained on its base in 4 bits (NF4), and merged into the base in 16. As it was in training it has a "
        "mean KL divergence of 1.2e-02 nats (at most 1.5e+00) from the adapter on the 16-bit base, and the same top "
        "token at 95.12%.\n\n## How to prompt it\n"
    ) in written("merged_16bit", recipe, with_figures(manifests, "merge", trained_in_4bit=cost))


def test_sections_are_apart_by_one_blank_line_in_every_card(recipe, manifests):
    for kind in KINDS:
        text = re.sub(r"(?ms)^```toml\n.*?^```\n", "toml\n", written(kind, recipe, manifests))
        assert "\n\n\n" not in text
        assert not re.search(r"[^\n]\n#+ |[^\n]\n```\w|\n```\n[^\n]", text.replace("---\n", "", 1))
        assert text.endswith("of the data apply.\n")


def test_versions_are_said_once_or_stage_by_stage_and_a_dirty_tree_is_said_to_be_one(recipe, manifests):
    def at(stage: str, **changes: object) -> dict:
        return {stage: manifests[stage] | {"environment": manifests[stage]["environment"] | changes}}

    other = {name: at(name, git="a" * 40, gpu=None)[name] for name in uploads.STAGES}
    text = written("gguf", recipe, other)
    assert f"| Temper | {'a' * 40} |" in text
    assert "| GPU | none |" in text
    text = written("gguf", recipe, other | at("grpo", git="b" * 40 + "-dirty", gpu="NVIDIA L4, 550, 24 GB"))
    assert f"{'b' * 40} with changes that were not committed (grpo)" in text
    assert "NVIDIA L4, 550, 24 GB" in text


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_of_the_examination_and_of_fidelity_stands_in_a_manifest(kind, recipe, manifests):
    text = written(kind, recipe, manifests)
    sections = re.findall(
        r"^## (?:Accuracy|Merged|Each|Against|The adapter).*?(?=^## )", text, re.MULTILINE | re.DOTALL
    )
    assert len(sections) == 2
    stated = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", json.dumps(manifests))}
    forms = {form for value in stated for form in forms_of(value)} | {"95", "16", "4", "99", "8", "0"}
    names = r"q8_0|q4_k_m|float16|p99|95%|4-bit|16-bit"
    for number in re.findall(r"\d[\d,.]*(?:e[-+]\d+)?%?", re.sub(names, "", "".join(sections))):
        assert number.rstrip(".,").replace(",", "") in forms, number


def forms_of(value: float) -> set[str]:
    """Return how a card may write a figure."""
    shares = {f"{value:.1%}", f"{value:.2%}"} if abs(value) <= 1 else set()
    return {f"{value:g}", f"{value:.0f}", f"{value:.1f}", f"{value:.1e}", f"{value:.2g}", f"{value / 1e6:.1f}"} | shares
