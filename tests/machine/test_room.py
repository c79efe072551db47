"""The room that a stage asks for: by the model's size, and never less than what it writes."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from stages.lib.machine.room import adapter_of_weights, room_to_answer, room_to_make, room_to_train
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Lora
from tests.support import disks, micro

LEAST = 20_000_000
RECIPES = Path(__file__).parents[2] / "recipes"


def model(folder: Path, shapes: dict[str, list[int]]) -> Path:
    """Write a model's folder whose weights are zeros of these shapes, in float16."""
    folder.mkdir()
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if shape[1:] else 1)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (folder / "config.json").write_text("{}")
    return folder


SHAPES = {
    "model.embed_tokens.weight": [100, 8],
    "model.layers.0.attn.query_key_value.weight": [24, 8],
    "model.layers.0.mlp.up_proj.weight": [32, 8],
    "model.layers.0.norm.weight": [8],
    "lm_head.weight": [100, 8],
}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["all-linear"], 4 * (24 + 8 + 32 + 8)),
        (["up_proj"], 4 * (32 + 8)),
        (["query_key_value"], 4 * (24 + 8)),
        ([], 0),
    ],
)
def test_an_adapter_has_rank_times_inputs_and_outputs_of_the_matrices_it_is_on_in_any_family(tmp_path, targets, count):
    lora = Lora(rank=4, alpha=8, dropout=0.0, target_modules=targets)
    assert adapter_of_weights(model(tmp_path / "model", SHAPES), lora) == count


def test_the_room_to_train_grows_with_model_steps_completions_and_rows(tmp_path):
    folder = model(tmp_path / "model", SHAPES)
    (tmp_path / "rows").write_bytes(bytes(500))
    made = read_recipe(RECIPES / "tiny.toml")
    recipe = replace(made, model=replace(made.model, name=str(folder)), model_folder=folder)
    adapter = 16 * (24 + 8 + 32 + 8)
    tokenizer = 2  # of config.json
    kept, checkpoint = 4 * adapter + tokenizer + 500 * 2000, 12 * adapter + tokenizer + 500 * 2000
    sft = LEAST + kept + 3 * checkpoint + 500 * 2000 + 2 * 500
    assert room_to_train(recipe, "sft", tmp_path / "rows") == sft
    kept, checkpoint = 4 * adapter + tokenizer + 48 * 2000, 12 * adapter + tokenizer + 48 * 2000
    completions = 48 * 8 * 8 * (64 * 6 + 3000)
    assert room_to_train(recipe, "grpo", tmp_path / "rows") == (
        LEAST + kept + 3 * checkpoint + 48 * 2000 + 2 * completions + 2 * 500
    )


def test_a_model_that_is_not_here_yet_is_known_by_its_published_shape():
    recipe = read_recipe(RECIPES / "llama3.1-8b-gsm8k.toml")
    assert 3e9 < room_to_train(recipe, "sft", Path("/none")) < 4e9
    other = replace(recipe, model=replace(recipe.model, name="nobody/nothing"))
    assert room_to_train(other, "sft", Path("/none")) < 1e8


def test_answers_and_the_tiny_model_take_what_their_numbers_say():
    assert room_to_answer(3000, 64) == LEAST + 3000 * (64 * 14 + 3000)
    knobs = read_recipe(RECIPES / "tiny.toml").base_model
    weights = 512 * 256 + 2 * (4 * 256**2 + 3 * 256 * 512)
    assert room_to_make(knobs) == LEAST + 4 * weights + 300 * 512 + 500 * 9500


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_no_stage_writes_more_than_it_asked_for(tmp_path, finished, stage):
    recipe = read_recipe(finished / "micro.toml", finished / "base-model")
    rows = finished / "prepare-data" / f"{stage}.jsonl"
    room = room_to_train(recipe, stage, rows)
    filled = disks.run_on_small_disk(stage, finished, tmp_path, room - LEAST // 2)
    assert (filled.code, filled.code_again) == (0, 0), filled.said
    assert micro.vouched(filled.result / stage) == micro.vouched(finished / stage)
