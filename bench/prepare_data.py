"""Measure prepare-data against `datasets` itself, and against an older commit, on a million rows, all in one run.

    python -m bench.prepare_data [--rows 1000000] [--gsm8k ../shared/data/gsm8k] [--before CHECKOUT]

Writes bench/results/prepare_data.md. CHECKOUT is another checkout of Temper, of the commit to compare with. The rows
are made up, of the length and the look of GSM8K's: question, solution with calculator marks, answer. One in
200 is an earlier question again, one in 200 an earlier one with a word changed.
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
TINY = Path("recipes") / "tiny.toml"
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


def measure(command: list[str], checkout: Path = ROOT) -> Measured:
    """Run a command of a checkout to its end and measure it, with all the processes it starts."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.DEVNULL)
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


def write_recipe(path: Path, rows: Path, max_prompt_tokens: int, rehearsal: bool, checkout: Path) -> None:
    """Write a checkout's tiny recipe with the rows as its only source: 0.2% eval, 29.8% sft, 70% grpo.

    The model is the folder `model` beside the recipe. Only this checkout's recipes know of the rehearsal.
    """
    tables = tomllib.loads((checkout / TINY).read_text())
    del tables["base_model"], tables["gguf"]["max_mean_kl"]
    save = json.dumps(tables.pop("save"))
    tables["model"]["name"] = str(path.parent / "model")
    if checkout == ROOT:
        tables["model"]["rehearsal"] = rehearsal
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
    knobs = read_recipe(ROOT / TINY).base_model
    base_model.make_tokenizer(knobs, base_model.conversations(knobs), folder)
    from transformers import Gemma3TextConfig

    micro.write_weights(folder)
    Gemma3TextConfig(vocab_size=knobs.vocabulary_size, architectures=["Gemma3ForCausalLM"]).save_pretrained(folder)


def stage(
    recipe: Path, rows: Path, max_prompt_tokens: int = 512, rehearsal: bool = False, checkout: Path = ROOT
) -> tuple[Measured, dict[str, Any]]:
    """Run the stage of a checkout on `rows`, into a folder beside `recipe`; return what it took and its metrics."""
    out = recipe.with_suffix("")
    write_recipe(recipe, rows, max_prompt_tokens, rehearsal, checkout)
    command = [sys.executable, "-m", "stages.prepare_data", "--recipe", str(recipe), "--out", str(out)]
    return measure(command, checkout), json.loads((out / "manifest.json").read_text())["metrics"]


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout, with what it says of changes that are in none."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


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
@click.option("--before", type=click.Path(path_type=Path, exists=True, file_okay=False), help="An older checkout.")
def main(rows: int, tokenized_rows: int, gsm8k: Path | None, before: Path | None) -> None:
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
        older, ours, metrics = [], [], []
        for turn in ("first", "again"):  # in turns: the machine may become busier meanwhile
            if before:
                older.append(stage(folder / f"{turn}-before.toml", many, checkout=before.absolute())[0])
            measured, found = stage(folder / f"{turn}.toml", many)
            ours.append(measured)
            metrics.append(found)
        same = metrics[0] == metrics[1] and all(
            (folder / "first" / f"{name}.jsonl").read_bytes() == (folder / "again" / f"{name}.jsonl").read_bytes()
            for name in ("sft", "grpo", "eval", "removed")
        )
        rehearsed, _ = stage(folder / "rehearsed.toml", many, rehearsal=True)
        tight, _ = stage(folder / "tight.toml", few, 200)
        input_bytes = many.stat().st_size
        output_bytes = sum(path.stat().st_size for path in (folder / "first").glob("*.jsonl"))

    measured_rows = [
        ("`datasets`, streaming: JSONL to JSONL", rows, read_write[0]),
        ("`datasets`, through its Arrow cache: JSONL to JSONL", rows, read_write[1]),
        *((f"prepare-data of commit {commit_of(before)}", rows, each) for each in older if before),
        *((f"prepare-data of commit {commit_of(ROOT)}", rows, each) for each in ours),
        ("the same, after the rehearsal of the model", rows, rehearsed),
        ("the same, without, and a limit of 200 tokens", tokenized_rows, tight),
    ]
    packages = ", ".join(
        f"{package} {version(package)}" for package in ("datasets", "pyarrow", "numpy", "transformers", "tokenizers")
    )
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    lines = [
        "# prepare-data: speed and memory",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} processors ({processor()}), Python {platform.python_version()}, "
        f"{packages}. Command: `python -m bench.prepare_data --rows {rows}{' --before CHECKOUT' if before else ''}`. "
        "Each line is a process from start to end, imports included; the commits took turns. "
        f"Load of the machine at the end (1, 5 and 15 minutes): {loads}.",
        "",
        "| what | rows | seconds | rows a second | processor seconds | peak memory, MB |",
        "|---|--:|--:|--:|--:|--:|",
        *(row(*each) for each in measured_rows),
        "",
        *([compared(older, ours), ""] if older else []),
        f"prepare-data at {speed(read_write[:1], ours)} of the speed of streaming `datasets` and "
        f"{speed(read_write[1:], ours)} of that through the cache (the better of its two runs). "
        f"The two runs gave {'the same' if same else 'DIFFERENT'} bytes.",
        "",
        f"The {rows:,} rows ({input_bytes / 1e6:.0f} MB) are read and written by all. `datasets` writes them as they "
        f"are. prepare-data checks them, makes conversations of them ({output_bytes / 1e6:.0f} MB), and removes "
        "duplicates, near duplicates and what is too close to the eval set. It keeps prompts to 512 tokens and SFT "
        "examples to 1,024: it tokenizes the first 2 MB and whatever has enough bytes to be too long. In the last line "
        "the limit is 200 tokens, so that hardly any prompt is surely short enough. Memory is the largest sum of "
        f"proportional set sizes over all processes of the command, looked at every {LOOK_SECONDS * 1000:.0f} ms. The "
        "rehearsal trains, merges and converts a small copy of the model, with torch, in processes of its own.",
        "",
        "What became of the rows: "
        + "; ".join(
            f"{name} {set_['rows']:,} (dropped: {set_['dropped']})" for name, set_ in metrics[0]["sets"].items()
        )
        + ".",
    ]
    if gsm8k:
        lines += ["", "## The real GSM8K", "", *gsm8k_table(gsm8k)]
    RESULTS.write_text("\n".join(lines) + "\n")
    click.echo(RESULTS.read_text())


def row(what: str, count: int, measured: Measured) -> str:
    """Return a line of the table."""
    return (
        f"| {what} | {count:,} | {measured.wall:.1f} | {count / measured.wall:,.0f} | {measured.processor:.1f} | "
        f"{measured.bytes / 1e6:.0f} |"
    )


def compared(older: list[Measured], ours: list[Measured]) -> str:
    """Return how this commit compares with an older one, the better of two runs each, as text."""
    wall = min(each.wall for each in ours) / min(each.wall for each in older)
    processor_time = min(each.processor for each in ours) / min(each.processor for each in older)
    return (
        f"Against the older commit, the better of two runs each: {wall:.2f} times its seconds and {processor_time:.2f} "
        "times its processor seconds, which say more where others use the machine."
    )


def speed(reference: list[Measured], ours: list[Measured]) -> str:
    """Return how fast the better of our runs is against a reference, as text."""
    return f"{reference[0].wall / min(each.wall for each in ours):.2f}"


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
