"""Unsloth's model with a LoRA adapter, and its GRPO without the scoring pass."""

import os
import sys
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError
from stages.lib.model.files import whole_model_folder
from stages.lib.model.locate import SAFE, locate_model
from stages.lib.model.lora import lora_settings, require_modules
from stages.lib.recipe.tables import Recipe


def load_unsloth(recipe: Recipe, adapter: Path | None) -> Any:
    """Return Unsloth's model: see `load_trainable`."""
    import torch
    from transformers import GenerationConfig
    from unsloth import FastLanguageModel  # isort: skip  (`import_engine` imported it before transformers)

    # A folder, not a hub name: vLLM takes no revision, and Unsloth replaces a name by another repository's.
    folder = whole_model_folder(*locate_model(recipe))
    vllm = adapter is not None  # for GRPO, which samples
    own = int(os.environ.get("RANK", "0"))
    max_tokens = recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens if vllm else recipe.sft.max_tokens
    sequences = recipe.vllm.sequences + (recipe.vllm.sequences == 256)  # Unsloth reads 256 as "not given"
    checkpointing = "unsloth" if (recipe.grpo if vllm else recipe.sft).gradient_checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=max_tokens,
        dtype=getattr(torch, recipe.model.dtype),
        load_in_4bit=recipe.model.load_in_4bit,
        full_finetuning=False,
        **({"gpu_memory_utilization": recipe.vllm.memory_share, "max_num_seqs": sequences} if vllm else {}),
        fast_inference=vllm,
        max_lora_rank=recipe.lora.rank,
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
        random_state=recipe.sft.seed + (own if vllm else 0),  # vLLM's seed too: no two ranks draw the same
        **SAFE,
    )
    if (folder / "generation_config.json").is_file():  # the model rebuilt from vLLM's weights has none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    require_modules(recipe, model)
    model = FastLanguageModel.get_peft_model(
        model,
        **lora_settings(recipe),
        use_gradient_checkpointing=checkpointing,
        random_state=recipe.sft.seed,
        max_seq_length=max_tokens,
    )
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def load_adapter(model: Any, adapter: Path) -> None:
    """Load the weights saved in `adapter` into the adapter on `model`. Raises `UserError` when they don't fit it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"{adapter}: is not an adapter for this recipe's [lora]: it lacks {len(missing)} expected weights and has "
            f"{len(result.unexpected_keys)} others, such as {[*missing, *result.unexpected_keys][0]}. Run: make sft"
        )


def needs_scoring_pass(recipe: Recipe) -> bool:
    """Return whether GRPO has to score completions: for a second round (`num_iterations`), a KL penalty (`beta`)."""
    return recipe.grpo.num_iterations > 1 or recipe.grpo.beta > 0


def skip_scoring_pass(recipe: Recipe, trainer: Any) -> None:
    """Take the scoring pass out of Unsloth's GRPO `trainer`, unless it is needed.

    The importance-sampling correction compares vLLM's log-probabilities with the trainer's. While one optimizer step
    takes all its completions, the training pass computes these anyway: that saves a quarter of the arithmetic.
    """
    if recipe.model.engine != "unsloth" or needs_scoring_pass(recipe):
        return
    module: Any = sys.modules[type(trainer).__module__]
    loss = module.UnslothEfficientGRPO

    class OnPolicy(loss):  # type: ignore[misc, valid-type]  # a class written by Unsloth
        @staticmethod
        def forward(ctx, new, old, *rest):
            return loss.forward(ctx, new, new if old is None else old, *rest)

    module.UnslothEfficientGRPO = OnPolicy
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (None, None, None)
