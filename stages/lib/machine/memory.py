"""The GPU memory that a recipe needs, estimated part by part from its model's shape alone.

Nothing is loaded and nothing is measured here. Every part has a name of its own: a measured peak can be compared with
the estimate, and the part that is off be fixed. Counted are the tensors that are alive at once when a step needs most,
for a LoRA adapter on a frozen base.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stages.lib.machine.findings import Finding, gigabytes
from stages.lib.machine.shape import LINEAR_LAYERS, Shape
from stages.lib.recipe.tables import Grpo, Lora, Recipe, Sft

# NF4 with double quantization (arXiv 2305.14314): 4 bits, an 8-bit scale a block of 64 weights, and a float32 scale for
# 256 of those.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
ADAPTER_BYTES = 4  # a LoRA weight, and likewise its gradient: float32
LOGIT_BYTES = 16  # the row, its float32 copy, the log-probabilities and their gradient
UNSLOTH_SFT_CHUNK_BYTES = 4 << 30  # the most that a chunk of its fused loss takes (unsloth_zoo, cross_entropy_loss.py)
UNSLOTH_GRPO_CHUNKS = 4  # of a sequence's logits, at the least (unsloth_zoo, rl_replacements.py)
OFFLOADED_LAYERS = 2  # of which inputs are on the GPU at once when Unsloth keeps the layers' inputs in system memory
CUDA_BYTES = 600_000_000  # context, libraries' workspaces
VLLM_GRAPH_BYTES = 1_000_000_000  # captured CUDA graphs
VLLM_BATCH_TOKENS = 8192  # vLLM's max_num_batched_tokens: the prompts it reads at once
SAMPLER_BYTES = 8  # a logit in vLLM's sampler: float32, and a copy to sort or normalize
FRAGMENTS = 0.1  # of what comes and goes within a step: memory that torch's allocator holds and can't use
# What Phi 3, Granite 4 and LFM2 call those of `LINEAR_LAYERS`, or several of them in one.
OTHER_NAMES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "out_proj": ("o_proj",),
    "input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",),
    "w1": ("gate_proj",), "w3": ("up_proj",), "w2": ("down_proj",),
}  # fmt: skip
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Estimate:
    """The GPU memory that a stage takes, in bytes by part."""

    parts: dict[str, int]
    takes_turns: bool = False  # the KV cache and what a training step needs are never there at the same time

    @property
    def peak_bytes(self) -> int:
        """The most bytes taken at once."""
        step = sum(self.parts.get(name, 0) for name in ("layer inputs", "activations", "logits", "fragments"))
        return sum(self.parts.values()) - (min(step, self.parts.get("KV cache", 0)) if self.takes_turns else 0)


def weight_bytes(shape: Shape, dtype: str, load_in_4bit: bool = False) -> int:
    """Return the bytes of the weights: with `load_in_4bit` the layers' linear ones as NF4, all others in `dtype`."""
    if not load_in_4bit:
        return shape.parameters * DTYPE_BYTES[dtype]
    others = shape.parameters - shape.linear_parameters
    return int(shape.linear_parameters * NF4_BITS / 8) + others * DTYPE_BYTES[dtype]


def adapter_parameters(shape: Shape, lora: Lora) -> int:
    """Return the number of weights of a LoRA adapter (arXiv 2106.09685): rank x (inputs + outputs) of each layer."""
    return shape.layers * lora.rank * sum(sum(shape.linear[name]) for name in adapted(lora.target_modules))


def adapted(target_modules: Sequence[str]) -> list[str]:
    """Return those of `LINEAR_LAYERS` that `target_modules` means: by name, by another family's, or ["all-linear"]."""
    meant = {each for name in target_modules for each in OTHER_NAMES.get(name, (name,))}
    return [name for name in LINEAR_LAYERS if name in meant or "all-linear" in meant]


def kv_bytes(shape: Shape, tokens: int) -> int:
    """Return the bytes of a sequence's 16-bit KV cache; sliding layers keep no more tokens than their window."""
    layers = shape.layers if shape.attention_layers is None else shape.attention_layers
    full = (layers - shape.sliding_layers) * tokens
    sliding = shape.sliding_layers * min(tokens, shape.sliding_window)
    return 2 * 2 * shape.kv_heads * shape.head_dim * (full + sliding)


