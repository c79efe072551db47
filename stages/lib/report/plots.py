"""Plots of a run's figures: a PNG for the model card, SVG texts for the page."""

import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The colours of an SVG. On the page each becomes a variable of the style sheet, which has a light and a dark value.
INK, FIRST, SECOND, FAINT = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "var(--ink)", FIRST: "var(--first)", SECOND: "var(--second)", FAINT: "var(--faint)"}


def draw_parity(files: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot KL divergence and size of the GGUF `files`, by type, to the PNG `path`."""
    parity(files).savefig(path, metadata={"Software": None})


def parity(files: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return KL divergence and size of the GGUF `files`, by type, as a figure."""
    from matplotlib.figure import Figure

    names = list(files)
    figure = Figure(figsize=(9, 4), layout="constrained")
    divergence, size = figure.subplots(1, 2)
    for name, label, marker in (
        ("mean_kl", "mean", "o"),
        ("p99_kl", "99th percentile", "^"),
        ("max_kl", "maximum", "x"),
    ):
        divergence.plot(names, [max(files[kind][name], 1e-12) for kind in names], marker, label=label)
    limits = [files[kind]["max_mean_kl"] for kind in names]
    divergence.plot(names, limits, "_", markersize=24, label="limit of the mean")
    divergence.set(yscale="log", ylabel="KL(merged || file), nats", title="Distance from the merged model")
    divergence.legend()
    size.bar(names, [files[kind]["bytes"] / 1e6 for kind in names])
    size.set(ylabel="MB", title="Size")
    return figure


def draw_curve(title: str, points: Sequence[tuple[int, float]]) -> str:
    """Return a curve over steps as SVG: each value, and the mean of a twentieth of the run up to it."""
    width = max(1, len(points) // 20)
    steps, values = [step for step, _ in points], [value for _, value in points]
    means = [statistics.fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]
    figure, axes = plain_figure(4.6, 2.6)
    axes.plot(steps, values, color=FAINT, linewidth=1, marker="." if len(values) == 1 else None)
    axes.plot(steps, means, color=FIRST, linewidth=1.8)
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.set_xlabel("step", color=INK, fontsize=8)
    return svg(figure, f"{title}: {values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}")


def draw_accuracy(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return accuracy with its interval, in percent, a bar for each model, as SVG."""
    figure, axes = plain_figure(6.4, 0.5 * len(models) + 0.7)
    names = list(models)
    shares = [100 * models[name]["accuracy"] for name in names]
    bounds = [[100 * bound for bound in models[name]["accuracy_interval"]] for name in names]
    errors = [
        [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
        [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
    ]
    axes.barh(names, shares, color=FIRST, height=0.6, xerr=errors, ecolor=INK, capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("right answers, % of the held-out problems, with 95% interval", color=INK, fontsize=8)
    stated = (f"{name} {share:.1f}%" for name, share in zip(names, shares, strict=True))
    return svg(figure, f"Accuracy: {', '.join(stated)}")


def draw_rewards(rewards: Sequence[float]) -> str:
    """Return the distribution of the completions' rewards, early and late in the run, as SVG."""
    third = max(1, len(rewards) // 3)
    figure, axes = plain_figure(4.6, 2.6)
    bins = [min(rewards) + place * ((max(rewards) - min(rewards)) or 1) / 30 for place in range(31)]
    for part, color, label in ((rewards[:third], FAINT, "first third"), (rewards[-third:], FIRST, "last third")):
        axes.hist(part, bins=bins, color=color, alpha=0.75, label=label)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    axes.set_title("completions by reward (unweighted sum)", color=INK, fontsize=10, loc="left")
    means = [sum(part) / len(part) for part in (rewards[:third], rewards[-third:])]
    return svg(figure, f"Rewards of completions: mean {means[0]:.3g} in the first third, {means[1]:.3g} in the last")


def draw_parity_svg(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return each GGUF file's mean KL divergence by its size, with the limit, as SVG."""
    figure, axes = plain_figure(6.4, 2.8)
    for name, file in files.items():
        size, mean = file["bytes"] / 1e6, max(file["mean_kl"], 1e-12)
        axes.plot([size], [mean], "o", color=FIRST)
        axes.plot([size], [file["max_mean_kl"]], "_", color=SECOND, markersize=16)
        axes.annotate(name, (size, mean), (5, 5), textcoords="offset points", color=INK, fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("MB", color=INK, fontsize=8)
    axes.set_title("mean KL from the merged model, nats; bar: its limit", color=INK, fontsize=10, loc="left")
    return svg(figure, "Mean KL divergence of each GGUF file from the merged model, by size; figures: the table below")


def plain_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of `width` by `height` inches and its axes, in the page's colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    return figure, axes


def svg(figure: Any, label: str) -> str:
    """Return `figure` as an SVG element without a background, whose text is text; `label` is read out in its place."""
    import matplotlib
    from markupsafe import escape

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # An address of a namespace is fetched by nobody; without these the page has no address at all.
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text, count=3).replace("xlink:href", "href")
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
