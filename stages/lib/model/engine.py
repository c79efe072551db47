"""The engine that trains and samples, "trl" or "unsloth": import it, refuse it where it can't run, close it."""

import importlib.util
import os
from pathlib import Path
from typing import Any, get_args

from stages.lib.errors import UserError
from stages.lib.recipe.tables import BitsandbytesOptimizer, Recipe, TorchOptimizer

# Folders of compiled kernels: a second start reads them and saves minutes on a rented GPU.
CACHES = {
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}

UNSLOTH = {
    # vLLM generates with the adapter merged into the weights, then restores them bit for bit: its LoRA kernels are
    # slower. Only for 16-bit weights: for others Unsloth says so and keeps those kernels.
    "UNSLOTH_VLLM_MERGED_ROLLOUT": "1",
    # Packed sequences need a block mask: without flash-attn or xformers it is as large as their length squared.
    "UNSLOTH_GRPO_SEQ_PACKING": "0",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}


def require_engine(recipe: Recipe) -> None:
    """Set the caches of engine "unsloth". Raises `UserError` without an NVIDIA GPU or one of its packages."""
    if recipe.model.engine != "unsloth":
        return
    for variable, folder in CACHES.items():
        os.environ.setdefault(variable, str(Path("data/cache", folder).absolute()))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"{recipe.path}: [model] engine = 'unsloth' needs an NVIDIA GPU; torch sees none. Run: make doctor; "
            f"or set engine = 'trl', which also runs on a CPU"
        )
    for package in ("unsloth", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{recipe.path}: [model] engine = 'unsloth' needs the package {package}, which is not installed here. "
                f"The CUDA image has it. Run: make RUNTIME=docker"
            )


def import_engine(recipe: Recipe) -> None:
    """Import the engine before trl and transformers, which it patches. Raises `UserError` for what is missing."""
    require_engine(recipe)
    for table, optimizer in (("sft", recipe.sft.optimizer), ("grpo", recipe.grpo.optimizer)):
        if optimizer in get_args(BitsandbytesOptimizer) and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"{recipe.path}: [{table}] optimizer = {optimizer!r} needs the package bitsandbytes, which is not "
                f"installed here; the CUDA image has it. Expected one of {', '.join(get_args(TorchOptimizer))}"
            )
    if recipe.model.engine != "unsloth":
        return
    os.environ["UNSLOTH_VLLM_STANDBY"] = str(int(recipe.vllm.standby))
    for variable, value in UNSLOTH.items():
        os.environ.setdefault(variable, value)
    import unsloth  # noqa: F401  (importing it patches TRL and transformers)
    from unsloth_zoo import rl_replacements

    # Dynamo unrolls the loop of the compiled function, four rounds a completion: with 64 completions or more the first
    # step compiles for minutes. This function loops around two small kernels and keeps no logits for the backward pass.
    recompute = rl_replacements.chunked_hidden_states_selective_log_softmax_recompute
    rl_replacements.chunked_hidden_states_selective_log_softmax = recompute


def close_engine(llm_engine: Any | None) -> None:
    """End vLLM's engine, if there is one, and torch's process group: left open, they hang at exit."""
    import torch

    if llm_engine is not None:
        llm_engine.engine_core.shutdown()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