def training_parts(shape: Shape, recipe: Recipe, knobs: Sft | Grpo, tokens: int, logit_rows: int) -> dict[str, int]:
    """Return the parts, in bytes, of one forward and backward pass over `tokens` tokens, padding included.

    `knobs` is the trainer's table of `recipe`. `logit_rows` is how many tokens have their logits in memory at once.
    Gradient checkpointing keeps only a layer's input and computes the rest again. Unsloth's fused kernels keep less,
    and its checkpoints are in system memory.
    """
    target_modules, checkpointing = recipe.lora.target_modules, knobs.gradient_checkpointing
    is_fused = recipe.model.engine == "unsloth"
    element = DTYPE_BYTES[recipe.model.dtype]
    adapter = adapter_parameters(shape, recipe.lora)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # What a layer keeps for its backward pass, in units of an element.
    if is_fused:
        # Both norms' inputs and outputs; queries, keys and values, turned queries and keys, attention's output; the
        # MLP's gate and the other factor. The adapter's backward pass computes all else again.
        layer_elements = 4 * shape.hidden_size + 3 * queries + 3 * keys + 2 * shape.intermediate_size
    else:
        # Both norms' inputs (in float32, so twice) and outputs; queries, keys, values, attention's output; the MLP's
        # gate, its activation, the other factor and the product; and a copy of its input for each adapted layer.
        layer_elements = 6 * shape.hidden_size + 2 * queries + 2 * keys + 4 * shape.intermediate_size
        layer_elements += sum(shape.linear[name][0] for name in adapted(target_modules))
        layer_elements += 2 * (queries + keys) if shape.qk_norm else 0
    layers = 1 if checkpointing else shape.layers
    gradients = 3 * shape.intermediate_size + 2 * shape.hidden_size  # of the layer that backward is in
    input_layers = (OFFLOADED_LAYERS if is_fused else shape.layers) if checkpointing else 0
    parts = {
        "weights": weight_bytes(shape, recipe.model.dtype, recipe.model.load_in_4bit),
        "adapter": adapter * ADAPTER_BYTES,
        "gradients": adapter * ADAPTER_BYTES,
        "optimizer": adapter * (2 if "8bit" in knobs.optimizer else 8),  # Adam's two moments
        "layer inputs": input_layers * tokens * shape.hidden_size * element,
        "activations": tokens * (layers * layer_elements + gradients) * element,
        "logits": logit_rows * shape.vocabulary_size * LOGIT_BYTES,
        "CUDA": CUDA_BYTES,
    }
    if recipe.model.load_in_4bit:  # one layer at a time, forward and backward
        parts["unpacked layer"] = 2 * max(a * b for a, b in shape.linear.values()) * element
    step_bytes = sum(parts[name] for name in ("layer inputs", "activations", "logits"))
    return parts | {"fragments": int(FRAGMENTS * step_bytes)}


