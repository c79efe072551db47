"""How much GPU memory and disk a recipe needs, from its model's shape alone: an estimate, part by part.

Nothing is loaded and nothing is measured here. Every part has a name of its own, so that a measured peak can be held
against the estimate and the part that is off be mended. What is counted: the tensors that are alive at once when a step
needs most, for a LoRA adapter on a frozen base.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.lib.errors import UserError

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

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Gemma3TextConfig's defaults: the published config.json of Gemma 3 4B leaves these out.
GEMMA3_DEFAULTS = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A dense decoder with gated MLP and grouped-query attention; sizes in elements, as config.json has them."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary_size: int
    tied: bool  # the embedding is the output layer as well
    qkv_bias: bool = False
    qk_norm: bool = False  # a norm over each head's queries and keys
    layer_norms: int = 2
    sliding_window: int = 0  # tokens that the sliding layers look back
    sliding_layers: int = 0
    vision_parameters: int = 0  # of the vision tower and what joins it on, which stay as they are

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers, by name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        sizes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        sizes += [(hidden, inner), (hidden, inner), (inner, hidden)]
        return dict(zip(LINEAR_LAYERS, sizes, strict=True))

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear layers, without biases: what 4-bit loading quantizes."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = self.layer_norms * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = (1 if self.tied else 2) * self.vocabulary_size * self.hidden_size
        rest = self.layers * (bias + norms) + embeddings + self.hidden_size + self.vision_parameters
        return self.linear_parameters + rest


# The published config.json of the recipes' models, for a machine that has neither network nor a copy.
SHAPES = {
    "google/gemma-3-1b-it": Shape(
        26, 1152, 4, 1, 256, 6912, 262_144, True, qk_norm=True, layer_norms=4, sliding_window=512, sliding_layers=22
    ),
    "google/gemma-3-4b-it": Shape(
        34, 2560, 8, 4, 256, 10_240, 262_208, True, qk_norm=True, layer_norms=4, sliding_window=1024, sliding_layers=29,
        vision_parameters=419_816_304,
    ),
    "unsloth/Qwen3-1.7B-Base": Shape(28, 2048, 16, 8, 128, 6144, 151_936, True, qk_norm=True),
    "Qwen/Qwen2.5-3B-Instruct": Shape(36, 2048, 16, 2, 128, 11_008, 151_936, True, qkv_bias=True),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 32, 8, 128, 14_336, 128_256, False),
    "unsloth/Phi-4": Shape(40, 5120, 40, 10, 128, 17_920, 100_352, False),
}  # fmt: skip
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text")


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """Return the shape that a config.json states, of its text part where it has others; `where` is for the message.

    Raises `UserError` for a family whose layout is not known here, and for a size that is missing.
    """
    text = config.get("text_config", config)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type is {family!r}; its memory can be estimated for {', '.join(FAMILIES)}")
    gemma = family.startswith("gemma3")
    stated = (GEMMA3_DEFAULTS if gemma else {}) | {key: value for key, value in text.items() if value is not None}
    try:
        heads = stated["num_attention_heads"]
        return Shape(
            layers=stated["num_hidden_layers"],
            hidden_size=stated["hidden_size"],
            heads=heads,
            kv_heads=stated.get("num_key_value_heads", heads),
            head_dim=stated.get("head_dim", stated["hidden_size"] // heads),
            intermediate_size=stated["intermediate_size"],
            vocabulary_size=stated["vocab_size"],
            tied=stated.get("tie_word_embeddings", config.get("tie_word_embeddings", gemma)),
            qkv_bias=family == "qwen2",
            qk_norm=family in ("qwen3", "gemma3", "gemma3_text"),
            layer_norms=4 if gemma else 2,
            sliding_window=stated["sliding_window"] if gemma else 0,
            sliding_layers=sliding_layers(stated) if gemma else 0,
            vision_parameters=vision_parameters(config["vision_config"], stated) if "vision_config" in config else 0,
        )
    except KeyError as error:
        raise UserError(f"{where}: has no {error.args[0]!r}; expected a whole config.json") from error


def sliding_layers(text: Mapping[str, Any]) -> int:
    """Return how many layers of a Gemma 3 look back only a window: as listed, or else all but every sixth."""
    if "layer_types" in text:
        return text["layer_types"].count("sliding_attention")
    return text["num_hidden_layers"] - text["num_hidden_layers"] // text.get("sliding_window_pattern", 6)


def vision_parameters(vision: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    """Return the parameters of Gemma 3's SigLIP tower and of its projector into the text model."""
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    embedding = hidden * (3 * vision["patch_size"] ** 2 + 1) + patches * hidden
    layer = 4 * hidden * (hidden + 1) + hidden * (inner + 1) + inner * (hidden + 1) + 4 * hidden
    return embedding + vision["num_hidden_layers"] * layer + 2 * hidden + hidden * (text["hidden_size"] + 1)


