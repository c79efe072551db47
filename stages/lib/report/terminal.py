"""The figures that a stage prints at its end, as tables and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.lib.answers import stats
from stages.lib.answers.evaluated import Validation
from stages.lib.answers.sampled import Sampled
from stages.lib.ollama import served
from stages.lib.report.figures import (
    AdapterFile,
    Evaluation,
    GgufFigures,
    InferFigures,
    MergeFigures,
    OllamaModelfileFigures,
    PrepareDataFigures,
    ScoreBaseFigures,
)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line a row with aligned columns: the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def interval(low: float, high: float) -> str:
    """Return an interval of shares as text."""
    return f"{low:.1%} to {high:.1%}"


def counted(dropped: Mapping[str, int]) -> str:
    """Return the number of rows left out, by reason, as text."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"


def epochs(name: str, steps: int, rows_per_step: int, rows: int, packing: bool = False) -> str:
    """Return how often a training of `steps` steps goes through the `rows` of its set."""
    count = steps * rows_per_step / rows
    times = f"{'at least ' if packing else ''}{f'{count:,.0f}' if count >= 10 else f'{count:.2g}'}"
    return f"{name}: {steps:,} steps of {rows_per_step:,} rows are {times} epochs of its {rows:,} rows"


def prepare_data(figures: PrepareDataFigures) -> str:
    """Return a line for each set and for each source."""
    rows = [("set", "rows", "prompt tokens", "at most", "dropped")]
    for name, made in figures["sets"].items():
        tokens = made["prompt_tokens"]
        rows.append((name, f"{made['rows']:,}", str(tokens["p50"]), str(tokens["max"]), counted(made["dropped"])))
    sources = [
        f"from {source['name']} ({source['split']}): {source['rows']:,} rows; dropped: {counted(source['dropped'])}"
        for source in figures["sources"]
    ]
    return "\n".join([*aligned(rows), *sources, *rehearsal(figures.get("rehearsal"))])


def rehearsal(found: Mapping[str, Any] | None) -> list[str]:
    """Return a line on the small copy of the model, if there was one."""
    if not found:
        return []
    lora = f", with the adapter's {found['lora']:.0e}" if "lora" in found else ""
    return [
        f"rehearsal: a small copy of the model trains, merges and converts: its GGUF is {found['gguf']:.0e} nats "
        f"from the merged model{lora}, the base {found['base']:.0e}"
    ]


def score_base(figures: ScoreBaseFigures) -> str:
    """Return the figures of the completions, a line for each reward and one for the weighted sum."""
    rows: list[Sequence[str]] = [("", "weight", "mean", "spread", "least", "most", "groups with zero variance")]
    rewards = [(own["name"], str(own["weight"]), own) for own in figures["rewards"]]
    for name, weight, own in (*rewards, ("weighted sum", "", figures["total"])):
        numbers = (own["mean"], own["spread"], own["least"], own["most"])
        rows.append((name, weight, *(f"{number:.3f}" for number in numbers), f"{own['zero_variance']:.1%}"))
    lines = [
        f"{figures['problems']} problems, {figures['completions'] // figures['problems']} completions each, of the "
        f"{figures['model']} model: {figures['right']:.1%} right, {figures['well_formed']:.1%} well formed, "
        f"{figures['cut_off']:.1%} truncated, {figures['tokens']:.1f} tokens",
        f"{figures['never_right']} problems never right, {figures['always_right']} always",
        *aligned(rows),
    ]
    if "subset" in figures:
        lines.append(f"{figures['subset']} problems are within the bounds: GRPO trains on these")
    return "\n".join(lines)


def validation(figures: Validation) -> str:
    """Return the first evaluation, the last and the kept one, and what to think of where GRPO did not help."""
    first, last, kept = figures["evaluations"][0], figures["evaluations"][-1], figures["kept"]
    shown = {each["step"]: f"{each['accuracy']:.1%} at step {each['step']}" for each in (first, kept, last)}
    line = f"grpo: validation accuracy {', '.join(shown[step] for step in sorted(shown))}; kept: step {kept['step']}"
    if kept["right"] < first["right"]:
        line += ". It was higher before GRPO: lower [grpo] learning_rate, or look at the rewards"
    return line


def accuracies(models: Mapping[str, Evaluation]) -> list[tuple[str, ...]]:
    """Return a header, and a row of texts for each of `models` by name."""
    rows: list[tuple[str, ...]] = [("", "accuracy", "95% interval", "well formed", "tokens", "truncated")]
    for name, own in models.items():
        rows.append((
            name, f"{own['accuracy']:.1%}", interval(*own["accuracy_interval"]), f"{own['well_formed']:.1%}",
            f"{own['tokens']:.1f}", f"{own['cut_off']:.1%}",
        ))  # fmt: skip
    return rows


