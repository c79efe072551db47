"""The merge stage, on a tiny model that was trained for it: what it writes and what it refuses."""

import importlib.util
import json

import pytest

from stages import merge
from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError
from stages.lib.jsonl import first_rows
from stages.lib.model import fold
from stages.lib.model.files import weight_shapes
from stages.lib.recipe.tables import Merge
from stages.lib.report.figures import MergeFigures, figures_of
from tests.support import tiny_models


@pytest.mark.torch
def test_the_stage_writes_16_bit_safetensors_with_every_tokenizer_file():
    model = tiny_models.merged() / "model"
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
            "tokenizer_config.json", "chat_template.jinja"} <= names  # fmt: skip
    assert {dtype for dtype, _ in weight_shapes(model).values()} == {"F16"}
    base = tiny_models.made() / "base-model" / "model"
    assert (model / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()


@pytest.mark.torch
def test_the_tokenizer_keeps_its_class_and_says_that_bos_is_added():
    settings = json.loads((tiny_models.merged() / "model" / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["add_bos_token"], settings["add_eos_token"]) == (
        "GemmaTokenizer",
        True,
        False,
    )


@pytest.mark.torch
def test_generation_ends_at_the_bases_ends_and_the_turn_end():
    settings = json.loads((tiny_models.merged() / "model" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 5]


@pytest.mark.torch
def test_the_manifest_holds_the_gates_figures():
    metrics = figures_of(read_manifest(tiny_models.merged(), "merge"), MergeFigures)
    assert metrics["prompts"] == 16
    assert metrics["positions"] == 16 * 32
    assert 0 < metrics["merged_mean_kl"] < 1e-4 < metrics["base_mean_kl"]
    assert metrics["bytes"] < 2.1 * metrics["parameters"]


@pytest.mark.torch
def test_merging_twice_gives_the_same_bytes(tmp_path):
    base = tiny_models.made() / "base-model" / "model"
    fold.fold(base, tiny_models.made() / "grpo", "float16", tmp_path / "model")
    again = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert again == (tiny_models.merged() / "model" / "model.safetensors").read_bytes()


@pytest.mark.torch
def test_the_room_asked_for_is_enough():
    base = tiny_models.made() / "base-model" / "model"
    used = sum(path.stat().st_size for path in (tiny_models.merged() / "model").iterdir())
    assert used < merge.room_bytes(base, Merge("float16"))


@pytest.mark.torch
def test_an_adapter_that_does_nothing_is_refused(tmp_path):
    made = tiny_models.made()
    tiny_models.adapter(made / "base-model" / "model", tmp_path / "grpo", steps=0)  # B starts at 0
    fold.fold(made / "base-model" / "model", tmp_path / "grpo", "float16", tmp_path / "model")
    rows = tiny_models.rows(4, seed=5)
    with pytest.raises(UserError, match="does next to nothing"):
        merge.verify(
            made / "base-model" / "model", tmp_path / "grpo", tmp_path / "model", rows, Merge("float16"), tmp_path
        )


def test_fewer_problems_than_prompts_are_refused_before_anything_is_merged(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"id": "1"}\n')
    with pytest.raises(UserError, match=r"eval.jsonl: has 1 problems; \[merge\] prompts = 16"):
        first_rows(path, 16, "[merge] prompts")


def test_a_generation_config_that_contradicts_itself_keeps_its_token_ids(tmp_path, capsys):
    from transformers import GenerationConfig

    sound = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[1, 5])
    assert fold.savable(sound) is sound
    fold.savable(GenerationConfig(pad_token_id=-1, eos_token_id=[1, 5])).save_pretrained(tmp_path)
    made = fold.savable(GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=[1, 5], pad_token_id=0))
    made.save_pretrained(tmp_path)  # which refuses what contradicts itself
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    assert (kept["eos_token_id"], kept["pad_token_id"], "temperature" in kept) == ([1, 5], 0, False)
    assert "generation_config.json of the base contradicts itself" in capsys.readouterr().err


@pytest.mark.torch
def test_a_base_whose_weights_are_not_in_the_cache_any_more_is_fetched_whole(tmp_path, monkeypatch):
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr("stages.merge.locate_model", lambda recipe: ("owner/name", "a" * 40))
    monkeypatch.setattr("stages.merge.local_model_folder", lambda name, revision: None)
    monkeypatch.setattr("stages.merge.model_folder", lambda name, revision: tmp_path / "snapshot")

    def fetched(name, revision):
        raise UserError(f"asked the hub for {name} at {revision[:4]}")

    monkeypatch.setattr("stages.merge.whole_model_folder", fetched)
    result = tiny_models.run_stage(
        "merge", tiny_models.recipe(tmp_path), tmp_path / "merge", "grpo", "prepare-data", "base-model"
    )
    assert result.output.strip() == "Error: asked the hub for owner/name at aaaa"


@pytest.mark.torch
def test_a_4_bit_model_is_refused_without_a_gpu_before_any_work(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(merge, "fold", lambda *_: pytest.fail("work was done"))
    recipe = tiny_models.recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace('"lora"', '"merged_4bit"'))
    result = tiny_models.run_stage("merge", recipe, tmp_path / "merge", "grpo", "prepare-data", "base-model")
    assert result.exit_code == 1
    assert result.output.strip() == (
        f"Error: {recipe}: save names 'merged_4bit', and torch sees no NVIDIA GPU and bitsandbytes is not installed; "
        "expected a machine that has both, as bitsandbytes makes NF4 weights on the GPU. Take it out of save, or run "
        "there: make merge"
    )
    assert not (tmp_path / "merge").exists()


@pytest.mark.torch
def test_room_for_a_4_bit_model_is_asked_for_where_it_is_made():
    base = tiny_models.made() / "base-model" / "model"
    assert merge.room_bytes(base, Merge("float16"), four_bits=True) > merge.room_bytes(base, Merge("float16"))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("stated", "added"),
    [
        ({"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 1e5, "rope_scaling": None}),  # SmolLM2, Qwen
        ({"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            {"rope_theta": 250000.0, "rope_type": "default", "partial_rotary_factor": 1.0},  # Phi-4
            {"rope_theta": 250000.0, "rope_scaling": None, "partial_rotary_factor": 1.0},
        ),
        (
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},  # Gemma 3 4B
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e4,
            },
        ),
        (None, {}),
    ],
)
@pytest.mark.parametrize("inside", [None, "text_config"])
def test_config_json_states_rope_for_transformers_4_as_well(tmp_path, stated, added, inside):
    text = {"rope_parameters": stated, "vocab_size": 8}
    written = {inside: text, "model_type": "x"} if inside else text
    (tmp_path / "config.json").write_text(json.dumps(written))
    fold.write_rope_keys(tmp_path / "config.json")
    read = json.loads((tmp_path / "config.json").read_text())
    assert (read[inside] if inside else read) == text | added
    assert not inside or read["model_type"] == "x"


def test_a_rope_that_transformers_4_has_not_gets_no_older_keys(tmp_path):
    turned = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}  # Gemma 4
    text = json.dumps({"text_config": {"rope_parameters": {"full_attention": turned}}})
    (tmp_path / "config.json").write_text(text)
    fold.write_rope_keys(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize(("model_type", "words"), [("granitemoehybrid", ["mamba", "attention"]), ("qwen3_next", None)])
def test_the_layers_of_granite_4_have_the_words_that_the_converter_counts(tmp_path, model_type, words):
    written = ["linear_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "layer_types": written}))
    fold.write_layer_types(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == (words or written)


@pytest.mark.torch
def test_transformers_5_reads_the_same_rope_with_the_older_keys_beside_it():
    from transformers import AutoConfig

    model = tiny_models.merged() / "model"
    stated = json.loads((model / "config.json").read_text())
    assert (stated["rope_theta"], stated["rope_local_base_freq"], stated["rope_scaling"]) == (1e6, 1e4, None)
    base = AutoConfig.from_pretrained(tiny_models.made() / "base-model" / "model")
    assert AutoConfig.from_pretrained(model).rope_parameters == base.rope_parameters
