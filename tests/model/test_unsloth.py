"""What Unsloth is told for SFT and for GRPO, as far as shows without a GPU; tests/gpu has the rest."""

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.lib.model import unsloth
from stages.lib.model.load import load_trainable
from stages.lib.train import ladder
from tests.support.arguments import RECIPES

pytestmark = pytest.mark.torch


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what FastLanguageModel.from_pretrained is called with, of an Unsloth that loads nothing."""
    seen: dict[str, Any] = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(**given: Any) -> tuple[str, None]:
            seen.update(given)
            return "model", None

        @staticmethod
        def get_peft_model(model: str, **given: Any) -> str:
            assert given["max_seq_length"] == seen["max_seq_length"]
            return model

    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastLanguageModel=FastLanguageModel))
    monkeypatch.setattr(unsloth, "require_modules", lambda recipe, model: None)
    monkeypatch.setattr(unsloth, "load_adapter", lambda model, adapter: seen.update(adapter=adapter))
    return seen


def local(name: str, folder: Path) -> Any:
    """Return a recipe of engine unsloth whose model is a folder on this disk."""
    (folder / "config.json").write_text("{}")
    recipe = RECIPES[name]
    return replace(recipe, model=replace(recipe.model, name=str(folder)), model_folder=folder)


@pytest.mark.torch
def test_sft_is_made_for_its_own_lengths_and_without_vllm(told, tmp_path):
    recipe = local("qwen2.5-3b-gsm8k", tmp_path)
    load_trainable(recipe, None)
    assert (told["model_name"], told["max_seq_length"]) == (str(tmp_path), recipe.sft.max_tokens)
    assert told["fast_inference"] is False
    assert not {"gpu_memory_utilization", "max_num_seqs", "adapter"} & set(told)


@pytest.mark.torch
def test_grpo_goes_on_with_the_adapter_beside_vllm_and_with_what_the_ladder_left(told, tmp_path):
    top = local("qwen2.5-3b-gsm8k", tmp_path)
    recipe = ladder.with_values(top, "grpo", {"memory_share": 0.3, "max_completion_tokens": 100})
    load_trainable(recipe, tmp_path / "adapter")
    assert told["adapter"] == tmp_path / "adapter"
    assert (told["fast_inference"], told["gpu_memory_utilization"]) == (True, 0.3)
    assert told["max_num_seqs"] == top.vllm.sequences
    assert told["max_seq_length"] == top.data.max_prompt_tokens + 100