@dataclass(frozen=True)
class Estimate:
    """What a stage holds of the GPU's memory, in bytes by part."""

    parts: dict[str, int]
    takes_turns: bool = False  # the KV cache and what a training step needs are never there at the same time

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        step = sum(self.parts.get(name, 0) for name in ("layer inputs", "activations", "logits", "fragments"))
        return sum(self.parts.values()) - (min(step, self.parts.get("KV cache", 0)) if self.takes_turns else 0)


def weight_bytes(shape: Shape, dtype: str, load_in_4bit: bool = False) -> int:
    """Return the bytes of the weights: with `load_in_4bit` the layers' linear ones as NF4, all others in `dtype`."""
    if not load_in_4bit:
        return shape.parameters * DTYPE_BYTES[dtype]
    others = shape.parameters - shape.linear_parameters
    return int(shape.linear_parameters * NF4_BITS / 8) + others * DTYPE_BYTES[dtype]


def adapter_parameters(shape: Shape, rank: int, target_modules: Sequence[str]) -> int:
    """Return the weights of a LoRA adapter (arXiv 2106.09685): `rank` x (inputs + outputs) a layer it sits on."""
    return shape.layers * rank * sum(sum(shape.linear[name]) for name in adapted(target_modules))


def adapted(target_modules: Sequence[str]) -> list[str]:
    """Return which of `LINEAR_LAYERS` the recipe's `target_modules` names, or ["all-linear"] means."""
    return [name for name in LINEAR_LAYERS if name in target_modules or "all-linear" in target_modules]


def kv_bytes(shape: Shape, tokens: int) -> int:
    """Return the 16-bit KV cache of one sequence of so many tokens; sliding layers keep no more than their window."""
    full = (shape.layers - shape.sliding_layers) * tokens
    sliding = shape.sliding_layers * min(tokens, shape.sliding_window)
    return 2 * 2 * shape.kv_heads * shape.head_dim * (full + sliding)


