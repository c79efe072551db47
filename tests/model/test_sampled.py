"""Models that engine "unsloth" could not sample from are refused before the training."""

import dataclasses

import pytest

from stages.lib.errors import UserError
from stages.lib.model.sampled import refuse_unsampled
from tests.support import published_configs as configs
from tests.support.arguments import RECIPES

UNSLOTH = next(recipe for recipe in RECIPES.values() if recipe.model.engine == "unsloth")


@pytest.mark.parametrize("config", [configs.QWEN_2_5, configs.QWEN_3_5, configs.GEMMA_4, configs.PHI_4, configs.LFM_2])
def test_what_vllm_and_unsloth_share_is_taken(config):
    refuse_unsampled(UNSLOTH, config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["UnheardOf"], "model_type": "x"}, "vLLM 0.26.0 has no network 'UnheardOf'"),
        ({"model_type": "x"}, "vLLM 0.26.0 has no network ''"),
        (configs.GPT_OSS, "does not share the weights of a 'gpt_oss'"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {}},
            "shares no 'llava' with vLLM",
        ),
    ],
)
def test_what_they_do_not_share_is_refused_for_that_engine_alone(config, reason):
    with pytest.raises(UserError, match=f"make grpo would fail with .*{reason}(.|\\n)*engine = 'trl'"):
        refuse_unsampled(UNSLOTH, config)
    model = dataclasses.replace(UNSLOTH.model, engine="trl")
    refuse_unsampled(dataclasses.replace(UNSLOTH, model=model), config)
