"""Recipes: one TOML file a run, read strictly into frozen dataclasses, a table a class.

Every table is checked whenever any stage reads the recipe, so that a slip in `[gguf]` shows before the first stage and
not after hours of training. There are no hidden defaults: a field without a default here must be in the file.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

# Keys that change no result are in no identity: when one changes, a run goes on from its checkpoint.
UNCHANGING = ("save_steps", "log_steps", "show_completions_steps", "rehearsal")
# Keys that came later: left out of the identity where they are unset, so that an older result stays up to date.
LATER: dict[str, Any] = {
    "hub": "", "template_kwargs": {}, "sampled_prompts": None, "repeat_share": None, "validation_rows": 0,
    "evaluate_steps": 0, "keep": "last", "samples": 0, "sample_temperature": None, "sample_top_p": None,
    "sample_seed": None,
}  # fmt: skip
LATER_OF_SOURCE = ("hub", "tasks", "settings", "rows", "seed")
MAX_VLLM_RANK = 512  # of a LoRA (vllm/config/lora.py)


class Bound(NamedTuple):
    """What a number may be. A bound that depends on another key is in `rules.py`."""

    words: str  # of the error message
    holds: Callable[[float], bool]


OVER_0 = Bound("over 0", lambda value: value > 0)
OVER_0_UNDER_1 = Bound("over 0 and under 1", lambda value: 0 < value < 1)
OVER_0_TO_1 = Bound("over 0 and at most 1", lambda value: 0 < value <= 1)
FROM_0 = Bound("0 or more", lambda value: value >= 0)
FROM_0_UNDER_1 = Bound("0 or more and under 1", lambda value: 0 <= value < 1)
FROM_0_TO_1 = Bound("0 to 1", lambda value: 0 <= value <= 1)
FROM_1 = Bound("1 or more", lambda value: value >= 1)
FROM_2 = Bound("2 or more", lambda value: value >= 2)
GROUP = Bound("2 or more: a reward counts against its group's mean", lambda value: value >= 2)
SEED = Bound("0 to 4294967295", lambda value: 0 <= value < 2**32)  # what NumPy takes
# 6 control tokens, 256 bytes, and 65 characters in prompts and problems: SentencePiece has no smaller vocabulary.
VOCABULARY = Bound("327 or more", lambda value: value >= 327)


Hub = Literal["", "modelscope"]


@dataclass(frozen=True)
class Model:
    """`[model]`: what is trained, and with which engine."""

    name: str  # a hub name (then `revision` is a must), a local folder, or "base-model": the one this run makes
    dtype: Literal["float32", "bfloat16", "float16"]  # of the weights in training
    engine: Literal["trl", "unsloth"]
    revision: str = ""  # the hub commit, 40 hex digits
    hub: Hub = ""  # which hub `name` is on; "": the Hugging Face hub, or the mirror in HF_ENDPOINT
    load_in_4bit: bool = False  # engine unsloth: the base in 4 bits (NF4) while training; merge takes its 16 bits
    rehearsal: bool = True  # prepare-data trains, merges and converts a small copy of it, and refuses what fails so


@dataclass(frozen=True)
class Vllm:
    """`[vllm]`: what generates completions with engine "unsloth", on the GPU that also trains."""

    memory_share: Annotated[float, OVER_0_UNDER_1]  # of the GPU's memory, for the weights and the KV cache
    sequences: Annotated[int, FROM_1]  # completions decoded side by side
    standby: bool = False  # in GRPO, free the KV cache while the trainer works; while decoding, Unsloth then takes nine
    #   tenths of the GPU, whatever memory_share says


Check = Literal["nan", "constant_reward", "cut_off", "kl", "entropy"]


@dataclass(frozen=True)
class Health:
    """`[health]`: what ends a training run that would only waste GPU hours (`stages/lib/train/health.py`)."""

    log_entries: Annotated[int, FROM_1] = 20  # of log_steps each: a sign counts when all of them show it; nan at once
    max_kl: Annotated[float, OVER_0] | None = None  # nats; with beta = 0 none is measured
    min_entropy: Annotated[float, FROM_0] | None = None  # nats a token; not with engine unsloth, which measures none
    max_entropy: Annotated[float, OVER_0] | None = None
    warn_only: list[Check] = dataclasses.field(default_factory=list)  # these only say so; the others stop the run


@dataclass(frozen=True)
class BaseModel:
    """`[base_model]`: the embedded tiny base model, made by its own stage for recipes that have this table."""

    seed: Annotated[int, SEED]
    layers: Annotated[int, FROM_1]
    hidden_size: Annotated[int, FROM_1]
    intermediate_size: Annotated[int, FROM_1]
    attention_heads: Annotated[int, FROM_1]
    key_value_heads: Annotated[int, FROM_1]
    initializer_range: Annotated[float, OVER_0]
    vocabulary_size: Annotated[int, VOCABULARY]
    max_position_tokens: Annotated[int, FROM_1]
    corpus_problems: Annotated[int, FROM_1]  # word problems in the corpus, each once as a conversation
    drill_share: Annotated[float, FROM_0_UNDER_1]  # of the corpus: documents of nine single steps, no conversation
    eval_problems: Annotated[int, FROM_1]  # problems kept out of the corpus, for the eval set
    train_problems: Annotated[int, FROM_1]  # kept out of it, for the sft and grpo sets
    working_share: Annotated[float, FROM_0_TO_1]  # of train_problems: their solutions show the working
    steps: Annotated[int, FROM_1]
    batch_size: Annotated[int, FROM_1]
    learning_rate: Annotated[float, OVER_0]
    weight_decay: Annotated[float, FROM_0]
    warmup_steps: Annotated[int, FROM_0]


GYM = "reasoning-gym"  # the name of a source whose rows that package makes
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # in any case, each also packed
PACKED_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """One `[[data.sources]]`: where rows come from, which columns count and which sets they go to."""

    name: str  # a hub name (then `revision` is a must), a file, a folder, "base-model": the problems it made,
    #   or "reasoning-gym": rows that the tasks below make (`docs/reasoning-gym.md`)
    use: list[Literal["sft", "grpo", "eval"]]  # the sets that its rows go to: each row to all, unless `shares` split
    question: str | list[str]  # the column of the problem; several: their texts, one below the other
    answer: str  # the column of the answer; where it is the solution's or holds a conversation, style is "marked"
    answers: Literal["number", "math", "text", "choice", "python", "scored"] = "number"  # kind (`docs/answers.md`)
    decimal: Literal[".", ","] | None = None  # number: the decimal mark; None: ".", and what reads two ways is refused
    tolerance: Annotated[float, FROM_0_UNDER_1] = 0.005  # number: share that a rounded answer may be off a long float
    scorer: str = ""  # scored: the name of the scorer
    solution: str = ""  # the column of the worked solution, which sft needs; "": none, or within `answer` (gsm8k)
    style: Literal["plain", "gsm8k", "think", "marked"] = "plain"  # gsm8k: solution, "####" and answer are one column,
    #   with calculator marks; think: the solution has <think> marks, and is truncated if </think> is missing; marked:
    #   the answer's column is a text that marks it, by \boxed{}, "####" or "the answer is"
    choices: str | list[str] = ""  # choice: the column of the options, or a column each; put below the question
    chosen_by: Literal["", "letter", "text", "from 0", "from 1"] = ""  # choices: what the answer is: a letter or label,
    #   the option's text, its number; "": any, numbers from 0, and what reads two ways is refused
    revision: str = ""  # the hub commit, 40 hex digits
    hub: Hub = ""  # which hub `name` is on; "": the Hugging Face hub, or the mirror in HF_ENDPOINT
    config: str = ""  # the hub's name for a part of the dataset, such as "main" or "en"
    split: str = "train"
    shares: list[float] = dataclasses.field(default_factory=list)  # one a set in `use`, together at most 1: the hash
    #   of a question decides its one set, or none
    unreadable: Literal["refuse", "drop"] = "refuse"  # what a row does whose question, answer or solution is missing or
    #   unreadable: end the stage with an error, or be left out and counted
    max_rows: int = 0  # read so many rows from the start; 0: all
    tasks: dict[str, Annotated[float, OVER_0]] = dataclasses.field(default_factory=dict)  # reasoning-gym: weights of
    #   its tasks, by name
    settings: dict[str, dict[str, bool | int | float | str | list]] = dataclasses.field(default_factory=dict)  # type: ignore[type-arg]
    #   reasoning-gym: the tasks' own settings, by task; those left out are the package's
    rows: Annotated[int, FROM_1] | None = None  # reasoning-gym: made in all
    seed: Annotated[int, SEED] | None = None  # reasoning-gym: another seed, other rows


@dataclass(frozen=True)
class Data:
    """`[data]`: which problems, how they are cleaned and split."""

    sources: list[Source]
    max_prompt_tokens: Annotated[int, FROM_1]  # of the rendered prompt, chat markup included; longer ones are dropped
    ngram_words: Annotated[int, FROM_1]  # questions are compared by n-grams of so many words (a sign counts as one)
    near_duplicate_jaccard: Annotated[float, OVER_0_TO_1]  # of two questions in a set whose n-grams are as similar, one
    #   stays; 1: only exact duplicates go
    contamination_overlap: Annotated[float, OVER_0_TO_1]  # of the n-grams of a training or an eval question,
    #   whichever has fewer: from this share in the other on, the training question goes
    validation_rows: Annotated[int, FROM_0] = 0  # of the grpo set, kept out of all training for [grpo] evaluate_steps


@dataclass(frozen=True)
class Format:
    """`[format]`: how an answer is written; `stages/lib/answers/formats.py` knows each."""

    name: str
    system_prompt: str = ""  # left out: the format's own, which `read_recipe` puts here
    template_kwargs: dict[str, bool | int | str] = dataclasses.field(default_factory=dict)  # variables of the chat
    #   template, such as enable_thinking: written into the one that is trained and shipped


@dataclass(frozen=True)
class Lora:
    """`[lora]`: the adapter that SFT starts and GRPO goes on with."""

    rank: Annotated[int, FROM_1]  # of the product that is added to each weight matrix
    alpha: Annotated[int, FROM_1]  # what is added is scaled by alpha / rank
    dropout: Annotated[float, FROM_0_UNDER_1]  # of the adapter's input, in training; Unsloth's fast kernels ask for 0
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

    seed: Annotated[int, SEED]
    steps: Annotated[int, FROM_1]
    batch_size: Annotated[int, FROM_1]  # examples an optimizer step
    micro_batch_size: Annotated[int, FROM_1]  # examples a forward pass
    max_tokens: Annotated[int, FROM_2]  # of prompt and completion together; longer examples are refused, not cut
    learning_rate: Annotated[float, OVER_0]
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, FROM_0]
    optimizer: Literal[TorchOptimizer, BitsandbytesOptimizer]
    weight_decay: Annotated[float, FROM_0]
    adam_beta1: Annotated[float, FROM_0_UNDER_1]
    adam_beta2: Annotated[float, FROM_0_UNDER_1]
    max_grad_norm: Annotated[float, FROM_0]
    packing: bool  # several examples in one row of max_tokens, instead of padding
    gradient_checkpointing: bool  # compute a layer's activations again instead of keeping them: less memory, slower
    save_steps: Annotated[int, FROM_1]  # a checkpoint every so many steps
    log_steps: Annotated[int, FROM_1]  # each step is logged; so many are an entry that [health] counts


@dataclass(frozen=True)
class Rewards:
    """`[rewards]`: what is rewarded in GRPO; `stages/lib/rewards/` knows each function."""

    functions: list[str]
    weights: list[float]  # one a function; 0: logged, not rewarded
    length_cache_tokens: int | None = None  # length_penalty: the last so many completion tokens cost
    repetition_ngram_tokens: int | None = None  # repetition_penalty: the length of what is repeated
    repetition_max_penalty: float | None = None  # repetition_penalty: what nothing but repetition costs


@dataclass(frozen=True)
class Grpo:
    """`[grpo]`: group relative policy optimization (arXiv 2402.03300) and what came after it."""

    seed: Annotated[int, SEED]
    steps: Annotated[int, FROM_1]
    prompts_per_step: Annotated[int, FROM_1]
    completions_per_prompt: Annotated[int, GROUP]
    micro_batch_size: Annotated[int, FROM_1]  # completions a forward and backward pass
    num_iterations: Annotated[int, FROM_1]  # optimizer passes over one batch of completions
    max_completion_tokens: Annotated[int, FROM_1]
    temperature: Annotated[float, OVER_0]  # of sampling; 1.0: the model's own distribution
    top_p: Annotated[float, OVER_0_TO_1]  # 1.0: all tokens
    top_k: Annotated[int, FROM_0]  # 0: all
    min_p: Annotated[float, FROM_0_TO_1]  # least probability of a token, as a share of the likeliest one's; 0.0: none
    repetition_penalty: Annotated[float, OVER_0]  # 1.0: none
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"]  # what divides the sum over tokens
    scale_rewards: Literal["group", "batch", "none"]  # whose standard deviation divides the advantages
    beta: Annotated[float, FROM_0]  # weight of the KL divergence from the SFT model (engine unsloth: from the base,
    #   which undoes what SFT taught); 0: not measured
    epsilon: Annotated[float, OVER_0_UNDER_1]  # a token's probability ratio is clipped below 1 - epsilon
    epsilon_high: Annotated[float, OVER_0]  # and clipped above 1 + epsilon_high
    mask_truncated_completions: bool  # a truncated completion teaches nothing
    learning_rate: Annotated[float, OVER_0]
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, FROM_0]
    optimizer: Literal[TorchOptimizer, BitsandbytesOptimizer]
    weight_decay: Annotated[float, FROM_0]
    adam_beta1: Annotated[float, FROM_0_UNDER_1]
    adam_beta2: Annotated[float, FROM_0_UNDER_1]
    max_grad_norm: Annotated[float, FROM_0]
    gradient_checkpointing: bool  # as in [sft]
    save_steps: Annotated[int, FROM_1]  # a checkpoint every so many steps
    log_steps: Annotated[int, FROM_1]  # each step is logged; so many are an entry that [health] counts
    show_completions_steps: Annotated[int, FROM_1]  # every so many steps, a table of samples on the terminal
    min_completion_tokens: int | None = None  # out of GPU memory, completions shorten down to this; None: never
    sampled_prompts: Annotated[int, FROM_1] | None = None  # a step samples so many prompts and trains on
    #   prompts_per_step of them, groups with an advantage first; None: on all that it samples
    repeat_share: Annotated[float, FROM_0_UNDER_1] | None = None  # of a step's prompts, drawn from problems whose last
    #   group had an advantage; None: every problem comes once an epoch
    evaluate_steps: Annotated[int, FROM_0] = 0  # every so many steps, greedy answers to the validation set; 0: never
    keep: Literal["last", "best"] = "last"  # the adapter after the last step, or after the evaluation with the highest
    #   accuracy, the earliest of several


@dataclass(frozen=True)
class ScoreBase:
    """`[score_base]`: the rewards before GRPO, of completions sampled as `[grpo]` says. For the score-base stage."""

    problems: Annotated[int, FROM_1]  # at most so many of the grpo set, drawn by the seed
    completions_per_problem: Annotated[int, GROUP]
    batch_size: Annotated[int, FROM_1]  # completions a batch, whole groups
    seed: Annotated[int, SEED]
    min_pass_rate: Annotated[float, FROM_0_TO_1]  # least share of right answers of a problem in the subset for GRPO
    max_pass_rate: Annotated[float, FROM_0_TO_1]  # most share; 0.0 and 1.0 together: no subset is made


@dataclass(frozen=True)
class Infer:
    """`[infer]`: the evaluation on held-out problems."""

    problems: Annotated[int, FROM_1]  # at most so many of the eval set
    batch_size: Annotated[int, FROM_1]
    max_completion_tokens: Annotated[int, FROM_1]
    samples: Annotated[int, FROM_0] = 0  # drawn answers to each problem beside the greedy one: pass@k, maj@k; 0: none
    sample_temperature: Annotated[float, OVER_0] | None = None  # of these: needed with them, as the two below
    sample_top_p: Annotated[float, OVER_0_TO_1] | None = None
    sample_seed: Annotated[int, SEED] | None = None


@dataclass(frozen=True)
class Merge:
    """`[merge]`: the adapter folded into the base."""

    dtype: Literal["bfloat16", "float16"]
    prompts: Annotated[int, FROM_1] = 16  # of the eval set: there merged model and adapter on its base are compared
    positions_per_prompt: Annotated[int, FROM_2] = 32  # of a prompt, at which next-token distributions are compared
    max_mean_kl: Annotated[float, OVER_0] = 1e-4  # nats


@dataclass(frozen=True)
class Gguf:
    """`[gguf]`: the quantizations, and how far from the merged model each may be."""

    types: list[str]  # out of GGUF_TYPES, in any case
    prompts: Annotated[int, FROM_1] = 50  # of the eval set: there every file is compared with the merged model
    positions_per_prompt: Annotated[int, FROM_2] = 32  # of prompt and completion, at which they are compared
    max_mean_kl: dict[str, Annotated[float, OVER_0]] = dataclasses.field(default_factory=dict)  # nats, by type, where
    #   GGUF_TYPES' own is not meant
    importance_prompts: Annotated[int, FROM_0] = 0  # of the sft set, for an importance matrix; 0: none
    max_lost_ends: Annotated[int, FROM_0] = 0  # prompts on which a file may run on though the merged model ends


@dataclass(frozen=True)
class Ollama:
    """`[ollama]`: the Modelfile."""

    quantization: str  # the recommended one, out of [gguf] types
    num_ctx: Annotated[int, FROM_1]
    temperature: Annotated[float, FROM_0]
    top_p: Annotated[float, OVER_0_TO_1]
    top_k: Annotated[int, FROM_0]
    min_p: Annotated[float, FROM_0_TO_1]
    repeat_penalty: Annotated[float, OVER_0] = 1.0  # 1: none, as in training; Ollama's own default has been 1.1
    license: str = ""  # the name or the text of the licence that the model goes out under; "": none is stated


Tracker = Literal["tensorboard", "swanlab", "wandb", "trackio", "mlflow"]


@dataclass(frozen=True)
class Tracking:
    """`[tracking]`: where training is logged besides TensorBoard's files (`docs/tracking.md`). In no identity."""

    to: list[Tracker] = dataclasses.field(default_factory=list)
    project: str = ""  # left out: the recipe's name
    name: str = ""  # how the names of runs begin; left out: the recipe's name


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, and what `read_recipe` knows besides: two fields that are in no identity."""

    path: Path  # the file it was read from
    model_folder: Path | None  # where its model lies on this disk; None: on the hub, or not made yet
    save: list[Literal["merged_16bit", "merged_4bit", "lora", "gguf"]]  # what is handed over (`make push`):
    #   merged_16bit and gguf are made in any case; merged_4bit has merge make a copy in NF4 (NVIDIA GPU only), lora has
    #   gguf make a GGUF file of the adapter
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
    tracking: Tracking = Tracking()
    base_model: BaseModel | None = None
    score_base: ScoreBase | None = None

    def tables(self, *names: str) -> dict[str, Any]:
        """Return the named tables as plain dicts: what a stage's manifest states as used.

        Without `UNCHANGING`, and without those of `LATER` that are unset.
        """
        tables = {name: dataclasses.asdict(table) for name in names if (table := getattr(self, name)) is not None}
        for table in tables.values():
            for key in (*UNCHANGING, *(key for key, unset in LATER.items() if table.get(key) in (None, unset))):
                table.pop(key, None)
            for source in table.get("sources", ()):
                for key in LATER_OF_SOURCE:
                    if source[key] in (None, {}, ""):
                        del source[key]
        return tables


def is_hub_name(name: str) -> bool:
    """Say whether `name` is a hub repository (`owner/name`) and not a path on this disk, or one that is misspelt."""
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    ends = (*DATA_SUFFIXES, *PACKED_SUFFIXES)
    return looks and not name.lower().endswith(ends) and not Path(name).exists()
