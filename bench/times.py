"""Time what a newcomer waits for: make all from nothing but the set-up, make all with nothing to do, and every --help.

    python -m bench.times [--recipe tiny]

Deletes the recipe's artifacts first. Writes bench/results/times.md.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "times.md"
REPEATS = 5


def seconds(*command: str) -> float:
    """Run a command in this checkout and return how long it took; end with its error if it fails."""
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


@click.command(help=__doc__.partition("\n")[0])
@click.option("--recipe", default="tiny", show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(recipe: str, out: Path) -> None:
    load = os.getloadavg()[0]
    make = ("make", "RUNTIME=local", f"RECIPE={recipe}")
    seconds(*make, "clean")
    whole = seconds(*make, "all")
    again = statistics.median(seconds(*make, "all") for _ in range(REPEATS))
    walls = {
        path.parent.name: json.loads(path.read_text())["wall"]["seconds"]
        for path in sorted((ROOT / "artifacts" / recipe).glob("*/manifest.json"), key=os.path.getmtime)
    }
    stages = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
    helps = {
        stage: statistics.median(seconds(sys.executable, "-m", f"stages.{stage}", "--help") for _ in range(REPEATS))
        for stage in stages
    }
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "llama-cpp-python"))
    lines = [
        "# What a newcomer waits for",
        "",
        f"`python -m bench.times --recipe {recipe}`, {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} "
        f"cores, Python {platform.python_version()}, {packages}; load average at the start {load:.2f}. The set-up was "
        f"there.",
        "",
        "| what | seconds |",
        "|---|--:|",
        f"| `make all`, no artifacts | {whole:.0f} |",
        f"| `make all` again (median of {REPEATS}) | {again:.2f} |",
        *(f"| of the first, `{stage}` | {wall:.0f} |" for stage, wall in walls.items()),
        *(
            f"| `python -m stages.{stage} --help` (median of {REPEATS}) | {value:.2f} |"
            for stage, value in helps.items()
        ),
    ]
    out.write_text("\n".join(lines) + "\n")
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
