"""Recipes: one TOML file a run, read strictly into frozen dataclasses, a table a class.

Every table is checked whenever any stage reads the recipe, so that a slip in `[gguf]` shows before the first stage and
not after hours of training. There are no hidden defaults: a field without a default here must be in the file.
"""

import dataclasses
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.lib import formats, modelfile, rewards
from stages.lib.errors import UserError, nearest

# llama.cpp's types (LLAMA_FTYPE in llama.h, less NVFP4, which its quantizer does not make) and the mean KL divergence
# (nats) that a file of each may have from the merged model, where [gguf.max_mean_kl] says nothing else:
# docs/fidelity.md.
GGUF_TYPES = {
    "f32": 1e-4, "f16": 1e-4, "bf16": 1e-3,
    "q8_0": 1e-2, "q6_k": 2e-2,
    "q5_k_m": 4e-2, "q5_k_s": 4e-2, "q5_1": 4e-2, "q5_0": 4e-2,
    "q4_k_m": 1e-1, "q4_k_s": 1e-1, "q4_1": 1e-1, "q4_0": 1e-1, "iq4_nl": 1e-1, "iq4_xs": 1e-1, "mxfp4_moe": 1e-1,
    "q3_k_l": 3e-1, "q3_k_m": 3e-1, "q3_k_s": 3e-1, "iq3_m": 3e-1, "iq3_s": 3e-1, "iq3_xs": 3e-1, "iq3_xxs": 3e-1,
    "q2_k": 1.0, "q2_k_s": 1.0, "q2_0": 1.0, "iq2_m": 1.0, "iq2_s": 1.0, "iq2_xs": 1.0, "iq2_xxs": 1.0, "tq2_0": 1.0,
    "iq1_m": 2.0, "iq1_s": 2.0, "q1_0": 2.0, "tq1_0": 2.0,
}  # fmt: skip
# Of these, those that llama.cpp refuses to make without an importance matrix.
NEED_IMPORTANCE = ("iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
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
    """`[health]`: what ends a training run that would only waste GPU hours; `stages/lib/health.py` has the checks."""

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
    """`[format]`: how an answer is written; `stages/lib/formats.py` knows each."""

    name: str
    system_prompt: str = ""  # "" is the format's own

    @property
    def prompt(self) -> str:
        """The system prompt in use."""
        return self.system_prompt or formats.get(self.name).system_prompt


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
    """`[rewards]`: what GRPO pays for; `stages/lib/rewards.py` knows each."""

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
OPTIMIZER = {
    "learning_rate": OVER_0, "warmup_steps": FROM_0, "weight_decay": FROM_0, "adam_beta1": FROM_0_UNDER_1,
    "adam_beta2": FROM_0_UNDER_1, "max_grad_norm": FROM_0,
}  # fmt: skip
BOUNDS = {
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


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises `UserError`, naming file, key and nearest match, for an unknown, missing or mistyped key, for a number out of
    its bounds, and for what contradicts itself across tables.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such recipe. Run: make help") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    recipe = build(Recipe, tables, path, "", given={"path": path})
    check(recipe)
    return recipe


def build(kind: type, table: dict[str, Any], path: Path, where: str, given: dict[str, Any] | None = None) -> Any:
    """Return `kind`, a dataclass, from a TOML table; `where` is the table's dotted name, "" for the whole file."""
    given = given or {}
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in given}
    for key, value in table.items():
        if key not in fields:
            name = f"[{where}] {key}" if where else f"[{key}]" if isinstance(value, dict) else key
            raise UserError(f"{path}: {name} is not known{nearest(key, fields)}; known: {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(kind)
    values = dict(given)
    for name, field in fields.items():
        spelled = f"[{where}] {name}" if where else name if name == "save" else f"[{name}]"
        if name in table:
            values[name] = convert(table[name], hints[name], path, f"{where}.{name}".lstrip("."), spelled)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}: {spelled} is missing")
    return kind(**values)


def convert(value: Any, hint: Any, path: Path, where: str, spelled: str) -> Any:
    """Return `value` as the type `hint` asks for, or raise `UserError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return convert(value, next(kind for kind in arguments if kind is not type(None)), path, where, spelled)
    if origin is Literal:
        if value not in arguments:
            close = nearest(str(value), arguments)
            raise UserError(f"{path}: {spelled} = {value!r}; expected one of {', '.join(arguments)}{close}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{path}: {spelled} = {value!r}; expected a list")
        return [convert(item, arguments[0], path, where, f"{spelled}, item {n}") for n, item in enumerate(value, 1)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path}: {spelled} = {value!r}; expected a table [{where}]")
        return {
            key: convert(item, arguments[1], path, f"{where}.{key}", f"[{where}] {key}") for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {spelled} = {value!r}; expected a table [{where}]")
        return build(hint, value, path, where)
    if hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if type(value) is not hint:
        raise UserError(f"{path}: {spelled} = {value!r}; expected {hint.__name__}, found {type(value).__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{path}: {spelled} = {value!r}; expected a finite number")
    return value


def is_hub_name(name: str) -> bool:
    """Say whether `name` is a hub repository (`owner/name`) and not a path on this disk, or one that is misspelt."""
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    return looks and not name.endswith(DATA_SUFFIXES) and not Path(name).exists()


def check(recipe: Recipe) -> None:
    """Raise `UserError` for a value that is out of bounds, and for values that contradict each other."""
    path = recipe.path
    check_bounds(recipe)
    pinned = [("[model]", recipe.model.name, recipe.model.revision)]
    # A dataset without any is refused when it is about to be fetched: a local copy of it needs none.
    pinned += [("[[data.sources]]", source.name, source.revision) for source in recipe.data.sources if source.revision]
    for where, name, revision in pinned:
        if is_hub_name(name) and not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise UserError(
                f"{path}: {where} name = {name!r} is fetched from the hub, so revision must be a commit "
                f"(40 hex digits); found {revision!r}"
            )
        if name == "base-model" and recipe.base_model is None:
            raise UserError(f"{path}: {where} name = 'base-model' asks for a [base_model] table; there is none")
    if recipe.model.engine == "unsloth":
        if recipe.vllm is None or not 0 < recipe.vllm.memory_share < 1 or recipe.vllm.sequences < 1:
            raise UserError(
                f"{path}: [model] engine = 'unsloth' needs a [vllm] table with memory_share between 0 and 1 and "
                f"sequences of 1 or more; found {recipe.vllm}"
            )
        if recipe.model.dtype == "float32":
            raise UserError(f"{path}: [model] dtype = 'float32' is nothing for engine 'unsloth'; expected 'bfloat16'")
        if recipe.health.min_entropy is not None or recipe.health.max_entropy is not None:
            raise UserError(
                f"{path}: [health] min_entropy and max_entropy are without effect with engine 'unsloth', which "
                f"measures no entropy. Leave them out"
            )
        if recipe.lora.rank > MAX_VLLM_RANK:
            raise UserError(f"{path}: [lora] rank = {recipe.lora.rank}; vLLM takes at most {MAX_VLLM_RANK}")
        if recipe.grpo.loss_type == "dr_grpo" and recipe.grpo.scale_rewards == "group":
            raise UserError(
                f"{path}: [grpo] scale_rewards = 'group' with loss_type = 'dr_grpo': engine 'unsloth' takes it for "
                f"'none'. Write 'none' or 'batch'"
            )
    elif recipe.model.load_in_4bit:
        raise UserError(f"{path}: [model] load_in_4bit = true needs engine = 'unsloth'; found {recipe.model.engine!r}")
    if not recipe.save or len(set(recipe.save)) < len(recipe.save):
        raise UserError(f"{path}: save = {recipe.save}; expected one or more, each once")
    try:
        answer_format = formats.get(recipe.format.name)
    except UserError as error:
        raise UserError(f"{path}: [format] name: {error.message}") from error
    check_rewards(recipe, answer_format)
    check_health(path, recipe.health)
    if recipe.base_model is not None:
        check_base_model(path, recipe.base_model)
    check_data(recipe)
    if not recipe.lora.target_modules:
        raise UserError(f'{path}: [lora] target_modules = []; expected module names, or ["all-linear"]')
    divides(path, "[sft] batch_size", recipe.sft.batch_size, "micro_batch_size", recipe.sft.micro_batch_size)
    batch = recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt
    what = "[grpo] prompts_per_step x completions_per_prompt"
    divides(path, what, batch, "micro_batch_size", recipe.grpo.micro_batch_size)
    for where, table in (("[sft]", recipe.sft), ("[grpo]", recipe.grpo)):
        if not 1 <= table.log_steps <= table.steps or table.save_steps < 1:
            raise UserError(f"{path}: {where} log_steps must be 1 to steps = {table.steps}, save_steps 1 or more")
    if recipe.grpo.completions_per_prompt < 2:
        raise UserError(
            f"{path}: [grpo] completions_per_prompt must be 2 or more: a reward counts against its group's mean"
        )
    least, most = recipe.grpo.min_completion_tokens, recipe.grpo.max_completion_tokens
    if least is not None and not (recipe.rewards.length_cache_tokens or 1) <= least <= most:
        raise UserError(
            f"{path}: [grpo] min_completion_tokens = {least}; expected at least [rewards] length_cache_tokens = "
            f"{recipe.rewards.length_cache_tokens} (or 1 without) and at most max_completion_tokens = {most}"
        )
    check_score_base(path, recipe.score_base)
    divides(path, "[grpo] save_steps", recipe.grpo.save_steps, "num_iterations", recipe.grpo.num_iterations)
    check_gguf(path, recipe.gguf)
    check_ollama(recipe)


def check_bounds(recipe: Recipe) -> None:
    """Raise `UserError` for the first number that is not within `BOUNDS`, and for a limit of [gguf.max_mean_kl]."""
    for table, bounds in BOUNDS.items():
        for name, (expected, holds) in bounds.items():
            value = getattr(getattr(recipe, table), name, None)  # None: the table, or the key, is not in the recipe
            if value is not None and not holds(value):
                raise UserError(f"{recipe.path}: [{table}] {name} = {value}; expected {expected}")
    expected, holds = OVER_0
    for name, limit in recipe.gguf.max_mean_kl.items():
        if not holds(limit):
            raise UserError(f"{recipe.path}: [gguf.max_mean_kl] {name} = {limit}; expected {expected}")


def check_health(path: Path, health: Health) -> None:
    """Raise `UserError` for bounds of the entropy that no training run could keep."""
    low, high = health.min_entropy, health.max_entropy
    if low is not None and high is not None and low >= high:
        raise UserError(f"{path}: [health] min_entropy = {low} is not below max_entropy = {high}")


def check_base_model(path: Path, table: BaseModel) -> None:
    """Raise `UserError` for heads that the network's width can't be shared out to."""
    heads = table.attention_heads
    if table.hidden_size % (2 * heads):  # rotary position embeddings turn a head's columns in pairs
        raise UserError(
            f"{path}: [base_model] hidden_size = {table.hidden_size}; expected a multiple of 2 x attention_heads = "
            f"{2 * heads}"
        )
    divides(path, "[base_model] attention_heads", heads, "key_value_heads", table.key_value_heads)


def check_ollama(recipe: Recipe) -> None:
    """Raise `UserError` for a file that is not made, a context too short to answer in, and text no Modelfile holds."""
    path = recipe.path
    if recipe.ollama.quantization.lower() not in [name.lower() for name in recipe.gguf.types]:
        raise UserError(
            f"{path}: [ollama] quantization = {recipe.ollama.quantization!r} is not among [gguf] types "
            f"{recipe.gguf.types}"
        )
    prompt, completion = recipe.data.max_prompt_tokens, recipe.grpo.max_completion_tokens
    if recipe.ollama.num_ctx < prompt + completion:
        raise UserError(
            f"{path}: [ollama] num_ctx = {recipe.ollama.num_ctx}; expected {prompt + completion} or more, which is "
            f"[data] max_prompt_tokens = {prompt} and [grpo] max_completion_tokens = {completion} together"
        )
    texts = (
        ("[format] system_prompt", "SYSTEM", recipe.format.prompt),
        ("[ollama] license", "LICENSE", recipe.ollama.license),
    )
    for where, command, text in texts:
        try:
            modelfile.command(command, text)
        except UserError as error:
            raise UserError(f"{path}: {where}: {error.message}") from error


def check_rewards(recipe: Recipe, answer_format: formats.Format) -> None:
    """Raise `UserError` for a reward that GRPO could not find, or could not weigh."""
    path, table = recipe.path, recipe.rewards
    if not table.functions:
        raise UserError(f"{path}: [rewards] functions = []; expected one or more")
    if len(table.functions) != len(table.weights):
        raise UserError(f"{path}: [rewards] has {len(table.functions)} functions and {len(table.weights)} weights")
    if not any(table.weights):
        raise UserError(f"{path}: [rewards] weights = {table.weights}; expected one or more that are not 0")
    try:
        rewards.check_names(
            table.functions,
            answer_format,
            path.parent,
            max_completion_tokens=recipe.grpo.max_completion_tokens,
            length_cache_tokens=table.length_cache_tokens,
            repetition_ngram_tokens=table.repetition_ngram_tokens,
            repetition_max_penalty=table.repetition_max_penalty,
        )
    except UserError as error:
        raise UserError(f"{path}: {error.message}") from error


def check_data(recipe: Recipe) -> None:
    """Raise `UserError` when the sources can't make the three sets."""
    path, data = recipe.path, recipe.data
    for source in data.sources:
        where = f"{path}: [[data.sources]] {source.name!r}"
        if not source.use or len(set(source.use)) < len(source.use):
            raise UserError(f"{where} use = {source.use}; expected one or more of sft, grpo, eval, each once")
        if source.name == "base-model" and source.split not in ("train", "eval"):
            raise UserError(f"{where} split = {source.split!r}; base-model makes 'train' and 'eval'")
        for key, column in (("question", source.question), ("answer", source.answer)):
            if not column:
                raise UserError(f"{where} {key} = ''; expected the name of a column")
        if source.max_rows < 0:
            raise UserError(f"{where} max_rows = {source.max_rows}; expected 0 (all) or more")
        if "sft" in source.use and not source.solution and source.style != "gsm8k":
            raise UserError(f"{where} goes to sft, so solution must name the column of the worked solution")
        if source.style == "gsm8k" and source.solution:
            raise UserError(f"{where} has style = 'gsm8k': the solution is in the answer column; leave solution out")
        if source.style == "think" and not source.solution:
            raise UserError(f"{where} has style = 'think', so solution must name the column with the <think> marks")
        if source.shares and (
            len(source.shares) != len(source.use) or min(source.shares) <= 0 or sum(source.shares) > 1 + 1e-9
        ):
            raise UserError(
                f"{where} shares = {source.shares}; expected one a set in {source.use}, over 0, at most 1 in all"
            )
        if "eval" in source.use and len(source.use) > 1 and not source.shares:
            raise UserError(f"{where} would train on its own eval problems; give shares, one a set in {source.use}")
    for name in ("sft", "grpo", "eval"):
        if not any(name in source.use for source in data.sources):
            raise UserError(f"{path}: no [[data.sources]] has {name!r} in its use; sft, grpo and eval all need one")


def check_score_base(path: Path, table: ScoreBase | None) -> None:
    """Raise `UserError` when groups are too small to differ or don't fill batches, or the bounds hold nothing."""
    if table is None:
        return
    if table.problems < 1 or table.completions_per_problem < 2:
        raise UserError(f"{path}: [score_base] problems must be 1 or more, completions_per_problem 2 or more")
    size = table.completions_per_problem
    divides(path, "[score_base] batch_size", table.batch_size, "completions_per_problem", size)
    low, high = table.min_pass_rate, table.max_pass_rate
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"{path}: [score_base] min_pass_rate = {low} and max_pass_rate = {high}; expected 0 to 1, the smaller first"
        )


