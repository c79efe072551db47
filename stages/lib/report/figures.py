"""The figures of every stage: what `metrics` holds in its manifest, with types and units.

A share is of 1. An interval is Wilson's at 95%. KL divergence is in nats, from the reference to the other model.
"""

import typing
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, TypeVar

from stages.lib.answers.evaluated import Validation
from stages.lib.answers.sampled import Sampled
from stages.lib.distance import Distance
from stages.lib.errors import UserError
from stages.lib.gguf.prompted import Prompted

F = TypeVar("F")


class BaseModelFigures(TypedDict):
    """The tiny network. `tokens`: trained on, without padding; `loss`: mean of the last 20 steps, nats a token."""

    parameters: int
    tokens: int
    loss: float


class SourceRead(TypedDict):
    """A source of problems. `rows`: read; `dropped`: rows left out of every set, by reason."""

    name: str
    split: str
    use: list[str]
    rows: int
    dropped: dict[str, int]


class Lengths(TypedDict):
    """Percentiles of lengths in tokens, over the `measured` ones."""

    measured: int
    p50: int
    p90: int
    p99: int
    max: int


class ProblemSet(TypedDict):
    """A finished set. `dropped`: rows left out of it, by reason; `example_tokens`: prompt and solution, of sft."""

    rows: int
    dropped: dict[str, int]
    prompt_tokens: Lengths
    example_tokens: NotRequired[Lengths]


class Rehearsal(TypedDict):
    """Mean KLs (nats) from the merged model, of a small copy with random weights: what `model.dress` returns."""

    base: float
    adapter: float
    gguf: float
    lora: NotRequired[float]


class PrepareDataFigures(TypedDict):
    """The sources in the recipe's order, and the sets `sft`, `grpo` and `eval`."""

    sources: list[SourceRead]
    sets: dict[str, ProblemSet]
    rehearsal: NotRequired[Rehearsal]


# `from` and `to`: a `train.ladder.Rung` each; `at_step`: the optimizer step that ran out of memory.
StepDown = TypedDict("StepDown", {"at_step": int, "from": dict[str, Any], "to": dict[str, Any], "reason": str})


class SftFigures(TypedDict):
    """Supervised fine-tuning. `examples`: their number; `loss`: last tenth of the steps, nats a completion token."""

    examples: int
    dropped_too_long: int
    loss: float
    trainable_parameters: int
    memory_ladder: list[StepDown]


class Rewarded(TypedDict):
    """Means over some steps of GRPO.

    `reward`: the weighted sum; `reward_std`: its deviation over a step's completions; `rewards`: unweighted, by
    function, without one that scored nothing; `cut_off`: the share of truncated completions. With vLLM,
    `sampling_difference`: of its log-probability of a token from the trainer's, absolute, nats; and `importance_ratio`.
    """

    reward: float
    reward_std: float
    rewards: dict[str, float]
    completion_tokens: float
    cut_off: float
    sampling_difference: NotRequired[float]
    importance_ratio: NotRequired[float]


class GrpoFigures(TypedDict):
    """GRPO in the first and in the last tenth of its steps."""

    first: Rewarded
    last: Rewarded
    memory_ladder: list[StepDown]
    validation: NotRequired[Validation]


class Spread(TypedDict):
    """Rewards of all completions. `spread`: standard deviation; `zero_variance`: share of groups rewarded alike."""

    mean: float
    spread: float
    least: float
    most: float
    zero_variance: float


class ScoredReward(Spread):
    """One reward function, unweighted."""

    name: str
    weight: float


class Scores(TypedDict):
    """Sampled completions. Shares: `right`, `well_formed`, `cut_off` (truncated). `tokens`: mean; `*_right`: counts."""

    problems: int
    completions: int
    right: float
    well_formed: float
    cut_off: float
    tokens: float
    never_right: int
    always_right: int
    rewards: list[ScoredReward]
    total: Spread


class ScoreBaseFigures(Scores):
    """Scores of the `model` "base" or "sft". `subset`: problems within the bounds, where a recipe has them."""

    model: str
    subset: NotRequired[int]
    advice: list[str]


class Evaluation(TypedDict):
    """One model on the held-out problems. Shares: `accuracy`, `well_formed`, `cut_off` (truncated). `tokens`: mean."""

    problems: int
    accuracy: float
    accuracy_interval: list[float]
    well_formed: float
    tokens: float
    cut_off: float


