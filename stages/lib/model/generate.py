"""Completions of many prompts, with transformers (engine "trl") or vLLM (engine "unsloth")."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.ends import cut_after, end_ids
from stages.lib.model.engine import close_engine, require_engine
from stages.lib.model.files import whole_model_folder
from stages.lib.model.load import load_model
from stages.lib.model.locate import locate_model
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.tables import MAX_VLLM_RANK, Recipe

Batch = Callable[[Sequence[list[int]]], list[list[int]]]  # from prompts to their completions, token ids
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, MAX_VLLM_RANK)  # the values of max_lora_rank (vllm/config/lora.py)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy: top_p, top_k and min_p then have no effect."""

    max_completion_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # of what is drawn; None: the generator's, whatever was drawn before

    @property
    def drawn(self) -> dict[str, float]:
        """All but the limit and the seed, by the names that transformers and vLLM share."""
        return {name: value for name, value in vars(self).items() if name not in ("max_completion_tokens", "seed")}


@dataclass(frozen=True)
class Generator:
    """The base model, loaded once, and saved adapters by name."""

    model: Any  # a transformers or PEFT model, or vLLM's LLM
    tokenizer: Any
    ends: list[int]  # token ids that end a completion
    adapters: dict[str, Path]


@contextlib.contextmanager
def open_generator(
    recipe: Recipe, adapters: dict[str, Path], max_completion_tokens: int, seed: int
) -> Iterator[Generator]:
    """Yield the recipe's base model, ready to complete prompts with each of `adapters` or none."""
    require_engine(recipe)
    tokenizer = load_tokenizer(recipe)
    if recipe.model.engine == "unsloth":
        max_tokens = recipe.data.max_prompt_tokens + max_completion_tokens
        generator = load_vllm(recipe, adapters, tokenizer, max_tokens, seed)
    else:
        generator = load_transformers(recipe, adapters, tokenizer, seed)
    try:
        yield generator
    finally:
        close_engine(getattr(generator.model, "llm_engine", None))


def load_transformers(recipe: Recipe, adapters: dict[str, Path], tokenizer: Any, seed: int) -> Generator:
    """Return the base with every adapter on it, on the GPU if there is one."""
    import torch
    from peft import PeftModel

    torch.manual_seed(seed)
    model = load_model(recipe)
    ends = end_ids(model.generation_config, tokenizer)
    for name, adapter in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
    return Generator(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, ends, adapters)


def load_vllm(recipe: Recipe, adapters: dict[str, Path], tokenizer: Any, max_tokens: int, seed: int) -> Generator:
    """Return vLLM, in this process, with the base as in training, for sequences of up to `max_tokens`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process of its own could outlive this one
    from transformers import GenerationConfig
    from vllm import LLM

    folder = whole_model_folder(*locate_model(recipe))
    configuration = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None
    model = LLM(
        model=str(folder),
        dtype=recipe.model.dtype,
        quantization="bitsandbytes" if recipe.model.load_in_4bit else None,
        max_model_len=max_tokens,
        max_num_seqs=recipe.vllm.sequences,
        gpu_memory_utilization=recipe.vllm.memory_share,
        enable_lora=bool(adapters),
        max_lora_rank=min(rank for rank in VLLM_RANKS if rank >= recipe.lora.rank),
        max_loras=1,
        seed=seed,
        trust_remote_code=False,
    )
    return Generator(model, tokenizer, end_ids(configuration, tokenizer), adapters)


def generate_completions(
    generator: Generator,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    *,
    adapter: str | None = None,
    advance: Callable[[int], Any] = lambda done: None,
) -> list[list[int]]:
    """Return one completion a prompt, as token ids up to the one that ends it, that one included.

    `prompts`: token ids with the generation prompt; `adapter`: None for the base; `advance`: told each batch's size.
    """
    vllm = hasattr(generator.model, "llm_engine")
    batch = (vllm_batch if vllm else transformers_batch)(generator, sampling, adapter)
    completions = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        completions += [cut_after(ids, generator.ends) for ids in batch(part)]
        advance(len(part))
    return completions


def transformers_batch(generator: Generator, sampling: Sampling, adapter: str | None) -> Batch:
    """Return a function from a batch of prompts to transformers' completions of them, padding included."""
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    model, pad = generator.model, generator.tokenizer.pad_token_id
    if isinstance(model, PeftModel):
        model.base_model.enable_adapter_layers() if adapter else model.base_model.disable_adapter_layers()
        if adapter:
            model.set_adapter(adapter)
    greedy = {"repetition_penalty": sampling.repetition_penalty}
    # Not arguments of generate(): for those left out it takes the values that the model's publisher chose.
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_completion_tokens,
        do_sample=sampling.temperature > 0,
        **(sampling.drawn if sampling.temperature > 0 else greedy),
        eos_token_id=generator.ends,
        pad_token_id=pad,
        disable_compile=True,
    )
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        inputs = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        with torch.inference_mode():
            return model.generate(input_ids=inputs, attention_mask=mask)[:, width:].tolist()

    return generate


def vllm_batch(generator: Generator, sampling: Sampling, adapter: str | None) -> Batch:
    """Return a function from a batch of prompts to vLLM's completions of them."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    seeds = itertools.repeat(None) if sampling.seed is None else itertools.count(sampling.seed)  # one a completion

    def parameters() -> Any:
        return SamplingParams(
            max_tokens=sampling.max_completion_tokens,
            **sampling.drawn,
            stop_token_ids=generator.ends,
            detokenize=False,
            seed=next(seeds),
        )

    number = {name: number for number, name in enumerate(generator.adapters, 1)}
    request = LoRARequest(adapter, number[adapter], str(generator.adapters[adapter])) if adapter else None

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        each = [parameters() for _ in prompts]
        outputs = generator.model.generate(inputs, each, lora_request=request, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate
