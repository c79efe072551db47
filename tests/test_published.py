"""Models as published, each by its config.json: taken or refused before the training, as docs/models.md says."""

import dataclasses
from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.model.dress import rehearse
from stages.lib.model.rehearsal import check_chat_template, check_completion, refuse_quantized_base
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from tests.support import published, tiny_models

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()


def test_the_page_has_a_row_for_each_model_and_no_other():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `") and "/" in line.split("|")[1]]
    assert len(rows) == len(published.PUBLISHED)
    for row, model in zip(rows, published.PUBLISHED, strict=True):
        assert row.startswith(model.row()) if model.refused else row == model.row()


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("model", published.PUBLISHED, ids=lambda model: model.name.partition("/")[2])
def test_a_model_is_taken_or_refused_as_the_page_says(model, tmp_path):
    made = tiny_models.made()
    folder = published.write(model, tmp_path / "model")
    recipe = published.recipe_of(model, folder, read_recipe(tiny_models.recipe(made), made / "base-model"))
    if model.refused:
        with pytest.raises(UserError, match=model.refused):
            prepare(recipe, folder)
        return
    figures = prepare(recipe, folder)
    assert figures["base"] > 1e-6
    assert max(value for name, value in figures.items() if name != "base") < figures["base"] / 50
    assert ("lora" in figures) == ("lora" in model.save)


def prepare(recipe, folder):
    """Do what prepare-data does with a model, but for its tokenizer, which may be a stand-in."""
    refuse_quantized_base(folder, recipe.model.name)
    tokenizer = load_tokenizer(recipe)
    check_chat_template(recipe, tokenizer)
    check_completion(recipe, tokenizer)
    return rehearse(recipe)


@pytest.mark.torch
@pytest.mark.slow
def test_an_adapter_file_that_llama_cpp_can_not_read_fails_before_training_with_what_to_change(tmp_path):
    model = next(model for model in published.PUBLISHED if model.name == "mistralai/Ministral-3-3B-Reasoning-2512")
    made = tiny_models.made()
    folder = published.write(model, tmp_path / "model")
    asked = dataclasses.replace(model, save=("lora",))
    recipe = published.recipe_of(asked, folder, read_recipe(tiny_models.recipe(made), made / "base-model"))
    with pytest.raises(UserError, match=r"make gguf would fail with mistralai/(.|\n)*Take 'lora' out of save"):
        prepare(recipe, folder)