def training(
    shape: Shape, *, dtype: str, load_in_4bit: bool, rank: int, target_modules: Sequence[str], optimizer: str,
    tokens: int, logit_rows: int, checkpointing: bool, fused: bool,
) -> dict[str, int]:  # fmt: skip
    """Return the parts, in bytes, of one forward and backward pass over `tokens` tokens, padding included.

    `logit_rows` is how many tokens have their logits in memory at once. `checkpointing` keeps a layer's input alone and
    computes the rest of it again. `fused` is Unsloth's kernels, which keep less; its checkpoints wait in system memory.
    """
    element = DTYPE_BYTES[dtype]
    adapter = adapter_parameters(shape, rank, target_modules)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # What a layer keeps for its backward pass, in units of an element.
    if fused:
        # Both norms' inputs and outputs; queries, keys and values, turned queries and keys, attention's output; the
        # MLP's gate and the other factor. The adapter's backward pass computes all else again.
        kept = 4 * shape.hidden_size + 3 * queries + 3 * keys + 2 * shape.intermediate_size
    else:
        # Both norms' inputs (in float32, so twice) and outputs; queries, keys, values, attention's output; the MLP's
        # gate, its activation, the other factor and the product; and a copy of its input for each adapted layer.
        kept = 6 * shape.hidden_size + 2 * queries + 2 * keys + 4 * shape.intermediate_size
        kept += sum(shape.linear[name][0] for name in adapted(target_modules))
        kept += 2 * (queries + keys) if shape.qk_norm else 0
    layers = 1 if checkpointing else shape.layers
    gradients = 3 * shape.intermediate_size + 2 * shape.hidden_size  # of the layer that backward is in
    saved = (OFFLOADED_LAYERS if fused else shape.layers) if checkpointing else 0
    parts = {
        "weights": weight_bytes(shape, dtype, load_in_4bit),
        "adapter": adapter * ADAPTER_BYTES,
        "gradients": adapter * ADAPTER_BYTES,
        "optimizer": adapter * (2 if "8bit" in optimizer else 8),  # Adam's two moments
        "layer inputs": saved * tokens * shape.hidden_size * element,
        "activations": tokens * (layers * kept + gradients) * element,
        "logits": logit_rows * shape.vocabulary_size * LOGIT_BYTES,
        "CUDA": CUDA_BYTES,
    }
    if load_in_4bit:  # one layer at a time, forward and backward
        parts["unpacked layer"] = 2 * max(a * b for a, b in shape.linear.values()) * element
    comes_and_goes = sum(parts[name] for name in ("layer inputs", "activations", "logits"))
    return parts | {"fragments": int(FRAGMENTS * comes_and_goes)}


