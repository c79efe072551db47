"""Measure how much memory merge and gguf take with a model of 1.7 B parameters and a vocabulary of 152k, on a CPU.

`python -m bench.fidelity_memory` writes bench/results/fidelity_memory.md. The model has the shape of Qwen3 1.7B, random
weights and the real Qwen2 vocabulary. Both stages run as they always do, each a process of its own, and what it and its
children have resident is read ten times a second. Needs 16 GB of disk, and half an hour for all 50 prompts on two
cores; with fewer (`--prompts`) the table says so. Memory does not depend on the prompts: their logits are on disk.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from stages.lib.artifact.folder import write_artifact
from tests.support import family_models, tiny_models

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "fidelity_memory.md"
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "initializer_range": 0.02,
}  # fmt: skip
PROMPTS = 50  # of the recipes' gguf; their merge has MERGE_PROMPTS
MERGE_PROMPTS = 16
TYPES = ["f16", "q8_0"]  # random weights don't fit into four bits as trained ones do
COMPLETION_TOKENS = 16  # at most; random weights end none
LIMIT_GB = 8
PAGE = os.sysconf("SC_PAGE_SIZE")


@click.command(help=__doc__)
@click.option("--prompts", type=click.IntRange(2, PROMPTS), default=PROMPTS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(prompts: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [sys.executable, "-c", f"from bench import fidelity_memory as b; b.make('{folder}')"], check=True
        )
        recipe = write_recipe(folder, prompts)
        inputs = ["--grpo", str(folder / "grpo"), "--prepare-data", str(folder / "prepare-data")]
        found = {}
        for stage, given in (("merge", inputs), ("gguf", [*inputs, "--merge", str(folder / "merge")])):
            arguments = [*given, "--recipe", str(recipe), "--out", str(folder / stage)]
            found[stage] = watched(["-m", f"stages.{stage}", *arguments])
        manifests = {stage: json.loads((folder / stage / "manifest.json").read_text()) for stage in found}
    out.write_text(page(prompts, found, manifests))
    click.echo(out.read_text())


def make(folder: str) -> None:
    """Write model, adapter and problems under `folder`, as the stages before merge would. In a process of its own."""
    model = family_models.base(family_models.FAMILIES["qwen3"], Path(folder) / "model", **SHAPE)
    with write_artifact(Path(folder) / "grpo", "grpo", {}, {}) as run:
        tiny_models.adapter(model, run.folder, steps=0, init_lora_weights=False, r=32, lora_alpha=64)
    with write_artifact(Path(folder) / "prepare-data", "prepare-data", {}, {}) as run:
        for name, seed in (("eval", 3), ("sft", 2)):
            rows = (json.dumps(row) + "\n" for row in tiny_models.rows(PROMPTS, seed))
            (run.folder / f"{name}.jsonl").write_text("".join(rows))


def write_recipe(folder: Path, prompts: int) -> Path:
    """Write the tiny recipe for the model in `folder`, with so many prompts for gguf and a quarter for merge."""
    path = tiny_models.recipe(folder, types=TYPES, prompts=prompts)
    text = path.read_text().replace('name = "base-model"', f'name = "{folder / "model"}"', 1)
    text = text.replace("[merge]\n", f"[merge]\nprompts = {max(2, prompts * MERGE_PROMPTS // PROMPTS)}\n")
    before, after = text.split("[infer]\n")
    after = re.sub(r"max_completion_tokens = \d+", f"max_completion_tokens = {COMPLETION_TOKENS}", after, count=1)
    path.write_text(f"{before}[infer]\n{after}")
    return path


def watched(arguments: list[str]) -> dict[str, float]:
    """Run Python with `arguments`; return seconds, and the most bytes that it and its children had resident.

    "resident" counts all pages, "anonymous" those that are no file's: the rest the system takes back when it needs to.
    The peak of a single process is the kernel's own, so that none is missed; that of all together is sampled.
    """
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, start_new_session=True)
    most: Counter[str] = Counter()
    while process.poll() is None:
        most |= resident(process.pid)
        time.sleep(0.1)
    if process.returncode:
        raise click.ClickException(f"{' '.join(arguments)} ended with {process.returncode}")
    return {**most, "seconds": time.monotonic() - started}


def resident(session: int) -> Counter[str]:
    """Return the bytes that all processes of a session have resident now."""
    found: Counter[str] = Counter()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            pages = [int(field) for field in (process / "statm").read_text().split()]
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        except OSError:  # it ended
            continue
        if int(fields[3]) == session:
            found["resident"] += pages[1] * PAGE
            found["anonymous"] += (pages[1] - pages[2]) * PAGE
            found["peak"] = max(found["peak"], int(status.get("VmHWM", "0").split()[0]) * 1024)
    found["resident"] = max(found["resident"], found["peak"])
    return found


def page(prompts: int, found: dict[str, dict[str, float]], manifests: dict[str, dict]) -> str:
    """Return the page of results."""
    merge, gguf = manifests["merge"]["metrics"], manifests["gguf"]["metrics"]
    rows = "\n".join(
        f"| {stage} | {seen['resident'] / 1e9:.2f} | {seen['anonymous'] / 1e9:.2f} | {seen['seconds']:.0f} |"
        for stage, seen in found.items()
    )
    most = max(seen["resident"] for seen in found.values()) / 1e9
    wall = manifests["gguf"]["wall"]
    steps = ", ".join(f"{name} {value:.0f}" for name, value in wall.items() if name not in ("started", "seconds"))
    grows = sum(value for name, value in wall.items() if name == "reference" or name.startswith("examine"))
    minutes = grows * PROMPTS / prompts / 60
    times = (
        f"All {PROMPTS} prompts were run."
        if prompts == PROMPTS
        else f"{prompts} prompts instead of the recipes' {PROMPTS}. gguf's steps that grow with them took "
        f"{grows:.0f} s, loading the\nmodels included, so {PROMPTS} would take at most {minutes:.0f} minutes here: an "
        "extrapolation, not a measurement.\nMemory does not grow with the prompts: their logits are on disk."
    )
    files = "; ".join(f"{kind} {file['mean_kl']:.1e}" for kind, file in gguf["files"].items())
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "llama-cpp-python")
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    asked = "" if prompts == PROMPTS else f" --prompts {prompts}"
    return f"""# Memory of merge and gguf at 1.7 B parameters

`python -m bench.fidelity_memory{asked}`, {datetime.date.today()}, {machine},
{versions}.

Qwen3's shape of 1.7 B ({merge["parameters"] / 1e9:.2f} B parameters, vocabulary {SHAPE["vocab_size"]:,}), random
weights in bfloat16, a random LoRA of rank 32, merged to float16; types {", ".join(TYPES)} and the adapter's GGUF.
Greedy completions of {COMPLETION_TOKENS} tokens. On a CPU, no GPU.

| stage | most resident, GB | of that no file's pages, GB | seconds |
|---|---:|---:|---:|
{rows}

The most is {most:.2f} GB; wanted: at most {LIMIT_GB}. A stage's converter is counted with it. GB are 10^9 bytes.

{times}
Seconds of gguf's steps: {steps}.

The gates passed: merged is a mean KL of {merge["merged_mean_kl"]:.1e} nats from the adapter on its base; the files
from merged: {files}; the base with the adapter's file {gguf["lora"]["mean_kl"]:.1e}.
Random weights are no trained model.
"""


if __name__ == "__main__":
    main()