def divides(path: Path, what: str, whole: int, by: str, part: int) -> None:
    """Raise `UserError` unless `part` is positive and divides `whole`."""
    if part < 1 or whole < 1 or whole % part:
        raise UserError(f"{path}: {what} = {whole} is not a multiple of {by} = {part}")


def check_gguf(path: Path, gguf: Gguf) -> None:
    """Raise `UserError` for a type that llama.cpp can't make, or not without an importance matrix; and for none."""
    for where, names in (("types", gguf.types), ("max_mean_kl", gguf.max_mean_kl)):
        for name in names:
            if name.lower() not in GGUF_TYPES:
                close = nearest(name.lower(), GGUF_TYPES)
                raise UserError(
                    f"{path}: [gguf] {where}: {name!r} is no type of llama.cpp{close}; {', '.join(GGUF_TYPES)}"
                )
    if not gguf.types or len({name.lower() for name in gguf.types}) < len(gguf.types):
        raise UserError(f"{path}: [gguf] types = {gguf.types}; expected one or more, each once")
    needy = [name for name in gguf.types if name.lower() in NEED_IMPORTANCE]
    if needy and not gguf.importance_prompts:
        raise UserError(
            f"{path}: [gguf] importance_prompts = 0; expected 1 or more: without an importance matrix llama.cpp "
            f"does not make {', '.join(needy)}"
        )
