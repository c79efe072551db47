"""The engine that trains and samples, "trl" or "unsloth": imported, refused where it can not run, closed."""

import importlib.util
import os
from pathlib import Path
from typing import Any, get_args

from stages.lib.errors import UserError
from stages.lib.recipe.tables import BitsandbytesOptimizer, Recipe, TorchOptimizer

# Where compilers keep what they made, so that a second start does not compile again: minutes on a rented GPU.
CACHES = {
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}

UNSLOTH = {
    # vLLM generates with the adapter folded into the weights, which are unfolded again, bit for bit: its own LoRA
    # kernels take longer. Only for 16-bit weights; Unsloth says so and goes on with those kernels for others.
    "UNSLOTH_VLLM_MERGED_ROLLOUT": "1",
    # One long row of all sequences needs a block mask: without flash-attn or xformers a square of its length.
    "UNSLOTH_GRPO_SEQ_PACKING": "0",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}


def require_engine(recipe: Recipe) -> None:
    """Raise `UserError` when engine "unsloth" has no NVIDIA GPU or its packages are missing; say where caches are."""
    if recipe.model.engine != "unsloth":
        return
    for variable, folder in CACHES.items():
        os.environ.setdefault(variable, str(Path("data/cache", folder).absolute()))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"{recipe.path}: [model] engine = 'unsloth' needs an NVIDIA GPU and torch sees none. Run: make doctor; "
            f"or set engine = 'trl', which also runs on a CPU"
        )
    for package in ("unsloth", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{recipe.path}: [model] engine = 'unsloth' needs the package {package}, which is not installed here. "
                f"It comes with the CUDA image: make RUNTIME=docker"
            )


def import_engine(recipe: Recipe) -> None:
    """Import the trainer's engine. Call it before trl, transformers or peft is imported: Unsloth patches them.

    Raises `UserError` as `require_gpu` does, and when the package of an optimizer is missing.
    """
    require_engine(recipe)
    for table, optimizer in (("sft", recipe.sft.optimizer), ("grpo", recipe.grpo.optimizer)):
        needed = optimizer in get_args(BitsandbytesOptimizer)
        if needed and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"{recipe.path}: [{table}] optimizer = {optimizer!r} needs the package bitsandbytes, which is not "
                f"installed here: it comes with the CUDA image. Expected one of {', '.join(get_args(TorchOptimizer))}"
            )
    if recipe.model.engine != "unsloth":
        return
    os.environ["UNSLOTH_VLLM_STANDBY"] = str(int(recipe.vllm.standby))
    for variable, value in UNSLOTH.items():
        os.environ.setdefault(variable, value)
    import unsloth  # noqa: F401  (importing it patches TRL and transformers)
    from unsloth_zoo import rl_replacements

    # The compiled one is a loop that Dynamo unrolls, four rounds a completion: with 64 or more completions the first
    # step compiles for minutes. This one is a loop around two small kernels, and keeps no logits for the backward pass.
    recompute = rl_replacements.chunked_hidden_states_selective_log_softmax_recompute
    rl_replacements.chunked_hidden_states_selective_log_softmax = recompute


def close_engine(llm_engine: Any | None) -> None:
    """End vLLM's engine, if there is one, and torch's process group: left open, they hang at exit."""
    import torch

    if llm_engine is not None:
        llm_engine.engine_core.shutdown()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
