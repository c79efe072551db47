"""Models that people have, and what Temper says to each: the rows of docs/models.md.

Their vocabularies are stand-ins, StarCoder's byte-level one and Llama's pieces for Gemma: those are the smallest, and
`test_families.py` has the real ones. The network is the one published, made small by the rehearsal itself, and where
models share a network (`like`) one of them is rehearsed.
"""

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.lib.recipe.tables import Recipe
from tests.support import published_configs as configs
from tests.support.family_models import GEMMA3, QWEN_SPLIT, byte_level, sentencepiece

END = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # DeepSeek's
MODULES = ("q_proj", "v_proj", "down_proj")  # as in the recipes, of Llama's names
PHI = ("qkv_proj", "o_proj", "down_proj")
GRANITE = ("q_proj", "v_proj", "output_linear")
DISTILL = "deepseek-ai-DeepSeek-R1-Distill"
LLAMA_32, PHI_4_MINI = "meta-llama/Llama-3.2-1B-Instruct", "microsoft/Phi-4-mini-instruct"
GRANITE_TEMPLATE = "ibm-granite-granite-4.0"
VOCABULARIES = {  # with the token that ends a turn
    "starcoder": (byte_level("starcoder", None, None, "GPT2Tokenizer"), "<|im_end|>"),
    "qwen2": (byte_level("starcoder", QWEN_SPLIT, None, "Qwen2Tokenizer"), "<|im_end|>"),
    "gemma-3": (sentencepiece("llama-spm", ["<start_of_turn>", "<end_of_turn>"], GEMMA3), "<end_of_turn>"),
    "gemma-4": (sentencepiece("llama-spm", ["<|turn>", "<turn|>"], GEMMA3 | {"eos_token": "<turn|>"}), "<turn|>"),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published model, and the recipe's settings with which it is taken; `refused` is a pattern of the reason."""

    name: str
    config: dict[str, Any]
    vocabulary: str
    template: str  # of llama.cpp, or of `chat_templates`
    end: str = ""  # the token that ends a turn, where the vocabulary has another
    refused: str = ""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    format: str = "xml"
    save: tuple[str, ...] = ("lora",)
    modules: tuple[str, ...] = MODULES
    like: str = ""  # the model that is rehearsed for it too: the same network and modules, and more in its config.json

    def row(self) -> str:
        """Return the model's row of the table in docs/models.md; of a refused one without the reason."""
        if self.refused:
            return f"| `{self.name}` | refused |"
        settings = []
        if self.format != "xml":
            settings.append(f'`[format] name = "{self.format}"`')
        if self.template_kwargs:
            written = ", ".join(f"{key} = {json.dumps(value)}" for key, value in self.template_kwargs.items())
            settings.append(f"`[format] template_kwargs = {{{written}}}`")
        if self.modules != MODULES:
            settings.append(f"modules such as {', '.join(f'`{name}`' for name in self.modules)}")
        if not self.save:
            settings.append('no `"lora"` in `save`')
        return f"| `{self.name}` | taken | {'; '.join(settings)} |"


NO_THINKING = {"enable_thinking": False}
PUBLISHED = [
    Published("HuggingFaceTB/SmolLM2-135M-Instruct", configs.SMOLLM_2, "starcoder", "SmolLM2", like=LLAMA_32),
    Published(
        "HuggingFaceTB/SmolLM3-3B", configs.SMOLLM_3, "starcoder", "HuggingFaceTB-SmolLM3-3B", end="<|im_end|>"
    ),
    Published("Qwen/Qwen2.5-3B-Instruct", configs.QWEN_2_5, "qwen2", "Qwen-Qwen2.5-7B-Instruct"),
    Published("Qwen/Qwen3-1.7B", configs.QWEN_3_17B, "qwen2", "Qwen-Qwen3-0.6B", template_kwargs=NO_THINKING),
    Published("Qwen/Qwen3-4B-Instruct-2507", configs.QWEN_3_4B_2507, "qwen2", "chatml", like="Qwen/Qwen3-1.7B"),
    Published("Qwen/Qwen3.5-4B", configs.QWEN_3_5, "qwen2", "Qwen3.5-4B", template_kwargs=NO_THINKING),
    Published(
        "meta-llama/Llama-3.1-8B-Instruct", configs.LLAMA_31_8B, "starcoder", "meta-llama-Llama-3.1-8B-Instruct",
        end="<|eot_id|>",
        like=LLAMA_32,
    ),
    Published(
        LLAMA_32, configs.LLAMA_32_1B, "starcoder", "meta-llama-Llama-3.2-3B-Instruct",
        end="<|eot_id|>",
    ),
    Published("google/gemma-3-270m-it", configs.GEMMA_3_270M, "gemma-3", "gemma-3", like="google/gemma-3-1b-it"),
    Published("google/gemma-3-1b-it", configs.GEMMA_3_1B, "gemma-3", "gemma-3"),
    Published("google/gemma-3-4b-it", configs.GEMMA_3_4B, "gemma-3", "gemma-3"),
    Published("google/gemma-4-E2B-it", configs.GEMMA_4, "gemma-4", "google-gemma-4-31B-it", format="think"),
    Published("google/gemma-4-31B-it", configs.GEMMA_4_31B, "gemma-4", "google-gemma-4-31B-it", format="think"),
    Published("microsoft/phi-4", configs.PHI_4, "starcoder", "phi-4", modules=PHI, like=PHI_4_MINI),
    Published(PHI_4_MINI, configs.PHI_4_MINI, "starcoder", "phi-4-mini", "<|end|>", modules=PHI),
    Published(
        "mistralai/Ministral-3-3B-Reasoning-2512", configs.mistral3(configs.MINISTRAL_3), "starcoder",
        "mistralai-Ministral-3-14B-Reasoning-2512", end="</s>", save=(),
    ),
    Published(
        "mistralai/Ministral-3-3B-Instruct-2512",
        configs.mistral3(configs.MINISTRAL_3) | {"quantization_config": configs.FP8}, "starcoder", "mistral",
        refused=r"its weights are quantized \(fp8",
    ),
    Published(
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503", configs.mistral3(configs.MISTRAL_SMALL), "starcoder",
        "Mistral-Small-3.2-24B-Instruct-2506", end="</s>", save=(),
    ),
    Published(
        "ibm-granite/granite-4.0-micro", configs.GRANITE_4, "starcoder", GRANITE_TEMPLATE, end="<|end_of_text|>",
        save=(), modules=GRANITE,
    ),
    Published(
        "ibm-granite/granite-4.0-h-tiny", configs.GRANITE_4_TINY, "starcoder", GRANITE_TEMPLATE, end="<|end_of_text|>",
        modules=GRANITE,
    ),
    Published("allenai/OLMo-2-0425-1B-Instruct", configs.OLMO_2, "starcoder", "olmo-2"),
    Published(
        "LiquidAI/LFM2-1.2B", configs.LFM_2, "starcoder", "LFM2.5-Instruct",
        modules=("q_proj", "v_proj", "in_proj", "w2"),
    ),
    Published(
        "openai/gpt-oss-20b", configs.GPT_OSS | {"quantization_config": configs.MXFP4}, "starcoder",
        "openai-gpt-oss-120b", end="<|return|>", refused=r"its weights are quantized \(mxfp4",
    ),
    Published(
        "unsloth/gpt-oss-20b-BF16", configs.GPT_OSS, "starcoder", "openai-gpt-oss-120b", end="<|return|>",
        format="think", modules=("q_proj", "v_proj", "o_proj"),
    ),
    Published(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", configs.DISTILL_QWEN, "qwen2", f"{DISTILL}-Qwen-32B", END,
        format="think",
        like="Qwen/Qwen2.5-3B-Instruct",
    ),
    Published(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", configs.LLAMA_31_8B | {"eos_token_id": 128001}, "starcoder",
        f"{DISTILL}-Llama-8B", END, format="think",
        like=LLAMA_32,
    ),
]  # fmt: skip


def write(model: Published, folder: Path) -> Path:
    """Write the model's config.json and tokenizer to `folder`, and no weights; return it.

    The embedding has a row a token of the stand-in: as many as were published would take most of a rehearsal's time.
    """
    from transformers import AutoTokenizer

    folder.mkdir(parents=True)
    writer, end = VOCABULARIES[model.vocabulary]
    writer(folder, model.template, model.end or end)
    config = copy.deepcopy(model.config)
    text, rows = config.get("text_config", config), len(AutoTokenizer.from_pretrained(folder))
    text |= {"vocab_size": rows} | ({"vocab_size_per_layer_input": rows} if model.vocabulary == "gemma-4" else {})
    if text.get("pad_token_id"):
        text["pad_token_id"] = min(text["pad_token_id"], rows - 1)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def recipe_of(model: Published, folder: Path, recipe: Recipe) -> Recipe:
    """Return `recipe` for the model that `write` wrote to `folder`."""
    replace = dataclasses.replace
    return replace(
        recipe, model_folder=folder, model=replace(recipe.model, name=model.name), save=["gguf", *model.save],
        lora=replace(recipe.lora, target_modules=list(model.modules)),
        format=replace(recipe.format, name=model.format, template_kwargs=model.template_kwargs),
    )  # fmt: skip
