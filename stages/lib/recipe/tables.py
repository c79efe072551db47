"""Recipes: one TOML file a run, read strictly into frozen dataclasses, a table a class.

Every table is checked whenever any stage reads the recipe, so that a slip in `[gguf]` shows before the first stage and
not after hours of training. There are no hidden defaults: a field without a default here must be in the file.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_VLLM_RANK = 512  # of a LoRA (vllm/config/lora.py)


@dataclass(frozen=True)
class Model:
    """`[model]`: what is trained, and with which engine."""

    name: str  # a hub name (then `revision` is a must), a local folder, or "base-model": the one this run makes
    dtype: Literal["float32", "bfloat16", "float16"]  # of the weights in training
    engine: Literal["trl", "unsloth"]
    revision: str = ""  # the hub commit, 40 hex digits
    load_in_4bit: bool = False  # engine unsloth: the base in 4 bits (NF4) while training; merge takes its 16 bits


@dataclass(frozen=True)
class Vllm:
    """`[vllm]`: what generates completions with engine "unsloth", on the GPU that also trains."""

    memory_share: float  # of the GPU's memory, for the weights and the KV cache
    sequences: int  # completions decoded side by side
    standby: bool = False  # in GRPO, give the KV cache's memory back while the trainer works; Unsloth then takes nine
    #   tenths of the GPU while decoding, whatever memory_share says


@dataclass(frozen=True)
class Health:
    """`[health]`: what ends a training run that would only waste GPU hours (`stages/lib/train/health.py`)."""

    log_entries: int = 20  # a sign counts when so many log entries in a row show it; nan counts at once
    max_kl: float | None = None  # nats; with beta = 0 none is measured
    min_entropy: float | None = None  # nats a token; not with engine unsloth, which measures none
    max_entropy: float | None = None
    warn_only: list[Literal["nan", "constant_reward", "cut_off", "kl", "entropy"]] = dataclasses.field(
        default_factory=list
    )  # checks that only say so; the others stop the run


@dataclass(frozen=True)
class BaseModel:
    """`[base_model]`: the embedded tiny base model, made by its own stage for recipes that have this table."""

    seed: int
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    initializer_range: float
    vocabulary_size: int
    max_position_tokens: int
    corpus_problems: int  # word problems in the corpus, each once as a conversation
    drill_share: float  # of the corpus' documents, those that are nine single steps and no conversation
    eval_problems: int  # problems kept out of the corpus, for prepare-data to examine on
    train_problems: int  # likewise, to train on
    working_share: float  # of train_problems, those whose solution shows its working
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """One `[[data.sources]]`: where rows come from, which columns count and which sets they go to."""

    name: str  # a hub name (then `revision` is a must), a file, a folder, or "base-model": the problems it made
    use: list[Literal["sft", "grpo", "eval"]]  # the sets its rows go to: to each of them, unless there are `shares`
    question: str  # the column of the problem
    answer: str  # the column of the answer
    solution: str = ""  # the column of the worked solution, which sft needs; "": none, or within `answer` (gsm8k)
    style: Literal["plain", "gsm8k", "think"] = "plain"  # gsm8k: solution, "####" and answer are one column, with
    #   calculator marks; think: the solution has <think> marks, and one without its end was cut off
    revision: str = ""  # the hub commit, 40 hex digits
    config: str = ""  # the hub's name for a part of the dataset, such as "main" or "en"
    split: str = "train"
    shares: list[float] = dataclasses.field(default_factory=list)  # one a set in `use`, together at most 1: each
    #   problem then goes to one set, or to none, by the hash of its question
    unreadable: Literal["refuse", "drop"] = "refuse"  # rows without question, answer or solution, or with one that
    #   can't be read: end with an error that names the first, or leave them out and count them
    max_rows: int = 0  # read so many rows from the start; 0: all


@dataclass(frozen=True)
class Data:
    """`[data]`: which problems, how they are cleaned and split."""

    sources: list[Source]
    max_prompt_tokens: int  # of the rendered prompt, chat markup and system prompt included; longer ones are dropped
    ngram_words: int  # questions are compared by their runs of so many words (a sign counts as one)
    near_duplicate_jaccard: float  # in a set, of two questions that share this much of their n-grams one stays; 1: only
    #   exact duplicates go
    contamination_overlap: float  # a training question goes when this share of its n-grams, or of those of an eval
    #   question (whichever has fewer), is in both


@dataclass(frozen=True)
class Format:
    """`[format]`: how an answer is written; `stages/lib/answers/formats.py` knows each."""

    name: str
    system_prompt: str = ""  # left out: the format's own, which `read_recipe` puts here


@dataclass(frozen=True)
class Lora:
    """`[lora]`: the adapter that SFT starts and GRPO goes on with."""

    rank: int  # of the product that is added to each weight matrix
    alpha: int  # what is added is scaled by alpha / rank
    dropout: float  # of the adapter's input, in training; 0: none, which Unsloth's fast kernels ask for
    target_modules: list[str]  # module names, or ["all-linear"]


# transformers' names for optimizers (`optim`). Others want arguments or packages of their own, or were not tried.
TorchOptimizer = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"]
BitsandbytesOptimizer = Literal[
    "adamw_8bit", "adamw_bnb_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_lion_32bit", "paged_lion_8bit",
]  # fmt: skip


@dataclass(frozen=True)
class Sft:
    """`[sft]`: supervised fine-tuning on worked solutions."""

    seed: int
    steps: int
    batch_size: int  # examples an optimizer step
    micro_batch_size: int  # examples a forward pass
    max_tokens: int  # of prompt and completion together; longer examples are refused, not cut
    learning_rate: float
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: int
    optimizer: Literal[TorchOptimizer, BitsandbytesOptimizer]
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    max_grad_norm: float
    packing: bool  # several examples in one row of max_tokens, instead of padding
    gradient_checkpointing: bool  # compute a layer's activations again instead of keeping them: less memory, slower
    save_steps: int  # a checkpoint every so many steps
    log_steps: int  # a log entry every so many steps


@dataclass(frozen=True)
class Rewards:
    """`[rewards]`: what GRPO pays for; `stages/lib/rewards/` knows each."""

    functions: list[str]
    weights: list[float]  # one a function; 0 logs without paying
    length_cache_tokens: int | None = None  # length_penalty: the last so many completion tokens cost
    repetition_ngram_tokens: int | None = None  # repetition_penalty: the length of what is repeated
    repetition_max_penalty: float | None = None  # repetition_penalty: what nothing but repetition costs


@dataclass(frozen=True)
class Grpo:
    """`[grpo]`: group relative policy optimization (arXiv 2402.03300) and what came after it."""

    seed: int
    steps: int
    prompts_per_step: int
    completions_per_prompt: int
    micro_batch_size: int  # completions a forward and backward pass
    num_iterations: int  # optimizer passes over one batch of completions
    max_completion_tokens: int
    temperature: float  # of sampling; 1.0: the model's own distribution
    top_p: float  # 1.0: all tokens
    top_k: int  # 0: all
    min_p: float  # of the likeliest token's probability, what a token must have; 0.0: nothing
    repetition_penalty: float  # 1.0: none
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"]  # by what the sum over tokens is divided
    scale_rewards: Literal["group", "batch", "none"]  # by whose standard deviation advantages are divided
    beta: float  # weight of the KL divergence from the model before GRPO (engine unsloth: from the base, before SFT as
    #   well, so that it also pulls back what SFT taught); 0: it is not measured
    epsilon: float  # the probability ratio of a token counts down to 1 - epsilon
    epsilon_high: float  # and up to 1 + epsilon_high
    mask_truncated_completions: bool  # what was cut off teaches nothing
    learning_rate: float
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: int
    optimizer: Literal[TorchOptimizer, BitsandbytesOptimizer]
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    max_grad_norm: float
    gradient_checkpointing: bool  # as in [sft]
    save_steps: int  # a checkpoint every so many steps
    log_steps: int  # a log entry every so many steps
    show_completions_steps: int  # every so many steps, a table of samples on the terminal
    min_completion_tokens: int | None = None  # out of GPU memory, the last resort is completions down to this; None: no


@dataclass(frozen=True)
class ScoreBase:
    """`[score_base]`: what the rewards pay before GRPO, which it samples as `[grpo]` says. For the score-base stage."""

    problems: int  # at most so many of the grpo set, drawn by the seed
    completions_per_problem: int
    batch_size: int  # completions a batch, whole groups
    seed: int
    min_pass_rate: float  # problems with a share of right answers between these two, themselves included, are the
    max_pass_rate: float  #   subset that GRPO can be given; 0.0 and 1.0: no subset is made


@dataclass(frozen=True)
class Infer:
    """`[infer]`: the examination on held-out problems."""

    problems: int  # at most so many of the eval set
    batch_size: int
    max_completion_tokens: int


@dataclass(frozen=True)
class Merge:
    """`[merge]`: the adapter folded into the base."""

    dtype: Literal["bfloat16", "float16"]
    prompts: int = 50  # of the eval set, on which merged and adapter-on-base are compared
    positions_per_prompt: int = 64  # at which next-token distributions are compared, spread over the prompt
    max_mean_kl: float = 1e-4  # nats


@dataclass(frozen=True)
class Gguf:
    """`[gguf]`: the quantizations, and how far from the merged model each may be."""

    types: list[str]  # out of GGUF_TYPES, in any case
    prompts: int = 200  # of the eval set, on which every file is held against the merged model
    positions_per_prompt: int = 32  # at which next-token distributions are compared, spread over prompt and completion
    max_mean_kl: dict[str, float] = dataclasses.field(default_factory=dict)  # nats, by type; GGUF_TYPES has the others'
    importance_prompts: int = 0  # of the sft set, for an importance matrix; 0: none
    max_lost_ends: int = 0  # prompts for which a file may not end by itself though the merged model does


@dataclass(frozen=True)
class Ollama:
    """`[ollama]`: the Modelfile."""

    quantization: str  # the recommended one, out of [gguf] types
    num_ctx: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float = 1.0  # 1: none, as in training; Ollama's own default has been 1.1
    license: str = ""  # the name or the text of the licence that the model goes out under; "": none is stated


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. `path` is the file it was read from."""

    path: Path
    save: list[Literal["merged_16bit", "merged_4bit", "lora", "gguf"]]  # what is handed over (`make push`)
    #   The merged model in 16 bits and the GGUF files are made in any case, these out of that; merged_4bit asks merge
    #   for a copy in NF4 (NVIDIA GPU only), lora asks gguf for the adapter as a GGUF file
    model: Model
    data: Data
    format: Format
    lora: Lora
    sft: Sft
    rewards: Rewards
    grpo: Grpo
    infer: Infer
    merge: Merge
    gguf: Gguf
    ollama: Ollama
    vllm: Vllm | None = None
    health: Health = Health()
    base_model: BaseModel | None = None
    score_base: ScoreBase | None = None

    def tables(self, *names: str) -> dict[str, Any]:
        """Return the named tables as plain dicts: what a stage's manifest states as used."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in names if getattr(self, name) is not None}


# What a number may be: the words of the error message, and the test.
Bound = tuple[str, Callable[[Any], bool]]
OVER_0 = ("over 0", lambda value: value > 0)
OVER_0_UNDER_1 = ("over 0 and under 1", lambda value: 0 < value < 1)
OVER_0_AT_MOST_1 = ("over 0 and at most 1", lambda value: 0 < value <= 1)
FROM_0 = ("0 or more", lambda value: value >= 0)
FROM_0_UNDER_1 = ("0 or more and under 1", lambda value: 0 <= value < 1)
FROM_0_TO_1 = ("0 to 1", lambda value: 0 <= value <= 1)
FROM_1 = ("1 or more", lambda value: value >= 1)
FROM_2 = ("2 or more", lambda value: value >= 2)
SEED = ("0 to 4294967295", lambda value: 0 <= value < 2**32)  # what NumPy takes
# 6 control tokens, 256 bytes, and 65 characters in prompts and problems: SentencePiece has no smaller vocabulary.
VOCABULARY = ("327 or more", lambda value: value >= 327)

# The bounds of every number that has any of its own. Those that depend on another key are in `check`.
OPTIMIZER: dict[str, Bound] = {
    "learning_rate": OVER_0, "warmup_steps": FROM_0, "weight_decay": FROM_0, "adam_beta1": FROM_0_UNDER_1,
    "adam_beta2": FROM_0_UNDER_1, "max_grad_norm": FROM_0,
}  # fmt: skip
BOUNDS: dict[str, dict[str, Bound]] = {
    "health": {"log_entries": FROM_1, "max_kl": OVER_0, "min_entropy": FROM_0, "max_entropy": OVER_0},
    "base_model": {
        "seed": SEED, "layers": FROM_1, "hidden_size": FROM_1, "intermediate_size": FROM_1, "attention_heads": FROM_1,
        "key_value_heads": FROM_1, "initializer_range": OVER_0, "vocabulary_size": VOCABULARY,
        "max_position_tokens": FROM_1, "corpus_problems": FROM_1, "drill_share": FROM_0_UNDER_1,
        "eval_problems": FROM_1, "train_problems": FROM_1, "working_share": FROM_0_TO_1, "steps": FROM_1,
        "batch_size": FROM_1, "learning_rate": OVER_0, "weight_decay": FROM_0, "warmup_steps": FROM_0,
    },
    "data": {
        "max_prompt_tokens": FROM_1, "ngram_words": FROM_1, "near_duplicate_jaccard": OVER_0_AT_MOST_1,
        "contamination_overlap": OVER_0_AT_MOST_1,
    },
    "lora": {"rank": FROM_1, "alpha": FROM_1, "dropout": FROM_0_UNDER_1},
    "sft": {"seed": SEED, "steps": FROM_1, "max_tokens": FROM_2} | OPTIMIZER,
    "grpo": {
        "seed": SEED, "steps": FROM_1, "prompts_per_step": FROM_1, "num_iterations": FROM_1,
        "max_completion_tokens": FROM_1, "temperature": OVER_0, "top_p": OVER_0_AT_MOST_1, "top_k": FROM_0,
        "min_p": FROM_0_TO_1, "repetition_penalty": OVER_0, "beta": FROM_0, "epsilon": OVER_0_UNDER_1,
        "epsilon_high": OVER_0, "show_completions_steps": FROM_1,
    } | OPTIMIZER,
    "score_base": {"seed": SEED},
    "infer": {"problems": FROM_1, "batch_size": FROM_1, "max_completion_tokens": FROM_1},
    "merge": {"prompts": FROM_1, "positions_per_prompt": FROM_2, "max_mean_kl": OVER_0},
    "gguf": {"prompts": FROM_1, "positions_per_prompt": FROM_2, "importance_prompts": FROM_0, "max_lost_ends": FROM_0},
    "ollama": {
        "num_ctx": FROM_1, "temperature": FROM_0, "top_p": OVER_0_AT_MOST_1, "top_k": FROM_0, "min_p": FROM_0_TO_1,
        "repeat_penalty": OVER_0,
    },
}  # fmt: skip


def is_hub_name(name: str) -> bool:
    """Say whether `name` is a hub repository (`owner/name`) and not a path on this disk, or one that is misspelt."""
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    return looks and not name.endswith(DATA_SUFFIXES) and not Path(name).exists()