class Step(TypedDict):
    """Problems `gained` and `lost` by the later of two models; `p`: McNemar's exact test, two-sided."""

    gained: int
    lost: int
    p: float


class InferFigures(TypedDict):
    """The evaluation of three models, the steps "base to sft" and "sft to grpo", and drawn answers by model."""

    base: Evaluation
    sft: Evaluation
    grpo: Evaluation
    steps: dict[str, Step]
    sampled: NotRequired[dict[str, Sampled]]


class FourBitDistance(TypedDict):
    """Distance of a 4-bit model from the adapter on its 16-bit base. `bytes`: of its weights, where it was saved."""

    mean_kl: float
    max_kl: float
    same_top: float
    bytes: NotRequired[int]


class MergeFigures(TypedDict):
    """Distance of the merged model (`merged_*`) and of the base (`base_*`) from the adapter on its base."""

    prompts: int
    positions: int
    merged_mean_kl: float
    merged_max_kl: float
    merged_same_top: float
    base_mean_kl: float
    parameters: int
    bytes: int
    trained_in_4bit: NotRequired[FourBitDistance]
    merged_4bit: NotRequired[FourBitDistance]


class Accuracy(TypedDict):
    """A share of right answers with its interval."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float


class MergedReference(Accuracy):
    """The merged model in transformers. `ended`: the number of completions with an end token."""

    prompts: int
    positions: int
    ended: int


class AdapterFile(Distance):
    """Distance of the adapter's GGUF file on the base's from the merged model. `max_mean_kl`: the limit."""

    bytes: int
    max_mean_kl: float


class GgufFile(AdapterFile, Accuracy):
    """A GGUF file and the merged model. `same_text`: a share; `flipped_*`, `ended`: numbers; `answer`: the first."""

    same_text: float
    flipped_to_wrong: int
    flipped_to_right: int
    ended: int
    answer: str


class GgufFigures(TypedDict):
    """llama-server's prompts, the files by type, and the adapter's where there is one."""

    reference: MergedReference
    llama_server: Prompted
    files: dict[str, GgufFile]
    lora: NotRequired[AdapterFile]


class OllamaModelfileFigures(TypedDict):
    """The Modelfile's proof. `conversations`: the number that both templates render alike.

    `prompted_by`: what of it Ollama prompts with (`stages/lib/ollama/served.py`); `architecture`: the GGUF file's.
    """

    conversations: int
    stops: list[str]
    system_prompt: bool
    earlier_answers_as_trained: bool
    file: str
    architecture: str
    prompted_by: str


def figures_of(manifest: Mapping[str, Any], kind: type[F]) -> F:
    """Return the figures in a manifest. Raises `UserError` where they are not of the type `kind`."""
    if found := mismatch(manifest.get("metrics"), kind, "metrics"):
        stage = manifest["stage"]
        raise UserError(f"the manifest of {stage}: {found}. Delete the artifact and run: make {stage}")
    return manifest["metrics"]


def mismatch(value: Any, kind: Any, key: str) -> str | None:
    """Return at which key `value` is not of the type `kind`, what is there and what was expected; None if it is."""
    if kind is Any:
        return None
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    parts: list[tuple[Any, Any, str]] = []
    if typing.is_typeddict(kind):
        origin, hints = dict, typing.get_type_hints(kind)
        if isinstance(value, dict):
            if missing := sorted(kind.__required_keys__ - set(value)):
                return f"{key}.{missing[0]} is missing; expected {hints[missing[0]].__name__}"
            if unknown := sorted(set(value) - set(hints)):
                return f"{key}.{unknown[0]} is not known; expected {', '.join(hints)}"
            parts = [(value[name], hints[name], f"{key}.{name}") for name in value]
    elif origin is dict and isinstance(value, dict):
        parts = [(item, arguments[1], f"{key}.{name}") for name, item in value.items()]
    elif origin is list and isinstance(value, list):
        parts = [(item, arguments[0], f"{key}[{place}]") for place, item in enumerate(value)]
    if type(value) not in ((int, float) if kind is float else (origin,)):
        return f"{key} = {value!r}; expected {origin.__name__}, found {type(value).__name__}"
    return next((fault for part in parts if (fault := mismatch(*part))), None)