def infer(figures: InferFigures) -> str:
    """Return a line for each model and for each step."""
    rows = accuracies({"base": figures["base"], "sft": figures["sft"], "grpo": figures["grpo"]})
    steps = [
        f"{step}: {own['gained']} problems gained, {own['lost']} lost, McNemar {stats.p_text(own['p'])}"
        for step, own in figures["steps"].items()
    ]
    drawn = aligned(samples(figures["sampled"])) if "sampled" in figures else []
    return "\n".join([*aligned(rows), *steps, *drawn])


def samples(models: Mapping[str, Sampled]) -> list[tuple[str, ...]]:
    """Return a header, and a row of texts for each of `models` by name and each number k of drawn answers."""
    rows: list[tuple[str, ...]] = [("drawn", "k", "pass@k", "95% interval", "maj@k", "95% interval")]
    for name, own in models.items():
        for k, passed in own["pass_at"].items():
            voted = own["majority_at"][k]
            shares = [
                part for each in (passed, voted) for part in (f"{each['share']:.1%}", interval(*each["interval"]))
            ]
            rows.append((name, k, *shares))
    return rows


def merge(figures: MergeFigures) -> str:
    """Return the measured distances, a line each."""
    lines = [
        f"merge: {figures['positions']:,} positions of {figures['prompts']} prompts; mean KL from the adapter on its "
        f"base {figures['merged_mean_kl']:.1e}, of the base {figures['base_mean_kl']:.1e} nats"
    ]
    if "trained_in_4bit" in figures:
        cost = figures["trained_in_4bit"]["mean_kl"]
        lines.append(f"merge: mean KL of the model as it was in training, in 4 bits, {cost:.1e} nats")
    if "merged_4bit" in figures:
        lines.append(f"merge: mean KL of the 4-bit model {figures['merged_4bit']['mean_kl']:.1e} nats")
    return "\n".join(lines)


def distances(file: AdapterFile) -> tuple[str, ...]:
    """Return size and distances of a GGUF file, as text."""
    return (
        f"{file['bytes'] / 1e6:,.1f}", f"{file['mean_kl']:.1e}", f"{file['p99_kl']:.1e}", f"{file['max_kl']:.1e}",
        f"{file['same_top']:.2%}", f"{file['perplexity']:.4f}",
    )  # fmt: skip


def gguf(figures: GgufFigures) -> str:
    """Return a line for each file, for the adapter's and for the merged model."""
    reference, served, perplexity = figures["reference"], figures["llama_server"], ""
    rows: list[Sequence[str]] = [(
        "type", "MB", "mean KL", "p99 KL", "max KL", "same top", "perplexity", "same text", "right", "flips", "ended",
    )]  # fmt: skip
    for kind, file in figures["files"].items():
        flips = f"{file['flipped_to_wrong']}/{file['flipped_to_right']}"
        answers = (f"{file['same_text']:.1%}", f"{file['accuracy']:.1%}", flips, str(file["ended"]))
        rows.append((kind, *distances(file), *answers))
        perplexity = f"{file['reference_perplexity']:.4f}"
    if "lora" in figures:
        rows.append(("lora", *distances(figures["lora"]), "", "", "", ""))
    rows.append((
        "merged", "", "", "", "", "", perplexity, "", f"{reference['accuracy']:.1%}", "", str(reference["ended"])
    ))  # fmt: skip
    return "\n".join([
        *aligned(rows),
        f"{reference['prompts']} prompts, {reference['positions']:,} positions; KL in nats against the merged model; "
        f"right: {interval(reference['accuracy_low'], reference['accuracy_high'])} (95%) for the merged model; "
        f"flips: answers gone wrong/right",
        f"llama-server prompts as trained in {served['conversations'] - len(served['differences'])} of "
        f"{served['conversations']} conversations, {served['tokens']:,} tokens",
    ])  # fmt: skip


def ollama_modelfile(figures: OllamaModelfileFigures) -> str:
    """Return what Ollama prompts with, and how far that is proven."""
    alike = f"{figures['conversations']} conversations are rendered as in training"
    said = {
        served.TEMPLATE: f"Ollama prompts with TEMPLATE: {alike}",
        served.PASSTHROUGH: f"Ollama prompts with TEMPLATE, by PARSER passthrough: {alike}",
        served.GGUF: f"Ollama prompts with the chat template in {figures['file']}; by that and by TEMPLATE {alike}",
        served.RENDERER: (
            f"Ollama prompts the architecture {figures['architecture']} with a renderer of its own and reads no "
            "TEMPLATE: its prompts are not proven. Run: make ollama, which compares them"
        ),
    }
    return said[figures["prompted_by"]]
