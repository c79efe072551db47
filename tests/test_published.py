"""Models as published, each by its config.json: taken or refused before the training, as docs/models.md says."""

import dataclasses
from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.model.dress import rehearse
from stages.lib.model.network import network_class
from stages.lib.model.rehearsal import check_chat_template, check_completion, refuse_quantized_base
from stages.lib.model.shrink import small_config
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from tests.support import published, tiny_models

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
BY_NAME = {model.name: model for model in published.PUBLISHED}
TAKEN = [model for model in published.PUBLISHED if not model.refused]
ALIKE = [model for model in TAKEN if model.like]


def short(model):
    return model.name.partition("/")[2]


def test_the_page_has_a_row_for_each_model_and_no_other():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `") and "/" in line.split("|")[1]]
    assert len(rows) == len(published.PUBLISHED)
    for row, model in zip(rows, published.PUBLISHED, strict=True):
        assert row.startswith(model.row()) if model.refused else row == model.row()


def written(model, tmp_path):
    """Give the recipe for a published model, whose config.json and tokenizer are written to a folder."""
    folder = published.write(model, tmp_path / short(model))
    return published.recipe_of(model, folder, read_recipe(tiny_models.recipe(tmp_path), tmp_path / "base-model"))


def check_words(recipe):
    """Do what prepare-data does before the rehearsal, but for llama.cpp and the tokenizer, which may be a stand-in."""
    refuse_quantized_base(recipe.model_folder, recipe.model.name)
    tokenizer = load_tokenizer(recipe)
    check_chat_template(recipe, tokenizer)
    check_completion(recipe, tokenizer)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("model", published.PUBLISHED, ids=short)
def test_weights_and_chat_template_are_taken_or_refused_as_the_page_says(model, tmp_path):
    recipe = written(model, tmp_path)
    if model.refused:
        with pytest.raises(UserError, match=model.refused):
            check_words(recipe)
    else:
        check_words(recipe)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("model", ALIKE, ids=short)
def test_a_model_that_is_not_rehearsed_has_the_network_and_settings_of_one_that_is(model, tmp_path):
    stand_in = BY_NAME[model.like]
    assert not stand_in.like
    assert (model.modules, model.save) == (stand_in.modules, stand_in.save)
    assert tensors(model, tmp_path) == tensors(stand_in, tmp_path)


def tensors(model, tmp_path):
    """Give the names of a small copy's tensors, but the output layer's: it is the embedding or not."""
    import json

    import torch
    from transformers import AutoConfig

    folder = written(model, tmp_path).model_folder
    small = small_config(folder)
    (folder / "config.json").write_text(json.dumps(small))
    with torch.device("meta"):
        network = network_class(folder).from_config(AutoConfig.from_pretrained(folder))
    return {name for name, _ in network.named_parameters()} - {"lm_head.weight"}


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("model", [model for model in TAKEN if not model.like], ids=short)
def test_a_network_is_trained_merged_and_converted_as_the_page_says(model, tmp_path):
    recipe = written(dataclasses.replace(model, save=("lora",)), tmp_path)
    if model.save:
        figures = rehearse(recipe)
        assert figures["base"] > 1e-6
        assert max(figures[name] for name in ("adapter", "gguf", "lora")) < figures["base"] / 50
        return
    # The adapter's file comes last: all before it was right.
    with pytest.raises(UserError, match=r"make gguf would fail with (.|\n)*Take 'lora' out of save"):
        rehearse(recipe)
