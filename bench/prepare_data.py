"""Measure prepare-data against `datasets` itself on a million rows, both in one run.

    python -m bench.prepare_data [--rows 1000000] [--gsm8k ../shared/data/gsm8k]

Writes bench/results/prepare_data.md. The rows are made up, of the length and the look of GSM8K's: question, solution
with calculator marks, answer. One in 200 is an earlier question again, one in 200 an earlier one with a word changed.
"""

import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from stages import base_model
from stages.lib.data.problem import problem_of
from stages.lib.recipe.read import read_recipe
from tests.support import micro

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny.toml"
RESULTS = ROOT / "bench" / "results" / "prepare_data.md"
LOOK_SECONDS = 0.25  # between two looks at the memory; each walks all page tables, on processors that are being timed
DATASETS = """
import sys, datasets
datasets.disable_progress_bars()
options = {"streaming": True} if sys.argv[3] == "streaming" else {"cache_dir": sys.argv[2] + ".cache"}
datasets.load_dataset("json", data_files=sys.argv[1], split="train", **options).to_json(sys.argv[2])
"""


@dataclass
class Measured:
    """One command: wall and processor seconds, and the most memory that all of its processes held at once."""

    wall: float
    processor: float
    bytes: int


def measure(command: list[str]) -> Measured:
    """Run a command to its end and measure it, with all the processes it starts."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    ended = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        peak = beside.submit(peak_bytes, process.pid, ended)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        ended.set()
    if status:
        raise SystemExit(f"{' '.join(command[:4])} ... failed")
    process.returncode = 0
    return Measured(wall, usage.ru_utime + usage.ru_stime, peak.result())


def peak_bytes(pid: int, ended: threading.Event) -> int:
    """Return the most memory that a process and all below it held at once, until `ended` is set."""
    peak = 0
    while not ended.wait(LOOK_SECONDS):
        peak = max(peak, resident_bytes(pid))
    return peak


def resident_bytes(pid: int) -> int:
    """Return the memory of a process and all below it; a page that several share counts once in all (Linux's PSS)."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        below = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended
    own = sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return own + sum(resident_bytes(int(child)) for child in below)


def make_rows(path: Path, rows: int) -> None:
    """Write `rows` made-up problems as JSON lines, the same ones each time."""
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 8))) for _ in range(3000)]
    recent: list[str] = []
    with path.open("w") as file:
        for row in range(rows):
            kind = dice.random()
            if recent and kind < 0.01:
                question = dice.choice(recent)
                if kind < 0.005:
                    question = question.replace(dice.choice(question.split()), dice.choice(words), 1)
            else:
                sentences = []
                for _ in range(dice.choice((2, 3, 3, 4, 5))):
                    parts = dice.choices(words, k=dice.randint(7, 15))
                    parts[dice.randrange(len(parts))] = str(dice.randint(2, 500))
                    sentences.append(" ".join(parts).capitalize())
                question = ". ".join(sentences) + "?"
            if row % 50 == 0:
                recent = [*recent[-999:], question]
            a, b, c = dice.randint(2, 99), dice.randint(2, 99), dice.randint(2, 999)
            first, second = " ".join(dice.choices(words, k=15)), " ".join(dice.choices(words, k=18))
            answer = (
                f"{first} {a}*{b} = <<{a}*{b}={a * b}>>{a * b}.\n"
                f"{second} {a * b}+{c} = <<{a * b}+{c}={a * b + c}>>{a * b + c}.\n#### {a * b + c:,}"
            )
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")


def write_recipe(path: Path, model: Path, rows: Path, max_prompt_tokens: int) -> None:
    """Write the tiny recipe with the rows as its only source: 0.2% eval, 29.8% sft, 70% grpo."""
    tables = tomllib.loads(TINY.read_text())
    del tables["base_model"], tables["gguf"]["max_mean_kl"]
    save = json.dumps(tables.pop("save"))
    tables["model"]["name"] = str(model)
    tables["sft"]["max_tokens"] = 1024
    tables["merge"]["prompts"] = tables["gguf"]["prompts"] = 1  # of the run with a tight limit few eval rows are left
    tables["data"] = {
        "max_prompt_tokens": max_prompt_tokens,
        "ngram_words": 8,
        "near_duplicate_jaccard": 0.8,
        "contamination_overlap": 0.5,
    }
    source = {"name": str(rows), "use": ["eval", "sft", "grpo"], "shares": [0.002, 0.298, 0.7], "style": "gsm8k"}
    source |= {"question": "question", "answer": "answer"}
    blocks = [*((f"[{name}]", table) for name, table in tables.items()), ("[[data.sources]]", source)]
    path.write_text(
        f"save = {save}\n"
        + "\n".join(
            f"{head}\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items()) for head, table in blocks
        )
    )


def make_model(folder: Path) -> None:
    """Make a model folder as far as this stage needs one: the tiny model's tokenizer, a configuration, some weights."""
    knobs = read_recipe(TINY).base_model
    base_model.make_tokenizer(knobs, base_model.conversations(knobs), folder)
    from transformers import Gemma3TextConfig

    micro.write_weights(folder)
    Gemma3TextConfig(vocab_size=knobs.vocabulary_size, architectures=["Gemma3ForCausalLM"]).save_pretrained(folder)


