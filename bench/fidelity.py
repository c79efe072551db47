"""Write down what the gates of a finished run measured, as a table.

`python -m bench.fidelity artifacts/tiny` writes bench/results/fidelity-tiny.md from the manifests of merge and gguf.
"""

from pathlib import Path

import click

from stages.lib.artifact.manifest import read_manifest

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "type", "MB", "mean KL", "p99 KL", "max KL", "limit of the mean", "same top", "perplexity", "same text", "right",
    "flipped to wrong / right", "ended", "seconds",
)  # fmt: skip


@click.command(help=__doc__)
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(run: Path) -> None:
    merge, gguf = (read_manifest(run / stage, stage) for stage in ("merge", "gguf"))
    merged, reference, files = merge["metrics"], gguf["metrics"]["reference"], gguf["metrics"]["files"]
    where, wall = gguf["environment"], gguf["wall"]
    packages = ", ".join(f"{name} {where['packages'][name]}" for name in ("llama-cpp-python", "torch", "transformers"))
    rows = "\n".join(
        f"| {kind} | {file['bytes'] / 1e6:,.1f} | {file['mean_kl']:.1e} | {file['p99_kl']:.1e} | {file['max_kl']:.1e} "
        f"| {file['max_mean_kl']:.0e} | {file['same_top']:.2%} | {file['perplexity']:.4f} | {file['same_text']:.1%} | "
        f"{file['accuracy']:.1%} ({file['accuracy_low']:.1%} to {file['accuracy_high']:.1%}) | "
        f"{file['flipped_to_wrong']} / {file['flipped_to_right']} | {file['ended']} | {wall[f'examine {kind}']:.1f} |"
        for kind, file in sorted(files.items(), key=lambda item: -item[1]["bytes"])
    )
    perplexity = next(iter(files.values()))["reference_perplexity"]
    steps = ("convert", "importance", "quantize", "reference")
    besides = ", ".join(f"{name} {value:.1f}" for name, value in wall.items() if name.split()[0] in steps)
    out = RESULTS / f"fidelity-{run.resolve().name}.md"
    out.write_text(
        f"""# How close the files of `{run.resolve().name}` are to the model trained

`python -m bench.fidelity {run}`, run of {wall["started"]}, {where["platform"]}, {where["processors"]} processors,
GPU: {where["gpu"] or "none"}; {packages}.

Merge: mean KL {merged["merged_mean_kl"]:.1e} nats from the adapter on its base, over {merged["positions"]:,}
positions of {merged["prompts"]} prompts; the base alone is {merged["base_mean_kl"]:.1e} away.

The merged model: perplexity {perplexity:.4f}, right {reference["accuracy"]:.1%} ({reference["accuracy_low"]:.1%} to
{reference["accuracy_high"]:.1%}); {reference["ended"]} of {reference["prompts"]} completions end by themselves. Each
file against it, over {reference["positions"]:,} positions; KL in nats, intervals 95% (Wilson), the time that of the
gate:

| {" | ".join(COLUMNS)} |
|---|{"---:|" * (len(COLUMNS) - 1)}
{rows}

Seconds besides: {besides}; the whole stage {wall["seconds"]:.0f}.
"""
    )
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
