"""Where a recipe's model comes from, how it and its tokenizer are loaded, and what its engine changes."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, get_args

from stages.lib import formats, weights
from stages.lib.errors import UserError, nearest
from stages.lib.recipe import BitsandbytesOptimizer, Model, Recipe, TorchOptimizer, is_hub_name

SAFE = {"trust_remote_code": False}  # no code out of a model repository ever runs here

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


def require_gpu(recipe: Recipe) -> None:
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


def start(recipe: Recipe) -> None:
    """Import the trainer's engine. Call it before trl, transformers or peft is imported: Unsloth patches them.

    Raises `UserError` as `require_gpu` does, and when the package of an optimizer is missing.
    """
    require_gpu(recipe)
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
    import unsloth  # noqa: F401
    from unsloth_zoo import rl_replacements

    # The compiled one is a loop that Dynamo unrolls, four rounds a completion: with 64 or more completions the first
    # step compiles for minutes. This one is a loop around two small kernels, and keeps no logits for the backward pass.
    recompute = rl_replacements.chunked_hidden_states_selective_log_softmax_recompute
    rl_replacements.chunked_hidden_states_selective_log_softmax = recompute


def locate(model: Model, base_model: Path | None) -> tuple[str, str | None]:
    """Return what `from_pretrained` takes: a folder or hub name, and the hub revision (None for a folder).

    `base_model` is the finished artifact of the base-model stage, for recipes that make their own.
    Raises `UserError` when there is no such model folder or it lacks the weights' configuration.
    """
    if model.name == "base-model":
        if base_model is None:
            raise UserError("the recipe's model is the one that base-model makes; name it with --base-model FOLDER")
        return str(base_model / "model"), None
    if is_hub_name(model.name):
        return model.name, model.revision
    folder = Path(model.name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: expected a model folder with config.json, from the recipe's [model] name")
    return str(folder), None


def load_tokenizer(recipe: Recipe, base_model: Path | None) -> Any:
    """Return the model's tokenizer with the chat template that this run trains and ships.

    Raises `UserError` when a local model folder has no tokenizer, or when neither model nor format has a chat template.
    """
    from transformers import AutoTokenizer

    name, revision = locate(recipe.model, base_model)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise UserError(f"{name}: the model folder has no tokenizer; expected one of {', '.join(files)}")
    with weights.fetching(name, revision):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **SAFE)
    template = formats.get(recipe.format.name).chat_template
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name}: the tokenizer has no chat template and format {recipe.format.name!r} brings none; "
            f"choose an instruction-tuned model, or [format] name = 'think'"
        )
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = spare_token(tokenizer) or tokenizer.eos_token
    return tokenizer


def spare_token(tokenizer: Any) -> str | None:
    """Return a special token that no conversation holds, one called a pad if there is one; None if there is none.

    What pads must not be what ends a turn: Unsloth finds the padding of a batch by its token, and would take the end of
    the user's turn for it.
    """
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    held = {*tokenizer.apply_chat_template(turns, return_dict=False), tokenizer.eos_token_id, tokenizer.bos_token_id}
    added = sorted(tokenizer.added_tokens_decoder.items())
    spare = [token.content for number, token in added if token.special and number not in held]
    return min(spare, key=lambda token: "pad" not in token.lower(), default=None)


def load_model(recipe: Recipe, base_model: Path | None) -> Any:
    """Return the base model in the recipe's dtype, as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    name, revision = locate(recipe.model, base_model)
    dtype = getattr(torch, recipe.model.dtype)
    with weights.fetching(name, revision):
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True, **SAFE)


def load_trainable(
    recipe: Recipe, base_model: Path | None, adapter: Path | None, max_tokens: int, memory_share: float | None = None
) -> Any:
    """Return the base model with a LoRA adapter to train: a new one, or that saved in `adapter`. `start` comes first.

    Engine "unsloth" makes it for sequences of up to `max_tokens` and, where `memory_share` of the GPU is named, with a
    vLLM engine on the same weights, as its attribute `vllm_engine`.
    """
    if recipe.model.engine == "unsloth":
        return load_unsloth(recipe, base_model, adapter, max_tokens, memory_share)
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load_model(recipe, base_model)
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    require_modules(recipe, model)
    settings = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=adapted_modules(recipe),
        bias="none",
        use_rslora=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def adapted_modules(recipe: Recipe) -> str | list[str]:
    """Return PEFT's `target_modules`: its word for all linear layers, or the recipe's list."""
    modules = recipe.lora.target_modules
    return "all-linear" if modules == ["all-linear"] else modules


