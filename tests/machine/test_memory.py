"""The memory estimate: shapes add up to the published models, parts are what arithmetic by hand gives, peaks behave."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.lib.errors import UserError
from stages.lib.gguf.types import GGUF_TYPES
from stages.lib.machine.disk import Room, disk_rooms, gguf_bits, most_room
from stages.lib.machine.memory import (
    CUDA_BYTES,
    Estimate,
    adapter_parameters,
    comparison_estimate,
    grpo_estimate,
    kv_bytes,
    sft_estimate,
    weight_bytes,
)
from stages.lib.machine.shape import LINEAR_LAYERS, SHAPES, Shape, shape_of_config
from stages.lib.recipe.tables import Lora, Recipe
from tests.support.arguments import RECIPES
from tests.support.published import PUBLISHED
from tests.support.published_configs import GEMMA_4

ROOT = Path(__file__).parents[2]
ALL = list(LINEAR_LAYERS)
MLP = ["gate_proj", "up_proj", "down_proj"]
# hidden 8, 2 heads of 4, 1 key-value head, MLP 16, vocabulary 32: small enough to count by hand.
SMALL = Shape(3, 8, 2, 1, 4, 16, 32, True)
PLAIN = {
    "model": {"engine": "trl", "dtype": "bfloat16", "load_in_4bit": False},
    "lora": {"rank": 2, "target_modules": ALL},
    "data": {"max_prompt_tokens": 4},
    "sft": {"optimizer": "adamw_torch", "micro_batch_size": 2, "max_tokens": 10, "gradient_checkpointing": False},
    "grpo": {
        "optimizer": "adamw_torch", "micro_batch_size": 2, "prompts_per_step": 2, "completions_per_prompt": 4,
        "max_completion_tokens": 6, "gradient_checkpointing": True,
    },
    "merge": {"prompts": 1, "positions_per_prompt": 3},
    "gguf": {"types": ["q8_0", "q4_k_m"], "prompts": 1, "positions_per_prompt": 5},
    "ollama": {"quantization": "Q4_K_M"},
    "vllm": {"memory_share": 0.5, "sequences": 64, "standby": False},
}  # fmt: skip


def recipe(save: list[str] | None = None, **changes: dict[str, Any]) -> Recipe:
    """Return a recipe with the numbers of PLAIN, and of `changes`, a dict a table, where these have others."""
    made = RECIPES["qwen3-1.7b-dapo"]
    tables = {name: replace(getattr(made, name), **PLAIN[name] | changes.get(name, {})) for name in PLAIN}
    return replace(made, save=save or ["gguf"], **tables)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("google/gemma-3-1b-it", 999_885_952),
        ("google/gemma-3-4b-it", 4_300_079_472),
        ("unsloth/Qwen3-1.7B-Base", 1_720_574_976),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("unsloth/Phi-4", 14_659_507_200),
    ],
)
def test_the_shapes_of_the_recipes_models_add_up_to_the_published_number_of_parameters(name, total):
    assert SHAPES[name].parameters == total


def test_gemma_3_4b_is_a_text_model_and_a_vision_tower():
    shape = SHAPES["google/gemma-3-4b-it"]
    padding = 64 * shape.hidden_size  # rows of the embedding that stand for no token of the text vocabulary
    assert shape.parameters - shape.other_parameters - padding == 3_880_099_328


def test_every_hub_model_of_a_recipe_has_a_shape():
    named = {
        name
        for path in (ROOT / "recipes").glob("*.toml")
        for name in re.findall(r'^name = "([\w.-]+/[\w.-]+)"', path.read_text().split("[data]")[0], re.M)
    }
    assert len(named) == 7
    assert named == set(SHAPES)


CONFIGS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "llama without grouped heads": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 64},
    "gemma3": {
        "model_type": "gemma3",
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_use_head": False,
        },
    },
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_json_gives_the_parameters_that_transformers_makes_of_it(case):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sizes = {"num_hidden_layers": 7, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "vocab_size": 128}
    config = dict(CONFIGS[case])
    if case == "gemma3":
        config["text_config"] = {"model_type": "gemma3_text", **sizes}  # as published: the rest are defaults
    else:
        config |= sizes | heads
    made = AutoConfig.for_model(**config)
    kind = AutoModelForImageTextToText if case == "gemma3" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(made)
    expected = sum(weight.numel() for weight in model.parameters())
    assert shape_of_config(config, "config.json").parameters == expected
    saved = made.to_dict()  # as transformers writes it: defaults written out, None where there is none
    assert shape_of_config(saved, "config.json").parameters == expected
    assert shape_of_config(saved, "config.json") == shape_of_config(config, "config.json")


@pytest.mark.torch
@pytest.mark.parametrize(
    "model", [model for model in PUBLISHED if not model.refused], ids=lambda model: model.name.partition("/")[2]
)
def test_a_published_config_json_gives_the_parameters_that_transformers_makes_of_it(model, tmp_path):
    import torch
    from transformers import AutoConfig

    from stages.lib.model.network import network_class

    (tmp_path / "config.json").write_text(json.dumps(model.config))
    made = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        network = network_class(tmp_path).from_config(made)
    expected = sum(weight.numel() for weight in network.parameters())
    if model.name == "mistralai/Mistral-Small-3.1-24B-Instruct-2503":  # its config.json does not say that it is untied
        expected += 131_072 * 5_120
    shape = shape_of_config(model.config, "config.json")
    assert shape.parameters == expected
    saved = shape_of_config(made.to_dict(), "config.json")
    assert saved.parameters == expected
    assert kv_bytes(saved, 100_000) == kv_bytes(shape, 100_000)
    linear = sum(each.weight.numel() for name, each in network.named_modules() if is_quantized(name, each))
    assert shape.linear_parameters == linear


def is_quantized(name: str, module: Any) -> bool:
    """Say whether 4-bit loading quantizes a module here: a linear layer of the text part, but for the output layer."""
    return type(module).__name__ == "Linear" and not re.search("vision|audio|projector|^lm_head$", name)


@pytest.mark.parametrize(
    ("name", "tokens", "size"),
    [
        ("Qwen/Qwen3.5-4B", 1000, 2 * 2 * 1000 * 8 * 4 * 256),  # 8 of 32 layers with attention
        ("ibm-granite/granite-4.0-h-tiny", 1000, 2 * 2 * 1000 * 4 * 4 * 128),
        ("LiquidAI/LFM2-1.2B", 1000, 2 * 2 * 1000 * 6 * 8 * 64),
        ("unsloth/gpt-oss-20b-BF16", 1000, 2 * 2 * 8 * 64 * 12 * (1000 + 128)),
        # 15 layers with keys of their own, 12 of them with a window; a head counted as in the other 3, with 512
        ("google/gemma-4-E2B-it", 1000, 2 * 2 * 1 * 512 * (3 * 1000 + 12 * 512)),
        ("mistralai/Ministral-3-3B-Reasoning-2512", 1000, 2 * 2 * 1000 * 26 * 8 * 128),
    ],
)
def test_a_kv_cache_is_kept_by_the_layers_with_attention(name, tokens, size):
    config = next(model.config for model in PUBLISHED if model.name == name)
    assert kv_bytes(shape_of_config(config, "config.json"), tokens) == size


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GEMMA_4 | {"audio_config": {"hidden_size": 8}}, "has no 'output_proj_dims'"),
        ({"model_type": "mixtral", "hidden_size": 8}, "model_type is 'mixtral'"),
        ({"hidden_size": 8}, "model_type is None"),
        ({"model_type": "llama", "num_attention_heads": 2, "hidden_size": 8}, "has no 'num_hidden_layers'"),
    ],
)
def test_a_config_that_can_not_be_counted_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        shape_of_config(config, "models/x")
    assert caught.value.message.startswith("models/x: ")


def test_weights_by_hand():
    # a layer: q 64, k 32, v 32, o 64, three of 128, norms 16; embedding 256, last norm 8
    assert SMALL.linear_parameters == 3 * 576
    assert SMALL.parameters == 3 * (576 + 16) + 256 + 8
    assert weight_bytes(SMALL, "bfloat16") == 2 * 2040
    assert weight_bytes(SMALL, "float32") == 4 * 2040
    # 4 bits and 0.127 of scales for 1,728 weights, 16 bits for the other 312
    assert weight_bytes(SMALL, "bfloat16", load_in_4bit=True) == int(1728 * 4.126953125 / 8) + 624


def test_four_bits_leave_embeddings_and_vision_tower_in_sixteen():
    shape = SHAPES["meta-llama/Llama-3.1-8B-Instruct"]
    quantized = weight_bytes(shape, "bfloat16", load_in_4bit=True)
    assert quantized == int(6_979_321_856 * 4.126953125 / 8) + 2 * (8_030_261_248 - 6_979_321_856)
    assert 5.6e9 < quantized < 5.8e9


@pytest.mark.parametrize(
    ("modules", "parameters"),
    [
        (["q_proj"], 3 * 2 * 16),
        (["k_proj", "v_proj"], 3 * 2 * (12 + 12)),
        (MLP, 3 * 2 * 72),
        (ALL, 3 * 2 * (16 + 12 + 12 + 16 + 72)),
        (["all-linear"], 3 * 2 * 128),
        (["lm_head"], 0),
        (["qkv_proj"], 3 * 2 * (16 + 12 + 12)),
        (["w1", "w2", "w3", "out_proj"], 3 * 2 * (72 + 16)),
        (["input_linear", "output_linear"], 3 * 2 * 72),
    ],
)
def test_an_adapter_by_hand(modules, parameters):
    assert adapter_parameters(SMALL, Lora(2, 2, 0.0, modules)) == parameters


def test_the_published_size_of_an_adapter():
    # PEFT prints 41,943,040 trainable parameters for rank 16 on all linear layers of Llama 3.1 8B
    shape = SHAPES["meta-llama/Llama-3.1-8B-Instruct"]
    assert adapter_parameters(shape, Lora(16, 16, 0.0, ["all-linear"])) == 41_943_040


def test_a_kv_cache_by_hand_and_sliding_layers_forget():
    assert kv_bytes(SMALL, 10) == 2 * 2 * 4 * 3 * 10
    assert kv_bytes(SHAPES["meta-llama/Llama-3.1-8B-Instruct"], 1) == 131_072
    gemma = SHAPES["google/gemma-3-1b-it"]
    assert kv_bytes(gemma, 512) == 1024 * 26 * 512
    assert kv_bytes(gemma, 1024) == 1024 * (4 * 1024 + 22 * 512)


UNSLOTH = {"engine": "unsloth"}


def sft(**changes):
    return sft_estimate(SMALL, recipe(**changes))


def test_training_parts_by_hand():
    parts = sft().parts
    adapter = 768
    assert parts["weights"] == 4080
    assert (parts["adapter"], parts["gradients"], parts["optimizer"]) == (4 * adapter, 4 * adapter, 8 * adapter)
    assert parts["layer inputs"] == 0
    inputs = 8 + 8 + 8 + 8 + 8 + 8 + 16
    kept = 6 * 8 + 2 * 8 + 2 * 4 + 4 * 16 + inputs
    assert parts["activations"] == 20 * (3 * kept + 3 * 16 + 2 * 8) * 2
    assert parts["logits"] == 20 * 32 * 16
    assert "unpacked layer" not in parts
    assert "KV cache" not in parts


def test_checkpointing_keeps_the_layers_inputs_and_one_layer():
    plain, checkpointed = sft().parts, sft(sft={"gradient_checkpointing": True}).parts
    assert checkpointed["layer inputs"] == 3 * 20 * 8 * 2
    assert checkpointed["activations"] < plain["activations"] / 2
    offloaded = sft(sft={"gradient_checkpointing": True}, model=UNSLOTH).parts
    assert offloaded["layer inputs"] == 2 * 20 * 8 * 2


def test_an_8_bit_optimizer_takes_a_quarter():
    assert sft(sft={"optimizer": "paged_adamw_8bit"}).parts["optimizer"] == sft().parts["optimizer"] // 4


def test_four_bit_training_unpacks_a_layer_at_a_time():
    assert sft(model=UNSLOTH | {"load_in_4bit": True}).parts["unpacked layer"] == 2 * 8 * 16 * 2


def test_unsloth_never_has_all_logits_of_a_large_vocabulary_at_once():
    shape = SHAPES["google/gemma-3-1b-it"]
    knobs = {"micro_batch_size": 8, "max_tokens": 2048, "gradient_checkpointing": True}
    whole = sft_estimate(shape, recipe(sft=knobs)).parts["logits"]
    assert whole == 16_384 * 262_144 * 16
    assert sft_estimate(shape, recipe(sft=knobs, model=UNSLOTH)).parts["logits"] == 4 << 30


def grpo(shape=SMALL, gpu_bytes=0, **changes):
    return grpo_estimate(shape, recipe(**changes), gpu_bytes)


def test_grpo_without_vllm_generates_a_whole_step_and_then_trains():
    estimate = grpo()
    assert estimate.parts["KV cache"] == 8 * kv_bytes(SMALL, 10)
    assert estimate.parts["logits"] == 2 * 7 * 32 * 16
    assert estimate.takes_turns
    assert "vLLM" not in estimate.parts


def test_vllm_fills_its_share_however_little_it_needs():
    shape = SHAPES["unsloth/Qwen3-1.7B-Base"]
    half, quarter = (grpo(shape, 80_000_000_000, model=UNSLOTH, vllm={"memory_share": share}) for share in (0.5, 0.25))
    parts = half.parts
    assert parts["weights"] + parts["vLLM"] + parts["KV cache"] == 40_000_000_000
    assert parts["logits"] == 3 * 151_936 * 16  # a quarter of ten tokens, rounded up
    assert half.peak_bytes - quarter.peak_bytes == 20_000_000_000


def test_a_share_too_small_for_the_weights_leaves_no_negative_cache():
    assert grpo(gpu_bytes=1_000_000, model=UNSLOTH, vllm={"sequences": 1}).parts["KV cache"] == 0


@pytest.mark.parametrize(("gib", "share"), [(140, 0.925), (40, 0.925), (24, 0.825), (15.5, 0.8), (8, 0.75)])
def test_in_standby_unsloths_own_share_counts_and_not_the_recipes(gib, share):
    shape, size = SHAPES["google/gemma-3-1b-it"], int(gib * 2**30)
    parts = grpo(shape, size, model=UNSLOTH, vllm={"memory_share": 0.2, "sequences": 1, "standby": True}).parts
    assert parts["weights"] + parts["vLLM"] + parts["KV cache"] == int(0.95 * share * size)


def test_in_standby_the_larger_of_cache_and_step_counts():
    parts = {"weights": 100, "activations": 30, "logits": 10, "KV cache": 25}
    assert Estimate(parts).peak_bytes == 165
    assert Estimate(parts, takes_turns=True).peak_bytes == 140
    assert Estimate(parts | {"KV cache": 70}, takes_turns=True).peak_bytes == 170


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"grpo": {"micro_batch_size": 4}}, "activations"),
        ({"grpo": {"max_completion_tokens": 60}}, "logits"),
        ({"data": {"max_prompt_tokens": 60}}, "activations"),
        ({"lora": {"rank": 8}}, "adapter"),
        ({"grpo": {"prompts_per_step": 4}}, "KV cache"),
        ({"model": {"dtype": "float32"}}, "weights"),
    ],
)
def test_more_of_anything_needs_more_memory(change, part):
    assert grpo(**change).parts[part] > grpo().parts[part]
    assert grpo(**change).peak_bytes >= grpo().peak_bytes


def test_comparing_models_takes_four_bytes_a_weight():
    shape = SHAPES["unsloth/Phi-4"]
    assert comparison_estimate(shape).peak_bytes == 5 * 14_659_507_200 + CUDA_BYTES


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_bits_of_every_type_are_those_that_the_gguf_stage_makes_room_for(tmp_path, kind):
    from stages import gguf
    from stages.lib.recipe.tables import Gguf

    (tmp_path / "config.json").write_text('{"vocab_size": 1000}')
    parameters = 8_000_000
    room = gguf.room_bytes(Gguf(types=["f16", kind], prompts=1, positions_per_prompt=2), parameters, tmp_path)
    alone = gguf.room_bytes(Gguf(types=["f16"], prompts=1, positions_per_prompt=2), parameters, tmp_path)
    overhead = 1_000_000 + (tmp_path / "config.json").stat().st_size
    added = 0 if kind == "f16" else parameters * gguf_bits(kind) // 8 + overhead
    assert room - alone == added


def rooms(*types, save=None):
    return disk_rooms(SMALL, recipe(save, gguf={"types": list(types)} if types else {}))


def test_disk_by_hand():
    adapter, tokenizer, sft_logs, grpo_logs = 768, 32 * 150, 30 * 2000, 500 * 2000
    completions = 500 * 2 * 4 * (6 * 6 + 3000)
    sft, grpo = 12 * adapter + tokenizer + sft_logs, 12 * adapter + tokenizer + grpo_logs  # a checkpoint
    assert rooms() == {
        "base": Room(4080),
        "sft": Room(4 * adapter + tokenizer + sft_logs, 3 * sft + sft_logs),
        "grpo": Room(4 * adapter + tokenizer + grpo_logs + completions, 3 * grpo + grpo_logs + completions),
        "merge": Room(4080, 2 * 3 * 32 * 4),
        "gguf": Room(2040 * 9 // 8 + 2040 * 7 // 8, 5 * 32 * 4 + 4080),
        "ollama-modelfile": Room(2040 * 7 // 8),
    }


def test_a_16_bit_file_that_was_asked_for_is_kept_and_is_no_scratch():
    assert rooms("f16", "q4_k_m")["gguf"] == Room(4080 + 2040 * 7 // 8, 5 * 32 * 4)
    assert rooms("bf16", "q4_k_m")["gguf"].scratch == 5 * 32 * 4
    assert rooms("f16", "bf16")["gguf"] == Room(2 * 4080, 5 * 32 * 4)


def test_what_else_is_handed_over_takes_room():
    assert rooms(save=["lora"])["gguf"].scratch - rooms()["gguf"].scratch == 4080
    four_bits = weight_bytes(SMALL, "bfloat16", load_in_4bit=True)
    assert rooms(save=["merged_4bit"])["merge"].kept - rooms()["merge"].kept == four_bits


def test_scratch_is_counted_once_it_is_largest_and_kept_files_always():
    assert most_room({}) == 0
    assert most_room({"a": Room(10, 100), "b": Room(20, 5), "c": Room(1)}) == 110
    assert most_room({"a": Room(10, 5), "b": Room(20, 50), "c": Room(1)}) == 80
    assert most_room({"a": Room(10), "b": Room(20)}) == 30
