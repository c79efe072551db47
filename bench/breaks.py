"""What was tried to break Temper, in numbers: `python -m bench.breaks PART` writes a part of bench/results/breaks.md.

    python -m bench.breaks kills      100 kills of `make all` over all its stages
    python -m bench.breaks power      power cuts on a disk that loses what was not synced; needs root
    python -m bench.breaks files      300 broken and hostile files, each to what reads it
    python -m bench.breaks names      100 hostile names of recipes, data, models, rewards, and questions
    python -m bench.breaks ggufs      1,200 GGUF files with a changed header, to llama.cpp
    python -m bench.breaks advisories the locks against a stored list of advisories
    python -m bench.breaks fuzz       an hour of processor time of tests/test_fuzz.py
    python -m bench.breaks together   an input replaced while it is read, two makes, two recipes, two checkouts

All parts have a seed and a count: of fuzz the seconds, of together how many of the four. They work in a checkout of the
last commit in a temporary folder, with this one's environment.
"""

import datetime
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import click

from bench.breaking import advisories, files, fuzz, ggufs, kills, names, power, together

RESULTS = Path(__file__).parent / "results" / "breaks.md"
HEAD = "# What was tried to break Temper\n\nWritten by `bench/breaks.py`, a part at a time.\n"
PARTS = {
    "kills": (kills.run, 100), "power": (power.run, 40), "files": (files.run, 300), "names": (names.run, 100),
    "together": (together.run, 4), "ggufs": (ggufs.run, 1200), "advisories": (advisories.run, 1),
    "fuzz": (fuzz.run, 3600),
}  # fmt: skip


@click.command(help=__doc__)
@click.argument("part", type=click.Choice(list(PARTS)))
@click.option("--seed", default=0)
@click.option("--count", type=int, help="How many; left out, as in the results.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file to write the part to.")
def main(part: str, seed: int, count: int | None, results: Path) -> None:
    run, usual = PARTS[part]
    count = count or usual
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="temper-breaks-") as folder:
        lines = run(Path(folder), seed, count)
    where = f"{os.cpu_count()} processors, {platform.platform()}, Python {platform.python_version()}"
    command = f"python -m bench.breaks {part} --seed {seed} --count {count}"
    about = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, commit {commit}, {where}: `{command}`"
    write_part(results, part, [about, "", *lines])


def write_part(path: Path, part: str, lines: list[str]) -> None:
    """Put the lines of a part into the results, in place of those of before."""
    text = path.read_text() if path.is_file() else HEAD
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    sections[part] = "\n" + "\n".join(lines) + "\n\n"
    ordered = [name for name in PARTS if name in sections]
    body = "".join(f"## {name}\n{sections[name].rstrip()}\n\n" for name in ordered)
    path.write_text(f"{HEAD}\n{body}".rstrip() + "\n")


if __name__ == "__main__":
    main()