def sft(
    shape: Shape, *, engine: str, dtype: str, load_in_4bit: bool, rank: int, target_modules: Sequence[str],
    optimizer: str, micro_batch_size: int, max_tokens: int, checkpointing: bool,
) -> Estimate:  # fmt: skip
    """Return what SFT needs when every example of a micro-batch is as long as the recipe allows."""
    tokens = micro_batch_size * max_tokens
    unsloth = engine == "unsloth"
    chunk = max(1, UNSLOTH_SFT_CHUNK_BYTES // (shape.vocabulary_size * LOGIT_BYTES))
    return Estimate(
        training(
            shape, dtype=dtype, load_in_4bit=load_in_4bit, rank=rank, target_modules=target_modules,
            optimizer=optimizer, tokens=tokens, logit_rows=min(tokens, chunk) if unsloth else tokens,
            checkpointing=checkpointing, fused=unsloth,
        )
    )  # fmt: skip


def grpo(
    shape: Shape, *, engine: str, dtype: str, load_in_4bit: bool, rank: int, target_modules: Sequence[str],
    optimizer: str, micro_batch_size: int, completions_per_step: int, prompt_tokens: int, completion_tokens: int,
    checkpointing: bool, gpu_bytes: int = 0, vllm_memory_share: float = 0.0, vllm_sequences: int = 0,
    vllm_standby: bool = False,
) -> Estimate:  # fmt: skip
    """Return what GRPO needs when prompts and completions are as long as the recipe allows.

    Engine "unsloth" generates with vLLM on the trainer's own weights, and vLLM fills its share of the GPU's `gpu_bytes`
    with KV cache, however little its sequences need. Engine "trl" generates with transformers, all completions of
    a step side by side, and frees the KV cache before it trains. Not counted is what Unsloth's scoring pass holds
    where a recipe needs one (`models.scores_first`).
    """
    length = prompt_tokens + completion_tokens
    unsloth = engine == "unsloth"
    rows = -(-length // UNSLOTH_GRPO_CHUNKS) if unsloth else micro_batch_size * (completion_tokens + 1)
    parts = training(
        shape, dtype=dtype, load_in_4bit=load_in_4bit, rank=rank, target_modules=target_modules, optimizer=optimizer,
        tokens=micro_batch_size * length, logit_rows=rows, checkpointing=checkpointing, fused=unsloth,
    )  # fmt: skip
    if not unsloth:
        cache = completions_per_step * kv_bytes(shape, length)
        return Estimate(parts | {"KV cache": cache}, takes_turns=True)
    parts |= vllm(shape, vllm_sequences)
    share = standby_share(gpu_bytes) if vllm_standby else vllm_memory_share
    parts["KV cache"] = max(0, int(share * gpu_bytes) - parts["weights"] - parts["vLLM"])
    return Estimate(parts, takes_turns=vllm_standby)


def standby_share(gpu_bytes: int) -> float:
    """Return the share of the GPU that vLLM has while it is awake, with standby, whatever the recipe says.

    Source: `load_vllm` in unsloth_zoo's vllm_utils.py, for vLLM from 0.11 on.
    """
    tiers = ((40, 0.925), (25, 0.9), (20, 0.825), (14, 0.8), (10, 0.775))
    return 0.95 * next((share for least, share in tiers if gpu_bytes >= least << 30), 0.75)


def vllm(shape: Shape, sequences: int) -> dict[str, int]:
    """Return what vLLM holds besides weights and KV cache: one batch of prompts, the sampler, CUDA graphs."""
    prompts = VLLM_BATCH_TOKENS * (2 * shape.hidden_size + 3 * shape.intermediate_size) * 2
    return {"vLLM": prompts + sequences * shape.vocabulary_size * SAMPLER_BYTES + VLLM_GRAPH_BYTES}


def comparison(shape: Shape) -> Estimate:
    """Return what merge and gguf need to hold models against each other: one at a time, in float32, and a quarter more.

    With less they compare on the CPU (`parity.device_for`).
    """
    weights = weight_bytes(shape, "float32")
    return Estimate({"weights": weights, "room to compute": weights // 4, "CUDA": CUDA_BYTES})


def gguf_bits(kind: str) -> int:
    """Return the most bits a weight takes in a GGUF file of type `kind` ("q4_k_m"), as the gguf stage counts them.

    A type's digit understates its bits: scales, embeddings in a finer type, rows that fall back to one.
    """
    digit = int(re.search(r"\d+", kind)[0])
    return digit if digit > 8 else min(digit + 3, 9)


@dataclass(frozen=True)
class Room:
    """What a stage adds to the disk, in bytes."""

    kept: int
    scratch: int = 0  # besides, while it works


def disk(
    shape: Shape, *, types: Sequence[str], rank: int, target_modules: Sequence[str], merge_positions: int,
    gguf_positions: int, recommended: str, save: Sequence[str],
) -> dict[str, Room]:  # fmt: skip
    """Return what each stage adds to the disk, by its name, in the order they run; "base" is the model itself.

    `merge_positions` and `gguf_positions` are at how many tokens each stage keeps rows of float32 logits to compare.
    `recommended` is the type that ollama-modelfile copies, `save` the recipe's list of what is handed over.
    """
    size = shape.parameters
    kinds = {name.lower() for name in types}
    source = "bf16" if "bf16" in kinds and "f16" not in kinds else "f16"  # all others are made from this one
    files = sum(size * gguf_bits(kind) // 8 for kind in kinds)
    row = shape.vocabulary_size * 4
    adapter = adapter_parameters(shape, rank, target_modules)
    checkpoints = 2 * adapter * (ADAPTER_BYTES + 8)  # with Adam's moments
    four_bits = weight_bytes(shape, "bfloat16", load_in_4bit=True) if "merged_4bit" in save else 0
    lora_base = 2 * size if "lora" in save else 0  # the converter takes an adapter beside its base
    run = Room(adapter * ADAPTER_BYTES, checkpoints)
    return {
        "base": Room(2 * size),
        "sft": run,
        "grpo": run,
        "merge": Room(2 * size + four_bits, 2 * merge_positions * row),
        "gguf": Room(files, gguf_positions * row + (0 if source in kinds else 2 * size) + lora_base),
        "ollama-modelfile": Room(size * gguf_bits(recommended.lower()) // 8),
    }


def most_room(rooms: Mapping[str, Room]) -> int:
    """Return the most bytes that stages, run in order, take at once: what all before left, and one's own scratch."""
    done, most = 0, 0
    for room in rooms.values():
        done += room.kept
        most = max(most, done + room.scratch)
    return most
