"""The dress rehearsal: a small copy of a model through training, merge and GGUF, in seconds."""

import dataclasses
import json

import pytest

from stages.lib.errors import UserError
from stages.lib.model.dress import rehearse
from stages.lib.model.shrink import small_sizes
from stages.lib.recipe.read import read_recipe
from tests.support import tiny_models

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def recipe():
    made = tiny_models.made()
    return read_recipe(tiny_models.recipe(made), made / "base-model")


@pytest.mark.slow
def test_a_sound_model_passes_and_its_adapter_counts(recipe):
    figures = rehearse(recipe)
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
    assert small_sizes(config, config.to_dict())["num_hidden_layers"] == layers


def test_a_small_copy_keeps_what_a_head_and_rope_are():
    from transformers import Qwen3Config

    config = Qwen3Config(num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    sizes = small_sizes(config, config.to_dict())
    assert (sizes["num_attention_heads"], sizes["num_key_value_heads"]) == (2, 1)
    assert not {"head_dim", "rope_parameters", "vocab_size", "sliding_window"} & set(sizes)
