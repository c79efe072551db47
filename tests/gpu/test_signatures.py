"""What we pass to Unsloth and vLLM by name is what they take: Unsloth drops a field that it does not know, or puts
another value in its place, and says so in a line of output at most.

tests/test_arguments.py holds the same, without a GPU, of the packages that are installed everywhere.
"""

import dataclasses
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.lib.model import sampled
from stages.lib.model.engine import import_engine
from stages.lib.model.generate import load_vllm, vllm_batch
from stages.lib.model.unsloth import load_unsloth
from tests.support.arguments import RECIPES, STAGES, passed, rungs

if shutil.which("nvidia-smi") is None:
    pytest.skip("needs an NVIDIA GPU: make test-gpu", allow_module_level=True)

ROOT = Path(__file__).parents[2]
OURS = {name: recipe for name, recipe in RECIPES.items() if recipe.model.engine == "unsloth"}
ONE = next(iter(OURS.values()))

# Fields of Unsloth's configurations that TRL's lack and that we do not state.
UNSTATED = {
    "sft": {
        "no vLLM and no GRPO here": [
            "vllm_sampling_params", "unsloth_num_chunks", "unsloth_grpo_mini_batch", "unsloth_logit_chunk_multiplier",
        ],
        "max_length decides, and the model is loaded for as much": ["max_seq_length"],
        "one GPU": ["context_parallel_size", "context_parallel_backend", "context_parallel_rotate_method"],
    },
    "grpo": {
        "the sampling fields of TRL decide": ["vllm_sampling_params"],
        "memory of the same sums": ["unsloth_num_chunks"],
        "one GPU": ["context_parallel_size", "context_parallel_backend"],
    },
}  # fmt: skip
# Fields that we do not state and for which Unsloth's default is not TRL's.
OTHER_DEFAULTS = {
    "memory of the same sums": ["torch_empty_cache_steps"],
    "what is logged": ["include_num_input_tokens_seen"],
    "no evaluation while training": ["per_device_eval_batch_size", "eval_accumulation_steps"],
}


def named(function: Callable) -> list[str]:
    """Return the parameters that have a name of their own."""
    return [name for name, each in inspect.signature(function).parameters.items() if each.kind is not each.VAR_KEYWORD]


def look(folder: Path) -> None:
    """Write to `folder` what the packages take by name, and what becomes of the arguments of our recipes.

    This is for a process of its own: Unsloth changes trl and transformers for good.
    """
    import_engine(ONE)
    import trl
    from unsloth import FastLanguageModel
    from unsloth.models import loader, vision
    from unsloth.models.vision import FastBaseModel
    from unsloth_zoo.vllm_utils import load_vllm
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    seen: dict[str, Any] = {
        # What it does not name itself it hands to load_vllm, if that names it.
        "FastLanguageModel.from_pretrained": named(FastLanguageModel.from_pretrained) + named(load_vllm),
        # It hands Gemma 3 on to the second of these.
        "FastLanguageModel.get_peft_model": [
            name for name in named(FastLanguageModel.get_peft_model) if name in named(FastBaseModel.get_peft_model)
        ],
        "LLM": named(LLM.__init__) + [field.name for field in dataclasses.fields(EngineArgs)],
        "generator.model.generate": named(LLM.generate),
        "networks": [
            *registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS, *registry._TRANSFORMERS_SUPPORTED_MODELS,
        ],
        "unshared": loader.VLLM_UNSUPPORTED_MODEL_TYPES,
        "with images": vision.VLLM_SUPPORTED_VLM,
        "SamplingParams": list(SamplingParams.__struct_fields__),
        "sft": fate("sft", trl.SFTConfig, folder),
        "grpo": fate("grpo", trl.GRPOConfig, folder),
    }  # fmt: skip
    (folder / "seen.json").write_text(json.dumps(seen, default=str))


def fate(stage: str, config: type, output: Path) -> dict[str, list]:
    """Return what Unsloth's `config`, a child of TRL's, does with our arguments and with what we leave to it.

    `changed` lists recipe, field, value stated and value found.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    trls = {field.name: field.default for field in dataclasses.fields(config.__mro__[1])}
    changed = []
    for name, recipe in OURS.items():
        for rung in rungs(stage, recipe):
            stated = STAGES[stage].arguments(rung, output)
            built = config(**stated)
            for field, value in stated.items():
                found = getattr(built, field, "nothing")
                if getattr(found, "value", found) != value:
                    changed.append([name, field, value, found])
    return {
        "unknown": sorted(stated.keys() - fields),
        "unstated": sorted(fields - trls.keys() - stated.keys()),
        "other_defaults": [
            name
            for name, each in inspect.signature(config).parameters.items()
            if name in trls and name not in stated and each.default != trls[name]
        ],
        "changed": changed,
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("signatures")
    program = "import pathlib, sys; from tests.gpu import test_signatures as t; t.look(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-6000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize(
    ("function", "callee"),
    [
        (load_unsloth, "FastLanguageModel.from_pretrained"),
        (load_unsloth, "FastLanguageModel.get_peft_model"),
        (load_vllm, "LLM"),
        (vllm_batch, "SamplingParams"),
        (vllm_batch, "generator.model.generate"),
    ],
)
def test_every_name_that_we_pass_is_one_that_is_taken(seen, function, callee):
    assert passed(function, callee) - set(seen[callee]) == set()


def test_vllm_knows_what_the_trainer_is_to_tell_it(seen):
    grpo = STAGES["grpo"]
    told = grpo.arguments(ONE, Path("out"))["generation_kwargs"]
    assert told.keys() - set(seen["SamplingParams"]) == set()


def test_models_that_are_taken_for_sampling_are_those_of_vllm_and_unsloth(seen):
    assert set(seen["networks"]) >= sampled.ARCHITECTURES
    assert seen["unshared"] == [*sampled.UNSHARED]
    assert sorted(seen["with images"]) == sorted(sampled.WITH_IMAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_unsloths_config_has_every_field_that_we_state_and_keeps_every_value(seen, stage):
    assert seen[stage]["unknown"] == []
    # To vLLM -1 and 0 are the same: no limit.
    assert [each for each in seen[stage]["changed"] if each[1:] != ["top_k", 0, -1]] == []


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_left_to_unsloths_defaults_does_not_change_the_result(seen, stage):
    assert seen[stage]["unstated"] == sorted(field for fields in UNSTATED[stage].values() for field in fields)
    assert sorted(seen[stage]["other_defaults"]) == sorted(name for names in OTHER_DEFAULTS.values() for name in names)
