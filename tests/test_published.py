"""Models as published, each by its config.json: taken or refused before the training, as docs/models.md says."""

import dataclasses
from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.model.dress import rehearse, text_of, train
from stages.lib.model.files import model_config, weight_shapes
from stages.lib.model.fold import fold
from stages.lib.model.network import network_class
from stages.lib.model.rehearsal import check_chat_template, check_completion, refuse_quantized_base
from stages.lib.model.shrink import small_config, write_small_copy
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.ollama.derive import jinja_render
from stages.lib.ollama.proof import prompts_of
from stages.lib.recipe.read import read_recipe
from tests.support import published, tiny_models
from tests.support.family_models import chat_template
from tests.support.npm import quoted_templates

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
BY_NAME = {model.name: model for model in published.PUBLISHED}
TAKEN = [model for model in published.PUBLISHED if not model.refused]
ALIKE = [model for model in TAKEN if model.like]
QUOTED = [  # with the name under which @huggingface/ollama-utils has the chat template
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2:135m"), ("Qwen/Qwen2.5-3B-Instruct", "qwen2.5:0.5b"),
    ("Qwen/Qwen3-1.7B", "qwen3:0.6b"), ("google/gemma-3-270m-it", "gemma3:270m"), ("microsoft/phi-4", "phi4:14b"),
    ("microsoft/Phi-4-mini-instruct", "phi4-mini:3.8b"), ("allenai/OLMo-2-0425-1B-Instruct", "olmo2:7b"),
]  # fmt: skip


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
@pytest.mark.parametrize(("name", "quoted"), QUOTED)
def test_a_chat_template_as_published_prompts_as_what_stands_for_it_and_is_taken_too(name, quoted, tmp_path):
    recipe = written(BY_NAME[name], tmp_path)
    published_template = quoted_templates()[quoted]
    renders = [
        jinja_render(template, {"bos_token": "<bos>", "eos_token": "</s>"})
        for template in (chat_template(BY_NAME[name].template), published_template)
    ]
    assert prompts_of(renders[0], "") == prompts_of(renders[1], "")
    (recipe.model_folder / "chat_template.jinja").write_text(published_template)
    check_words(recipe)


@pytest.mark.torch
@pytest.mark.slow
def test_gemma_3s_first_chat_template_which_takes_no_text_as_system_message_is_refused(tmp_path):
    recipe = written(BY_NAME["google/gemma-3-1b-it"], tmp_path)
    (recipe.model_folder / "chat_template.jinja").write_text(quoted_templates()["gemma3:1b"])
    with pytest.raises(UserError, match="the chat template refuses system messages or leaves them out"):
        check_words(recipe)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tied"), [("Mistral-Small-3.1-24B-Instruct-2503", False), ("Ministral-3-3B-Reasoning-2512", True)]
)
def test_embeddings_are_tied_as_the_text_part_says_where_the_wrapper_does_not_and_merge_says_so(name, tied, tmp_path):
    recipe = written(BY_NAME[f"mistralai/{name}"], tmp_path)
    write_small_copy(recipe.model_folder, tmp_path / "small")
    small = dataclasses.replace(recipe, model_folder=tmp_path / "small")
    tokenizer = load_tokenizer(small)
    train(small, tokenizer, [text_of(tokenizer, "What is 17 + 25?")], tmp_path)
    fold(tmp_path / "small", tmp_path, "bfloat16", tmp_path / "merged")
    has_output_layer = [name for name in weight_shapes(tmp_path / "merged") if name.endswith("lm_head.weight")]
    assert bool(has_output_layer) is not tied
    assert model_config(tmp_path / "merged")["tie_word_embeddings"] is tied


@pytest.mark.torch
@pytest.mark.slow
def test_an_adapter_on_an_output_layer_of_its_own_is_taken(tmp_path):
    model = BY_NAME["mistralai/Mistral-Small-3.1-24B-Instruct-2503"]
    figures = rehearse(written(dataclasses.replace(model, modules=("q_proj", "v_proj", "lm_head")), tmp_path))
    assert max(figures["adapter"], figures["gguf"]) < figures["base"] / 50


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
