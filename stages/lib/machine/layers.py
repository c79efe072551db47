"""The weights of models whose layers are not alike, or not those of a plain decoder, counted from config.json."""

from collections.abc import Callable, Mapping
from typing import Any

Sizes = Mapping[str, Any]  # of the text part's config.json
ATTENTION = ("attention", "full_attention", "sliding_attention")


def kinds_of(sizes: Sizes) -> list[str]:
    """Return the kind of each layer; LFM2's config.json may list those with attention instead."""
    if "layer_types" in sizes:
        return list(sizes["layer_types"])
    attending = sizes["full_attn_idxs"]
    return ["full_attention" if number in attending else "conv" for number in range(sizes["num_hidden_layers"])]


def widths(sizes: Sizes) -> tuple[int, int]:
    """Return the columns of a layer's queries, and of its keys."""
    head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    return sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head


def attention(sizes: Sizes) -> int:
    """Return the weights of an attention layer's four projections."""
    queries, keys = widths(sizes)
    return sizes["hidden_size"] * (2 * queries + 2 * keys)


def qwen3_5(sizes: Sizes) -> dict[str, Any]:
    """Attention with a gate as wide as its queries, or a gated delta rule (arXiv 2412.06464)."""
    hidden, layers, (queries, _) = sizes["hidden_size"], sizes["num_hidden_layers"], widths(sizes)
    keys = sizes["linear_num_key_heads"] * sizes["linear_key_head_dim"]
    heads = sizes["linear_num_value_heads"]
    values = heads * sizes["linear_value_head_dim"]
    full = sum(kind in ATTENTION for kind in kinds_of(sizes))
    linear = full * (attention(sizes) + hidden * queries)
    linear += (layers - full) * hidden * (2 * keys + 3 * values + 2 * heads)
    linear += layers * 3 * hidden * sizes["intermediate_size"]
    convolution = (2 * keys + values) * sizes["linear_conv_kernel_dim"]
    other = full * 2 * sizes["head_dim"] + (layers - full) * (convolution + 2 * heads + sizes["linear_value_head_dim"])
    return {"counted": (linear, other + layers * 2 * hidden), "attention_layers": full}


def granite(sizes: Sizes) -> dict[str, Any]:
    """Attention or Mamba 2 (arXiv 2405.21060), and a shared MLP beside experts, which are no linear layers here."""
    hidden, layers, experts = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_local_experts"]
    shared, expert = sizes["shared_intermediate_size"], sizes["intermediate_size"]
    full = sum(kind in ATTENTION for kind in kinds_of(sizes))
    columns, heads = sizes["mamba_expand"] * hidden, sizes["mamba_n_heads"]
    states = 2 * sizes["mamba_n_groups"] * sizes["mamba_d_state"]
    linear = full * attention(sizes) + layers * 3 * hidden * shared
    linear += (layers - full) * hidden * (3 * columns + states + heads)
    convolution = (columns + states) * (sizes["mamba_d_conv"] + bool(sizes.get("mamba_conv_bias", True)))
    other = (layers - full) * (convolution + 3 * heads + columns)
    other += layers * (2 * hidden + experts * hidden * (3 * expert + 1))
    active = shared + sizes["num_experts_per_tok"] * expert if experts else shared
    return {"counted": (linear, other), "attention_layers": full, "intermediate_size": active}


