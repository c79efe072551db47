"""The models that engine "unsloth" samples from: vLLM has a network for them, and Unsloth trains on its weights."""

from typing import Any

from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe

# Architectures in vLLM 0.26.0's registry (vllm/model_executor/models/registry.py: text generation, multimodal, and
# those it runs by transformers) that the locked transformers can train. tests/gpu/test_signatures.py holds them to the
# installed package.
ARCHITECTURES = frozenset(
    """
    AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM AriaForConditionalGeneration
    Blip2ForConditionalGeneration BloomForCausalLM ChameleonForConditionalGeneration Cohere2ForCausalLM
    Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereForCausalLM
    Cosmos3EdgeForConditionalGeneration CwmForCausalLM DbrxForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM
    DeepseekV3ForCausalLM DeepseekV4ForCausalLM DiffusionGemmaForBlockDiffusion Emu3ForConditionalGeneration
    Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM
    Exaone4_5_ForConditionalGeneration FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM
    FlexOlmoForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration
    Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM
    Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration
    Glm4vMoeForConditionalGeneration GlmForCausalLM GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration
    GptOssForCausalLM Granite4VisionForConditionalGeneration GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM HYV3ForCausalLM HrmTextForCausalLM
    HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration HyperCLOVAXForCausalLM
    Idefics3ForConditionalGeneration InklingForCausalLM InklingForConditionalGeneration
    InternVLForConditionalGeneration Jais2ForCausalLM JambaForCausalLM KimiLinearForCausalLM LagunaForCausalLM
    Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration Llama4ForCausalLM
    Llama4ForConditionalGeneration LlamaForCausalLM LlavaForConditionalGeneration LlavaNextForConditionalGeneration
    LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration LongcatFlashForCausalLM
    Mamba2ForCausalLM MambaForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM
    MiniCPMV4_6ForConditionalGeneration MiniMaxM2ForCausalLM MiniMaxM3SparseForConditionalGeneration
    Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM MixtralForCausalLM MptForCausalLM
    NemotronForCausalLM NemotronHForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM
    OlmoHybridForCausalLM OlmoeForCausalLM PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration
    Phi3ForCausalLM PhiForCausalLM QianfanOCRForConditionalGeneration Qwen2ForCausalLM Qwen2MoeForCausalLM
    Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM
    Qwen3NextForCausalLM Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration SeedOssForCausalLM SmolLM3ForCausalLM
    SmolVLMForConditionalGeneration StableLmForCausalLM Starcoder2ForCausalLM Step3p7ForConditionalGeneration
    Zamba2ForCausalLM
    """.split()
)
# Of Unsloth 2026.10.9: models whose weights it does not share with vLLM (models/loader.py), and those that read images
# or sound whose weights it does (models/vision.py).
UNSHARED = ("gpt_oss",)
WITH_IMAGES = (
    "qwen2_5_vl", "gemma3", "mistral3", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "idefics3", "qwen3_5_moe", "gemma4",
    "gemma4_text", "gemma4_unified", "gemma4_unified_text", "muse_glimmer", "muse_glimmer_text",
)  # fmt: skip


def refuse_unsampled(recipe: Recipe, config: dict[str, Any]) -> None:
    """Raise `UserError` if engine "unsloth" could train the model of this config.json and not sample from it."""
    if recipe.model.engine != "unsloth":
        return
    architecture, kind = (config.get("architectures") or [""])[0], config.get("model_type")
    if architecture not in ARCHITECTURES:
        found = f"vLLM 0.26.0 has no network {architecture!r}"
    elif kind in UNSHARED:
        found = f"Unsloth does not share the weights of a {kind!r} with vLLM"
    elif "vision_config" in config and kind not in WITH_IMAGES:
        found = f"of models that read images Unsloth shares no {kind!r} with vLLM, only {', '.join(WITH_IMAGES)}"
    else:
        return
    raise UserError(
        f"{recipe.path}: make grpo would fail with {recipe.model.name}: {found}, and engine = 'unsloth' samples by "
        f"vLLM. Set [model] engine = 'trl', or choose another base model"
    )
