"""Out of GPU memory for real: GRPO beside another process that holds most of the GPU steps down its ladder and finishes.

    python -m bench.memory_ladder --work FOLDER

FOLDER is that of bench.gpu_learning, whose base, data and SFT adapter it takes. Writes bench/results/memory_ladder.md.
"""

import datetime
import json
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "memory_ladder.md"
BALLAST = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(float(sys.argv[1]) * 2**30), dtype=torch.uint8, device="cuda")
print(f"{held.numel() / 2**30:.1f}", flush=True)
time.sleep(3600)
"""


@click.command(help=__doc__.partition("\n")[0])
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--free-gib", default=36.0, show_default=True, help="What the other process leaves free.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(work: Path, free_gib: float, out: Path) -> None:
    text = (work / "recipe.toml").read_text()
    changes = {
        "steps = 100": "steps = 6",
        "micro_batch_size = 64": "micro_batch_size = 256",
        "save_steps = 50": "save_steps = 2",
    }
    for old, new in {**changes, "memory_share = 0.4": "memory_share = 0.3"}.items():
        text, count = re.subn(rf"(?m)^{re.escape(old)}", new, text)
        assert count == 1, old
    recipe = work / "ladder.toml"
    recipe.write_text(text)
    ballast = subprocess.Popen([sys.executable, "-c", BALLAST, str(free_gib)], stdout=subprocess.PIPE, text=True)
    held = ballast.stdout.readline().strip()
    command = [sys.executable, "-m", "stages.grpo", "--recipe", str(recipe), "--out", str(work / "ladder")]
    command += [part for name in ("prepare-data", "sft") for part in (f"--{name}", str(work / name))]
    started = time.monotonic()
    run = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - started
    (work / "ladder.log").write_text(run.stdout)
    ballast.kill()
    said = [line for line in run.stdout.replace("\r", "\n").splitlines() if line.startswith("out of GPU memory")]
    if run.returncode:
        raise click.ClickException(f"exit code {run.returncode} after {seconds:.0f} s; {said}; {run.stdout[-2000:]}")
    metrics = json.loads((work / "ladder" / "manifest.json").read_text())["metrics"]
    if not metrics["memory_ladder"]:
        raise click.ClickException(f"{free_gib:g} GiB were enough: nothing stepped down. Give a smaller --free-gib")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "unsloth", "vllm"))
    lines = [
        "# GRPO that runs out of GPU memory and goes on",
        "",
        f"`python -m bench.memory_ladder --free-gib {free_gib:g}`, {datetime.date.today()}, {gpu}, {versions}. Another "
        f"process held {held} GiB. The recipe of bench/gpu_learning.toml with 6 steps, memory_share 0.3 and micro-batches "
        f"of 256 finished in {seconds:.0f} s with exit code 0, over {len(metrics['memory_ladder'])} steps down:",
        "",
        *(f"- {line}" for line in said),
        "",
        "As the manifest states it:",
        "",
        "```json",
        json.dumps(metrics["memory_ladder"], indent=1),
        "```",
    ]
    out.write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