def sft_estimate(shape: Shape, recipe: Recipe) -> Estimate:
    """Return the estimate for SFT when every example of a micro-batch is as long as the recipe allows."""
    tokens = rows = recipe.sft.micro_batch_size * recipe.sft.max_tokens
    if recipe.model.engine == "unsloth":
        rows = min(tokens, max(1, UNSLOTH_SFT_CHUNK_BYTES // (shape.vocabulary_size * LOGIT_BYTES)))
    return Estimate(training_parts(shape, recipe, recipe.sft, tokens, rows))


def grpo_estimate(shape: Shape, recipe: Recipe, gpu_bytes: int) -> Estimate:
    """Return the estimate for GRPO when prompts and completions are as long as the recipe allows.

    Engine "unsloth" generates with vLLM on the trainer's own weights, and vLLM fills its share of the GPU's `gpu_bytes`
    with KV cache, however little its sequences need. Engine "trl" generates all completions of a step at once with
    transformers and frees the KV cache before it trains. Unsloth's scoring pass is not counted (`needs_scoring_pass`).
    """
    knobs = recipe.grpo
    length = recipe.data.max_prompt_tokens + knobs.max_completion_tokens
    tokens = knobs.micro_batch_size * length
    if recipe.model.engine != "unsloth":
        rows = knobs.micro_batch_size * (knobs.max_completion_tokens + 1)
        cache = knobs.prompts_per_step * knobs.completions_per_prompt * kv_bytes(shape, length)
        return Estimate(training_parts(shape, recipe, knobs, tokens, rows) | {"KV cache": cache}, takes_turns=True)
    parts = training_parts(shape, recipe, knobs, tokens, -(-length // UNSLOTH_GRPO_CHUNKS))
    parts |= vllm_parts(shape, recipe.vllm.sequences)
    share = standby_share(gpu_bytes) if recipe.vllm.standby else recipe.vllm.memory_share
    parts["KV cache"] = max(0, int(share * gpu_bytes) - parts["weights"] - parts["vLLM"])
    return Estimate(parts, takes_turns=recipe.vllm.standby)


def standby_share(gpu_bytes: int) -> float:
    """Return the share of the GPU that vLLM with standby takes while it is awake, whatever the recipe says.

    Source: `load_vllm` in unsloth_zoo's vllm_utils.py, for vLLM from 0.11 on.
    """
    tiers = ((40, 0.925), (25, 0.9), (20, 0.825), (14, 0.8), (10, 0.775))
    return 0.95 * next((share for least, share in tiers if gpu_bytes >= least << 30), 0.75)


def vllm_parts(shape: Shape, sequences: int) -> dict[str, int]:
    """Return the part of vLLM besides weights and KV cache: one batch of prompts, the sampler, CUDA graphs."""
    prompts = VLLM_BATCH_TOKENS * (2 * shape.hidden_size + 3 * shape.intermediate_size) * 2
    return {"vLLM": prompts + sequences * shape.vocabulary_size * SAMPLER_BYTES + VLLM_GRAPH_BYTES}


def comparison_estimate(shape: Shape) -> Estimate:
    """Return the estimate for merge and gguf, which compare models: one at a time, in float32, and a quarter more.

    With less they compare on the CPU (`device_for`).
    """
    weights = weight_bytes(shape, "float32")
    return Estimate({"weights": weights, "room to compute": weights // 4, "CUDA": CUDA_BYTES})


def gpu_estimates(recipe: Recipe, shape: Shape, gpu_bytes: int) -> dict[str, Estimate]:
    """Return the estimates for the stages that fill the GPU of `gpu_bytes`, by name."""
    return {
        "sft": sft_estimate(shape, recipe),
        "grpo": grpo_estimate(shape, recipe, gpu_bytes),
        "merge and gguf": comparison_estimate(shape),
    }


def gpu_memory_findings(recipe: Recipe, shape: Shape, total: int, free: int) -> Iterator[Finding]:
    """Yield whether the estimates fit into the GPU's memory, `total` and `free` in bytes, and vLLM into its share."""
    for stage, estimate in gpu_estimates(recipe, shape, total).items():
        largest = sorted(estimate.parts.items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest if size > 5e7)
        need = f"{stage} needs about {gigabytes(estimate.peak_bytes)} ({parts}, ...)"
        if estimate.peak_bytes <= free:
            yield Finding("ok", "GPU memory", f"{need} of {gigabytes(free)} free")
        elif stage == "merge and gguf":
            found = f"{need} and {gigabytes(free)} are free: they compare on the CPU, which takes hours"
            yield Finding("warn", "GPU memory", found, "take a larger GPU, or run make merge gguf on another machine")
        elif estimate.peak_bytes <= total:
            remedy = "end what else uses the GPU (nvidia-smi lists it), or choose another with GPUS=1"
            yield Finding("fail", "GPU memory", f"{need}; {gigabytes(free)} of {gigabytes(total)} are free", remedy)
        elif least_bytes(estimate, recipe, shape) <= total:
            found = f"{need} and there are {gigabytes(total)}: {stage} would have to step down"
            share = "" if stage == "sft" else " or lower [vllm] memory_share"
            remedy = f"halve [{stage}] micro_batch_size{share} yourself, or take a larger GPU"
            yield Finding("warn", "GPU memory", found, remedy)
        else:
            remedy = "take a larger GPU" + ("" if recipe.model.load_in_4bit else ", or set [model] load_in_4bit = true")
            yield Finding("fail", "GPU memory", f"{need} and there are {gigabytes(total)}", remedy)
    if recipe.vllm is not None and recipe.model.engine == "unsloth":
        yield vllm_share_finding(recipe, shape, total)


def least_bytes(estimate: Estimate, recipe: Recipe, shape: Shape) -> int:
    """Return what is left of `estimate` at the end of the ladder: one example at a time, vLLM with one sequence."""
    shrinking = ("layer inputs", "activations", "logits", "fragments", "KV cache")
    stays = sum(size for name, size in estimate.parts.items() if name not in shrinking)
    if "KV cache" not in estimate.parts:
        return stays
    return stays + kv_bytes(shape, recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens)


def vllm_share_finding(recipe: Recipe, shape: Shape, total: int) -> Finding:
    """Return whether vLLM's share of the `total` bytes holds the weights and at least one completion's KV cache."""
    share = recipe.vllm.memory_share
    length = recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens
    one = kv_bytes(shape, length)
    base = weight_bytes(shape, recipe.model.dtype, recipe.model.load_in_4bit)
    base += vllm_parts(shape, recipe.vllm.sequences)["vLLM"]
    room = int(share * total) - base
    found = f"[vllm] memory_share = {share} is {gigabytes(share * total)}, {gigabytes(base)} of it for weights and vLLM"
    if room < one:
        found += f"; one completion of {length:,} tokens needs {gigabytes(one)} more"
        least = math.ceil(100 * (base + one) / total) / 100
        return Finding("fail", "vLLM", found, f"raise memory_share to {least:.2f} or more, twice that for speed")
    side_by_side = min(room // one, recipe.vllm.sequences)
    return Finding("ok", "vLLM", f"{found}; {side_by_side} full-length completions side by side")
