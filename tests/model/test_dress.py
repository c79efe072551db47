"""The dress rehearsal: a small copy of a model through training, merge and GGUF, in seconds."""

import dataclasses
import json
import threading

import pytest

from stages.lib.errors import UserError
from stages.lib.gguf.convert import run_converter
from stages.lib.model.dress import rehearse
from stages.lib.model.lora import require_modules
from stages.lib.model.network import network_class, outside_text
from stages.lib.model.shrink import small_sizes
from stages.lib.recipe.read import read_recipe
from tests.support import tiny_models

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def recipe():
    made = tiny_models.made()
    return read_recipe(tiny_models.recipe(made), made / "base-model")


@pytest.mark.slow
def test_a_sound_model_passes_and_its_adapter_counts_and_one_converter_runs_at_a_time(recipe, monkeypatch):
    running, at_once, lock = [], [], threading.Lock()

    def counted(arguments, *name):
        with lock:
            running.append(name)
            at_once.append(len(running))
        try:
            run_converter(arguments, *name)
        finally:
            with lock:
                running.remove(name)

    monkeypatch.setattr("stages.lib.gguf.convert.run_converter", counted)
    figures = rehearse(recipe)
    assert at_once == [1, 1, 1]  # of the base, the adapter and the merged model
    assert figures["base"] > 1e-3
    assert max(figures["adapter"], figures["gguf"], figures["lora"]) < figures["base"] / 100


def changed(recipe, folder, **config):
    """Give the recipe with a model folder whose config.json has other values."""
    folder.mkdir()
    for path in recipe.model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path.suffix != ".safetensors" else b"never read")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return dataclasses.replace(recipe, model_folder=folder)


def test_what_transformers_can_not_load_fails_as_sft_would(recipe, tmp_path):
    strange = changed(recipe, tmp_path / "model", model_type="unheard-of", architectures=["UnheardOf"])
    with pytest.raises(UserError, match=r"make sft would fail with base-model(.|\n)*unheard-of(.|\n)*another base"):
        rehearse(strange)