def stage(folder: Path, name: str, model: Path, rows: Path, max_prompt_tokens: int) -> tuple[Measured, dict[str, Any]]:
    """Run the stage on `rows`; return what it took and its metrics."""
    recipe, out = folder / f"{name}.toml", folder / name
    write_recipe(recipe, model, rows, max_prompt_tokens)
    measured = measure([sys.executable, "-m", "stages.prepare_data", "--recipe", str(recipe), "--out", str(out)])
    return measured, json.loads((out / "manifest.json").read_text())["metrics"]


def gsm8k_table(folder: Path) -> list[str]:
    """Return what is read of the real files, as Markdown."""
    lines = ["| file | rows | answers with a thousands comma | negative answers | read |", "|---|--:|--:|--:|--:|"]
    for name in ("train.jsonl", "test.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        finals = [row["answer"].rpartition("####")[2] for row in rows]
        read = [problem_of(row["question"], row["answer"], None, "gsm8k")[1] for row in rows]
        negative = sum(answer.startswith("-") for answer in read)
        lines.append(
            f"| {name} | {len(rows):,} | {sum(',' in final for final in finals)} | {negative} | {len(read):,} |"
        )
    return lines


@click.command(help=__doc__.partition("\n")[0])
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--tokenized-rows", default=50_000, show_default=True, help="Rows of the run with a tight limit.")
@click.option("--gsm8k", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The real files.")
def main(rows: int, tokenized_rows: int, gsm8k: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "hub")
        many, few = folder / "many.jsonl", folder / "few.jsonl"
        make_rows(many, rows)
        make_rows(few, tokenized_rows)
        make_model(folder / "model")
        read_write = [
            measure([sys.executable, "-c", DATASETS, str(many), str(folder / f"{mode}.jsonl"), mode])
            for mode in ("streaming", "table")
        ]
        ours, metrics = stage(folder, "ours", folder / "model", many, 512)
        again, metrics_again = stage(folder, "again", folder / "model", many, 512)
        same = metrics == metrics_again and all(
            (folder / "ours" / f"{name}.jsonl").read_bytes() == (folder / "again" / f"{name}.jsonl").read_bytes()
            for name in ("sft", "grpo", "eval", "removed")
        )
        tight, _ = stage(folder, "tight", folder / "model", few, 200)
        input_bytes = many.stat().st_size
        output_bytes = sum(path.stat().st_size for path in (folder / "ours").glob("*.jsonl"))

    def row(what: str, count: int, measured: Measured) -> str:
        return (
            f"| {what} | {count:,} | {measured.wall:.1f} | {count / measured.wall:,.0f} | {measured.processor:.1f} | "
            f"{measured.bytes / 1e6:.0f} |"
        )

    packages = ", ".join(
        f"{package} {version(package)}" for package in ("datasets", "pyarrow", "numpy", "transformers", "tokenizers")
    )
    lines = [
        "# prepare-data: speed and memory",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} processors ({processor()}), Python {platform.python_version()}, "
        f"{packages}. Command: `python -m bench.prepare_data --rows {rows}`. Each line is a process from start to end, "
        "imports included.",
        "",
        "| what | rows | seconds | rows a second | processor seconds | peak memory, MB |",
        "|---|--:|--:|--:|--:|--:|",
        row("`datasets`, streaming: JSONL to JSONL", rows, read_write[0]),
        row("`datasets`, through its Arrow cache: JSONL to JSONL", rows, read_write[1]),
        row("prepare-data", rows, ours),
        row("prepare-data, again", rows, again),
        row("prepare-data, limit of 200 tokens", tokenized_rows, tight),
        "",
        f"prepare-data at {speed(ours, again, read_write[0])} of the speed of streaming `datasets` and "
        f"{speed(ours, again, read_write[1])} of that through the cache (the better of its two runs). "
        f"The two runs gave {'the same' if same else 'DIFFERENT'} bytes.",
        "",
        f"The {rows:,} rows ({input_bytes / 1e6:.0f} MB) are read and written by all. `datasets` writes them as they "
        f"are. prepare-data checks them, makes conversations of them ({output_bytes / 1e6:.0f} MB), and removes "
        "duplicates, near duplicates and what is too close to the eval set. It keeps prompts to 512 tokens and SFT "
        "examples to 1,024: it tokenizes the first 2 MB and whatever has enough bytes to be too long. In the last line "
        "the limit is 200 tokens, so that hardly any prompt is surely short enough. Memory is the largest sum of "
        f"proportional set sizes over all processes of the command, looked at every {LOOK_SECONDS * 1000:.0f} ms.",
        "",
        "What became of the rows: "
        + "; ".join(f"{name} {made['rows']:,} (dropped: {made['dropped']})" for name, made in metrics["sets"].items())
        + ".",
    ]
    if gsm8k:
        lines += ["", "## The real GSM8K", "", *gsm8k_table(gsm8k)]
    RESULTS.write_text("\n".join(lines) + "\n")
    click.echo(RESULTS.read_text())


def speed(first: Measured, second: Measured, reference: Measured) -> str:
    """Return how fast the better of two runs is against a reference, as text."""
    return f"{reference.wall / min(first.wall, second.wall):.2f}"


def processor() -> str:
    """Return the processor's name."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
