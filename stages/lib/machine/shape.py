"""A model's shape: sizes from config.json, without a weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.lib.errors import UserError
from stages.lib.machine.layers import COUNTS, other_parameters
from stages.lib.model.headers import AGAIN

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Gemma3TextConfig's defaults: the published config.json of Gemma 3 4B leaves these out.
GEMMA3_DEFAULTS = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLP and grouped-query attention; sizes in elements, as config.json has them.

    Where layers differ, sizes are those of the largest, and `counted` has the parameters.
    """

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
    other_parameters: int = 0  # of what reads images and sound, and joins it on: they stay as they are
    attention_layers: int | None = None  # with keys and values of their own; None: all layers
    counted: tuple[int, int] | None = None  # weights of linear layers and all others, where layers are not alike

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
        if self.counted:
            return self.counted[0]
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        embeddings = (1 if self.tied else 2) * self.vocabulary_size * self.hidden_size
        rest = embeddings + self.hidden_size + self.other_parameters
        if self.counted:
            return sum(self.counted) + rest
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        norms = self.layer_norms * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return self.linear_parameters + self.layers * (bias + norms) + rest


# The published config.json of the recipes' models, for a machine that has neither network nor a copy.
SHAPES = {
    "google/gemma-3-1b-it": Shape(
        26, 1152, 4, 1, 256, 6912, 262_144, True, qk_norm=True, layer_norms=4, sliding_window=512, sliding_layers=22
    ),
    "google/gemma-3-4b-it": Shape(
        34, 2560, 8, 4, 256, 10_240, 262_208, True, qk_norm=True, layer_norms=4, sliding_window=1024, sliding_layers=29,
        other_parameters=419_816_304,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shape(30, 576, 9, 3, 64, 1536, 49_152, True),
    "unsloth/Qwen3-1.7B-Base": Shape(28, 2048, 16, 8, 128, 6144, 151_936, True, qk_norm=True),
    "Qwen/Qwen2.5-3B-Instruct": Shape(36, 2048, 16, 2, 128, 11_008, 151_936, True, qkv_bias=True),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 32, 8, 128, 14_336, 128_256, False),
    "unsloth/Phi-4": Shape(40, 5120, 40, 10, 128, 17_920, 100_352, False),
}  # fmt: skip
# Families of which all layers are `Shape`'s; `COUNTS` has the others.
PLAIN = (
    "llama", "mistral", "mistral3", "ministral3", "qwen2", "qwen3", "gemma3", "gemma3_text", "phi3", "smollm3",
)  # fmt: skip
FAMILIES = (*PLAIN, *COUNTS)
TIED = ("gemma3", "gemma3_text", "gemma4", "gemma4_text", "smollm3", "lfm2")  # unless config.json says otherwise


def shape_of_config(config: Mapping[str, Any], where: str) -> Shape:
    """Return the shape that a config.json states, of its text part where it has others; `where` is for the message.

    Raises `UserError` for a family whose layout is not known here, and for a size that is missing.
    """
    text = config.get("text_config", config)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES or not isinstance(text, dict):
        raise UserError(f"{where}: model_type is {family!r}; its memory can be estimated for {', '.join(FAMILIES)}")
    sizes: dict[str, Any] = (GEMMA3_DEFAULTS if family.startswith("gemma3") else {}) | {
        key: value for key, value in text.items() if value is not None
    }
    try:
        fields = plain_fields(family, sizes)
        fields["tied"] = sizes.get("tie_word_embeddings", config.get("tie_word_embeddings", family in TIED))
        fields["other_parameters"] = other_parameters(config, sizes)
        shape = Shape(**fields | (COUNTS[family](sizes) if family in COUNTS else {}))
    except KeyError as error:
        raise UserError(f"{where}: has no {error.args[0]!r}; expected a whole config.json") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{where}: config.json states a size that is none ({error}). {AGAIN}") from error
    for name, value in vars(shape).items():
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(isinstance(each, int) and 0 <= each < 1 << 63 for each in numbers):
            raise UserError(f"{where}: config.json states {name} as {str(value)[:80]!r}; expected a size. {AGAIN}")
    return shape


def plain_fields(family: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `Shape` that the text part's `sizes` state, as of a model whose layers are alike."""
    heads, gemma3 = sizes["num_attention_heads"], family.startswith("gemma3")
    return {
        "layers": sizes["num_hidden_layers"],
        "hidden_size": sizes["hidden_size"],
        "heads": heads,
        "kv_heads": sizes.get("num_key_value_heads", heads),
        "head_dim": sizes.get("head_dim", sizes["hidden_size"] // heads),
        "intermediate_size": sizes["block_ff_dim"] if "block_ff_dim" in sizes else sizes["intermediate_size"],
        "vocabulary_size": sizes["vocab_size"],
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3" or gemma3,
        "layer_norms": 4 if gemma3 else 2,
        "sliding_window": sizes["sliding_window"] if gemma3 else 0,
        "sliding_layers": sliding_layers(sizes) if gemma3 else 0,
    }


def sliding_layers(text: Mapping[str, Any]) -> int:
    """Return how many layers of a Gemma 3 look back only a window: as listed, or else all but every sixth."""
    if "layer_types" in text:
        return text["layer_types"].count("sliding_attention")
    return text["num_hidden_layers"] - text["num_hidden_layers"] // text.get("sliding_window_pattern", 6)
