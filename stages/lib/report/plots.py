"""Plots of a stage's figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_parity(files: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot KL divergence and size of the GGUF `files`, by type, to the PNG `path`."""
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
    figure.savefig(path, metadata={"Software": None})