def require_modules(recipe: Recipe, model: Any) -> None:
    """Raise `UserError` for a name among `[lora] target_modules` that no module of `model` has: PEFT passes over it."""
    named = [name for name in recipe.lora.target_modules if name != "all-linear"]
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    for name in named:
        if name.rpartition(".")[2] not in found:
            raise UserError(
                f"{recipe.path}: [lora] target_modules names {name!r}, and {recipe.model.name} has no such "
                f"module{nearest(name, found)}; it has {', '.join(sorted(found - {''}))}"
            )


def load_unsloth(
    recipe: Recipe, base_model: Path | None, adapter: Path | None, max_tokens: int, memory_share: float | None
) -> Any:
    """Return Unsloth's model: see `load_trainable`."""
    import torch
    from transformers import GenerationConfig
    from unsloth import FastLanguageModel  # isort: skip  (`start` imported it before transformers)

    # A folder, not a hub name: vLLM can't be given a revision, and Unsloth puts other repositories in a name's place.
    folder = weights.whole_folder(*locate(recipe.model, base_model))
    vllm = memory_share is not None
    sequences = recipe.vllm.sequences + (recipe.vllm.sequences == 256)  # Unsloth takes 256 for "not said"
    checkpointing = "unsloth" if (recipe.grpo if vllm else recipe.sft).gradient_checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=max_tokens,
        dtype=getattr(torch, recipe.model.dtype),
        load_in_4bit=recipe.model.load_in_4bit,
        full_finetuning=False,
        **({"gpu_memory_utilization": memory_share, "max_num_seqs": sequences} if vllm else {}),
        fast_inference=vllm,
        max_lora_rank=recipe.lora.rank,
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
        random_state=recipe.sft.seed,
        **SAFE,
    )
    if (folder / "generation_config.json").is_file():  # the model that is rebuilt from vLLM's weights has none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    require_modules(recipe, model)
    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=adapted_modules(recipe),
        bias="none",
        use_rslora=False,
        use_gradient_checkpointing=checkpointing,
        random_state=recipe.sft.seed,
        max_seq_length=max_tokens,
    )
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def load_adapter(model: Any, adapter: Path) -> None:
    """Give the adapter on `model` the weights saved in `adapter`. Raises `UserError` when they don't fit it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"{adapter}: is not an adapter for this recipe's [lora]: it lacks {len(missing)} of the weights and has "
            f"{len(result.unexpected_keys)} others, such as {[*missing, *result.unexpected_keys][0]}. Run: make sft"
        )


def scores_first(recipe: Recipe) -> bool:
    """Return whether GRPO needs a pass that scores completions before it trains on them.

    A second round over the same completions (`num_iterations`) and a pull to the base model (`beta`) do.
    """
    return recipe.grpo.num_iterations > 1 or recipe.grpo.beta > 0


def spare_scoring(recipe: Recipe, trainer: Any) -> None:
    """Spare Unsloth's GRPO `trainer` the pass that scores completions before training on them, unless it is needed.

    The importance-sampling correction holds vLLM's log-probabilities against the trainer's own. While one optimizer
    step takes all that was generated for it, those are what the training pass computes anyway: a quarter of its
    arithmetic saved.
    """
    if recipe.model.engine != "unsloth" or scores_first(recipe):
        return
    module = sys.modules[type(trainer).__module__]
    loss = module.UnslothEfficientGRPO

    class OnPolicy(loss):
        @staticmethod
        def forward(ctx, new, old, *rest):
            return loss.forward(ctx, new, new if old is None else old, *rest)

    module.UnslothEfficientGRPO = OnPolicy
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (None, None, None)


def close(llm_engine: Any | None) -> None:
    """End vLLM's engine, if there is one, and torch's process group: left open, they hang at exit."""
    import torch

    if llm_engine is not None:
        llm_engine.engine_core.shutdown()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_ids(generation_config: Any | None, tokenizer: Any) -> list[int]:
    """Return the token ids at which a completion ends: those of the generation config, and the tokenizer's own."""
    stated = generation_config.eos_token_id if generation_config is not None else None
    stated = [] if stated is None else [stated] if isinstance(stated, int) else stated
    return sorted({*stated, tokenizer.eos_token_id})
