"""What the stages pass on by name is what the installed versions take: not all of them refuse a slip.

tests/gpu/test_signatures.py holds the same of Unsloth and vLLM, which only the CUDA image has.
"""

import inspect
from dataclasses import replace

import pytest

from stages import grpo
from stages.lib.model.generate import load_vllm, transformers_batch, vllm_batch
from stages.lib.model.nf4 import load_nf4
from stages.lib.model.unsloth import load_unsloth
from stages.lib.train import ladder
from tests.support.arguments import RECIPES, STAGES, UNSLOTH_ONLY, passed, rungs

# ---- TRL's configurations -----------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RECIPES)
def test_the_config_takes_the_arguments_of_every_recipe_on_every_rung_and_keeps_each(name, stage, tmp_path):
    import trl

    recipe = RECIPES[name]
    config = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}[stage]
    for rung in rungs(stage, recipe):
        stated = STAGES[stage].arguments(rung, tmp_path)
        of_unsloth = UNSLOTH_ONLY if stage == "grpo" and recipe.model.engine == "unsloth" else set()
        assert {field for field in stated if field.startswith("unsloth")} == of_unsloth
        built = config(**{field: value for field, value in stated.items() if field not in of_unsloth}, use_cpu=True)
        for field in stated.keys() - of_unsloth:
            found = getattr(built, field)
            assert getattr(found, "value", found) == stated[field], (ladder.values(rung, stage), field)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RECIPES)
def test_an_optimizer_step_takes_as_many_rows_on_every_rung(name, stage, tmp_path):
    recipe = RECIPES[name]
    rows = {"sft": recipe.sft.batch_size, "grpo": recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt}
    for rung in rungs(stage, recipe):
        stated = STAGES[stage].arguments(rung, tmp_path)
        assert stated["per_device_train_batch_size"] * stated["gradient_accumulation_steps"] == rows[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_trl_refuses_a_field_that_it_does_not_have(stage, tmp_path):
    import trl

    config = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}[stage]
    recipe = RECIPES["tiny"]
    stated = STAGES[stage].arguments(recipe, tmp_path)
    with pytest.raises(TypeError, match="lerning_rate"):
        config(**stated, lerning_rate=1e-5)


@pytest.mark.parametrize(
    ("completions_per_step", "micro_batch_size", "parts"),
    [(64, 64, 1), (64, 16, 1), (64, 8, 2), (256, 32, 2), (256, 1, 64), (64, 1, 16), (8, 8, 1), (8, 4, 1)],
)
@pytest.mark.parametrize("scored", [{"num_iterations": 2}, {"beta": 0.04}], ids=str)
def test_a_scoring_pass_takes_four_micro_batches_at_once(completions_per_step, micro_batch_size, parts, scored):
    recipe = RECIPES["qwen3-1.7b-dapo"]
    step = {"prompts_per_step": completions_per_step // 8, "completions_per_prompt": 8}
    table = replace(recipe.grpo, **step, micro_batch_size=micro_batch_size)
    stated = grpo.unsloth_arguments(replace(recipe, grpo=replace(table, **scored)))
    assert stated == {"unsloth_grpo_mini_batch": parts, "unsloth_logit_chunk_multiplier": 1}
    spared = grpo.unsloth_arguments(replace(recipe, grpo=table))  # the pass with gradients takes a micro-batch
    assert spared == {"unsloth_grpo_mini_batch": 1, "unsloth_logit_chunk_multiplier": 1}


# ---- what transformers takes ---------------------------------------------------------------------------------------


def test_generation_is_told_only_what_it_knows():
    from transformers import GenerationConfig

    names = passed(transformers_batch, "GenerationConfig")
    assert {"max_new_tokens", "do_sample", "temperature", "min_p", "eos_token_id", "disable_compile"} <= names
    assert names - set(vars(GenerationConfig())) == set()
    assert GenerationConfig(temprature=0.5).temprature == 0.5  # it takes a slip without a word


def test_quantization_is_told_only_what_it_knows():
    from transformers import BitsAndBytesConfig

    names = passed(load_nf4, "BitsAndBytesConfig")
    assert {"load_in_4bit", "bnb_4bit_quant_type"} <= names
    assert names - set(inspect.signature(BitsAndBytesConfig).parameters) == set()


# ---- the reader of our own calls -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "callee", "some"),
    [
        (load_unsloth, "FastLanguageModel.from_pretrained",
         {"model_name", "gpu_memory_utilization", "max_num_seqs", "trust_remote_code"}),
        (load_unsloth, "FastLanguageModel.get_peft_model", {"r", "target_modules", "random_state"}),
        (load_vllm, "LLM", {"model", "enable_lora", "max_model_len"}),
        (vllm_batch, "SamplingParams", {"max_tokens", "min_p", "stop_token_ids"}),
    ],
)  # fmt: skip
def test_the_names_in_a_call_are_found(function, callee, some):
    assert some <= passed(function, callee)


def unreadable(given):
    print(**dict(given))


def test_a_call_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match=r"can't tell what \*\* dict\(given\) holds"):
        passed(unreadable, "print")
    with pytest.raises(ValueError, match="expected one call of open, found 0"):
        passed(unreadable, "open")
