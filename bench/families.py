"""Measure how close each family's GGUF files are to their merged model: real vocabularies, random weights.

`python -m bench.families` writes bench/results/families.md. It takes the models of tests/support/family_models.py
through merge, gguf and their gates, with more prompts and types than the tests.
"""

import datetime
import importlib.metadata
import os
import platform
import tempfile
import time
from pathlib import Path

import click

from tests.support import family_models

RESULTS = Path(__file__).parent / "results" / "families.md"
TYPES = ["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
PROMPTS, POSITIONS = 8, 16


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(out: Path) -> None:
    lines = []
    for name, family in family_models.FAMILIES.items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            gate, files = family_models.through(name, Path(folder), TYPES, PROMPTS, POSITIONS)
        cells = [f"{files[kind]['mean_kl']:.1e}" for kind in (*TYPES, "lora")]
        lines.append(
            f"| {name} | {family.network} | {gate['parameters'] / 1e6:.1f} | {gate['merged_mean_kl']:.1e} | "
            f"{' | '.join(cells)} | {files['f16']['same_top']:.1%} | {time.monotonic() - started:.0f} |"
        )
    packages = ("llama-cpp-python", "transformers", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    out.write_text(
        f"""# Every family through merge, gguf and their gates

`python -m bench.families`, {datetime.date.today()}, {machine},
{versions}.

Networks of 2 layers of width 256 with random weights, a random LoRA of rank 4, real vocabularies and chat templates;
{PROMPTS} prompts with completions, {POSITIONS} positions of each. Mean KL divergence in nats: merged (bfloat16) from
the adapter on its base, then each file from merged, and last the base in f16 with the adapter's GGUF file. Random
weights are no trained model: read the columns for whether everything arrived, not for how good a type is.

| family | network | M parameters | merge | {" | ".join(TYPES)} | lora | f16 same top | seconds |
|---|---|---:|---:|{"---:|" * len(TYPES)}---:|---:|---:|
{chr(10).join(lines)}
"""
    )
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