@pytest.mark.slow
def test_what_the_converter_can_not_take_fails_as_gguf_would(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.lib.gguf.convert.HOME", tmp_path)
    with pytest.raises(UserError, match=r"make gguf would fail with base-model(.|\n)*converter is not installed"):
        rehearse(recipe)


QWEN3_5 = {"num_hidden_layers": 24, "full_attention_interval": 4, "head_dim": 256, "num_key_value_heads": 2}
SMOLLM3 = {"num_hidden_layers": 36, "no_rope_layer_interval": 4}


@pytest.mark.parametrize(
    ("network", "settings", "layers"),
    [
        ("Qwen3_5Text", QWEN3_5, 4),  # three linear layers, one of full attention
        ("Gemma3Text", {"num_hidden_layers": 26}, 6),  # five with a window, one without
        ("SmolLM3", SMOLLM3, 4),  # one of four without RoPE
        ("GptOss", {"num_hidden_layers": 24}, 2),
        ("Llama", {"num_hidden_layers": 32}, 2),
        ("DeepseekV3", {"num_hidden_layers": 61, "first_k_dense_replace": 3}, 4),
    ],
)
def test_a_small_copy_has_each_kind_of_layer(network, settings, layers):
    import transformers

    config = getattr(transformers, f"{network}Config")(**settings)
    assert small_sizes(config.to_dict(), {})["num_hidden_layers"] == layers


def test_a_small_mamba_has_as_many_heads_as_its_width_asks_for():
    known = {
        "num_hidden_layers": 4, "hidden_size": 1536, "num_attention_heads": 12, "mamba_n_heads": 48, "mamba_d_head": 64,
        "mamba_expand": 2, "mamba_n_groups": 1,
    }  # fmt: skip
    sizes = small_sizes(known, known)
    assert sizes["hidden_size"] == 2 * 1536 // 12
    assert sizes["mamba_n_heads"] * 64 == 2 * sizes["hidden_size"]


def test_lists_with_an_entry_a_layer_are_cut_with_the_layers_and_sizes_in_them_made_small():
    stated = {
        "num_hidden_layers": 6, "hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_kv_shared_layers": 2,
        "layer_types": ["s", "f"] * 3, "intermediate_size": [2048] * 6,
        "per_layer_config": {"1": {"num_key_value_heads": 4}, "5": {"num_key_value_heads": 4}},
    }  # fmt: skip
    sizes = small_sizes(stated, stated)
    assert sizes["num_hidden_layers"] == 4  # two of their own, two that share keys and values
    assert sizes["num_kv_shared_layers"] == 2
    assert sizes["layer_types"] == ["s", "f", "s", "f"]
    assert sizes["intermediate_size"] == [64] * 4
    assert sizes["per_layer_config"] == {"1": {"num_key_value_heads": 1}}


def test_sizes_that_make_no_network_refuse_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("stages.lib.model.shrink.SIZES", {"hidden_size": 63, "intermediate_size": -1})
    assert rehearse(recipe) == {}
    assert "warning: base-model: no rehearsal with a small copy" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_use_of_a_tied_embedding_is_refused_before_training(recipe, name):
    lora = dataclasses.replace(recipe.lora, target_modules=["q_proj", name])
    with pytest.raises(UserError, match=rf"make sft would fail(.|\n)*names '{name}'; (.|\n)*are one matrix"):
        rehearse(dataclasses.replace(recipe, lora=lora))


def test_an_adapter_on_experts_is_refused_with_the_reason(recipe):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "vocab_size": 64,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(num_hidden_layers=1, mlp_only_layers=[], **sizes))
    lora = dataclasses.replace(recipe.lora, target_modules=["q_proj", "gate_proj"])
    with pytest.raises(UserError, match=r"names 'gate_proj'; .*no such module.* Its experts are one tensor each"):
        require_modules(dataclasses.replace(recipe, lora=lora), model)
    lora = dataclasses.replace(recipe.lora, target_modules=["q_proj", "v_proj"])
    require_modules(dataclasses.replace(recipe, lora=lora), model)


def test_a_model_that_generates_no_text_is_refused(recipe, tmp_path):
    encoder = changed(recipe, tmp_path / "model", model_type="bert", architectures=["BertForMaskedLM"])
    clip = changed(recipe, tmp_path / "clip", model_type="siglip_vision_model", architectures=["SiglipVisionModel"])
    assert network_class(encoder.model_folder).__name__ == "AutoModelForCausalLM"
    with pytest.raises(UserError, match="no network that generates text for model_type 'siglip_vision_model'"):
        rehearse(clip)


def test_an_adapter_sits_on_the_text_part_alone():
    import re

    from transformers import AutoModelForImageTextToText, Mistral3Config

    text = {"model_type": "mistral", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64, "vocab_size": 64}  # fmt: skip
    vision = {"model_type": "pixtral", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2,
              "head_dim": 32, "intermediate_size": 64, "image_size": 28}  # fmt: skip
    model = AutoModelForImageTextToText.from_config(Mistral3Config(text_config=text, vision_config=vision))
    left = [name for name, _ in model.named_modules() if not re.fullmatch(outside_text(model), name)]
    assert "model.language_model.layers.0.self_attn.q_proj" in left
    assert "lm_head" in left
    assert not [name for name in left if "vision" in name or "projector" in name]


def test_a_small_copy_keeps_what_a_head_and_rope_are():
    from transformers import Qwen3Config

    config = Qwen3Config(num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    sizes = small_sizes(config.to_dict(), config.to_dict())
    assert (sizes["num_attention_heads"], sizes["num_key_value_heads"]) == (2, 1)
    assert not {"head_dim", "rope_parameters", "vocab_size", "sliding_window"} & set(sizes)