def lfm2(sizes: Sizes) -> dict[str, Any]:
    """Attention or a short convolution between two gates (arXiv 2511.23404)."""
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    inner = sizes["block_ff_dim"] if "block_ff_dim" in sizes else sizes["intermediate_size"]
    if sizes.get("block_auto_adjust_ff_dim", True):
        multiple = sizes.get("block_multiple_of", 256)
        inner = int(sizes.get("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = multiple * -(-inner // multiple)
    full = sum(kind in ATTENTION for kind in kinds_of(sizes))
    linear = full * attention(sizes) + (layers - full) * 4 * hidden**2 + layers * 3 * hidden * inner
    other = full * 2 * (hidden // sizes["num_attention_heads"]) + layers * 2 * hidden
    other += (layers - full) * hidden * (sizes.get("conv_L_cache", 3) + 4 * bool(sizes.get("conv_bias")))
    other += (layers - full) * bool(sizes.get("conv_bias")) * hidden
    return {"counted": (linear, other), "attention_layers": full, "intermediate_size": inner}


def gemma4(sizes: Sizes) -> dict[str, Any]:
    """Attention whose heads differ by kind; last layers that share keys and values; inputs of each layer's own."""
    hidden, heads, own_input = sizes["hidden_size"], sizes["num_attention_heads"], sizes["hidden_size_per_layer_input"]
    kinds, shared = kinds_of(sizes), sizes.get("num_kv_shared_layers") or 0
    own = len(kinds) - shared  # the layers with keys and values
    linear = other = 0
    for number, kind in enumerate(kinds):
        one = kind == "full_attention" and sizes.get("attention_k_eq_v")  # matrix for keys and values
        head, groups = gemma4_heads(sizes, number)
        keys = groups * head
        wide = 2 if sizes.get("use_double_wide_mlp") and number >= own else 1
        linear += hidden * (2 * heads * head + (1 if one else 2) * keys * (number < own))
        linear += hidden * (3 * wide * sizes["intermediate_size"] + 2 * own_input)
        other += head * (1 + (number < own)) + 4 * hidden + hidden * bool(own_input)
    if own_input:
        linear += hidden * own_input * len(kinds)
        other += sizes["vocab_size_per_layer_input"] * own_input * len(kinds) + own_input
    return {
        "counted": (linear, other), "attention_layers": own, "sliding_window": sizes["sliding_window"],
        "sliding_layers": kinds[:own].count("sliding_attention"),
        "head_dim": max(gemma4_heads(sizes, number)[0] for number in range(len(kinds))),
        "intermediate_size": sizes["intermediate_size"] * (2 if sizes.get("use_double_wide_mlp") else 1),
    }  # fmt: skip


def gemma4_heads(sizes: Sizes, number: int) -> tuple[int, int]:
    """Return the size of a layer's heads, and its key and value heads, as published or as transformers 5 writes it."""
    head, groups = sizes["head_dim"], sizes["num_key_value_heads"]
    if "per_layer_config" in sizes:
        by_number = {int(each): own for each, own in sizes["per_layer_config"].items()}
        own = by_number.get(number, {})
        return own.get("head_dim", head), own.get("num_key_value_heads", groups)
    if sizes["layer_types"][number] != "full_attention":
        return head, groups
    if sizes.get("attention_k_eq_v"):
        groups = sizes["num_global_key_value_heads"]
    return sizes["global_head_dim"], groups


def gpt_oss(sizes: Sizes) -> dict[str, Any]:
    """Attention with biases and sinks, and experts with biases, which are no linear layers here."""
    hidden, layers, experts = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_local_experts"]
    (queries, keys), inner = widths(sizes), sizes["intermediate_size"]
    other = queries + 2 * keys + hidden + sizes["num_attention_heads"] + experts * (hidden + 1) + 2 * hidden
    other += experts * (3 * hidden * inner + 2 * inner + hidden)
    sliding = kinds_of(sizes).count("sliding_attention")
    return {
        "counted": (layers * attention(sizes), layers * other), "sliding_window": sizes["sliding_window"],
        "sliding_layers": sliding, "intermediate_size": inner * sizes["num_experts_per_tok"],
    }  # fmt: skip


def olmo2(sizes: Sizes) -> dict[str, Any]:
    """A plain decoder with a norm over all queries, and one over all keys."""
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    linear = layers * (attention(sizes) + 3 * hidden * sizes["intermediate_size"])
    return {"counted": (linear, layers * (2 * hidden + sum(widths(sizes))))}


# Each returns the fields of `Shape` that it knows better; `counted` without embeddings and the last norm.
COUNTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "qwen3_5": qwen3_5, "qwen3_5_text": qwen3_5, "granitemoehybrid": granite, "lfm2": lfm2, "gemma4": gemma4,
    "gemma4_text": gemma4, "gpt_oss": gpt_oss, "olmo2": olmo2,
}  # fmt: skip


def siglip(vision: Sizes, text: Sizes) -> int:
    """Return the parameters of Gemma 3's SigLIP tower and of its projector into the text model."""
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    embedding = hidden * (3 * vision["patch_size"] ** 2 + 1) + patches * hidden
    layer = 4 * hidden * (hidden + 1) + hidden * (inner + 1) + inner * (hidden + 1) + 4 * hidden
    return embedding + vision["num_hidden_layers"] * layer + 2 * hidden + hidden * (text["hidden_size"] + 1)


def pixtral(vision: Sizes, text: Sizes, config: Sizes) -> int:
    """Return the parameters of Mistral 3's Pixtral tower and of its projector into the text model."""
    hidden, out = vision["hidden_size"], text["hidden_size"]
    layer = 4 * hidden**2 + 3 * hidden * vision["intermediate_size"] + 2 * hidden
    tower = 3 * vision["patch_size"] ** 2 * hidden + hidden + vision["num_hidden_layers"] * layer
    projector = hidden + (config["spatial_merge_size"] * hidden) ** 2 + hidden * out + out * out
    return tower + projector + 2 * out * bool(config.get("multimodal_projector_bias"))


def gemma4_vision(vision: Sizes, text: Sizes) -> int:
    """Return the parameters of Gemma 4's vision tower and of its projector into the text model."""
    hidden, head = vision["hidden_size"], vision["head_dim"]
    queries, keys = vision["num_attention_heads"] * head, vision["num_key_value_heads"] * head
    layer = hidden * (2 * queries + 2 * keys + 3 * vision["intermediate_size"] + 4) + 2 * head
    patches = 2 * vision["position_embedding_size"] * hidden + 3 * vision["patch_size"] ** 2 * hidden
    return patches + vision["num_hidden_layers"] * layer + hidden * text["hidden_size"]


def gemma4_audio(audio: Sizes, text: Sizes) -> int:
    """Return the parameters of Gemma 4's audio tower and of its projector into the text model."""
    hidden, out = audio["hidden_size"], audio["output_proj_dims"]
    first, second = audio["subsampling_conv_channels"]
    head = hidden // audio["num_attention_heads"]
    feed_forwards, attended, convolved = 16 * hidden + 4, 5 * hidden, 3 * hidden + audio["conv_kernel_size"] + 2
    layer = hidden * (feed_forwards + attended + convolved + 3) + head
    patches = 10 * first + (9 * first + 1) * second + first // 4 * second * hidden
    return patches + audio["num_hidden_layers"] * layer + (hidden + 1) * out + out * text["hidden_size"]


def other_parameters(config: Sizes, text: Sizes) -> int:
    """Return the parameters of what reads images and sound, and of what joins it on, where transformers loads it."""
    vision, audio, family = config.get("vision_config"), config.get("audio_config"), config["model_type"]
    sound = gemma4_audio(audio, text) if audio else 0
    if not vision or family == "qwen3_5":  # transformers has Qwen3.5's text part as a model
        return sound
    if family == "mistral3":
        return pixtral(vision, text, config)
    return gemma4_vision(vision, text) + sound if family == "gemma4" else siglip(vision, text)
