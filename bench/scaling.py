"""Tokens a second of GRPO on 1, 2, 4 and 8 GPUs of one machine, and what its ranks wait for.

    python -m bench.scaling --work FOLDER --gpus 1,2 --seconds 560 --out bench/results/scaling.jsonl

The models of bench/grpo_throughput.py: published shapes, random weights, 768 tokens a completion. Weak: 256 completions
a GPU; strong: 256, 512 and 1,024 in all. A run appends one line to `--out`, and a line that is there is not measured
again, so the same command goes on where the time ended. Seconds are medians over the steps after the first.
`waiting` is how much longer the slowest rank generates than the mean one. `equal` says whether the adapter had the
same bytes on all ranks after each step, `changed` whether each step changed it. On machines without NVLink multicast
set NCCL_NVLS_ENABLE=0.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bench import grpo_throughput as bench
from stages import grpo
from stages.lib.artifact.folder import Run
from stages.lib.errors import UserError
from stages.lib.model.engine import import_engine
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.train import ladder, launch, ranks

MICRO_BATCH = {"qwen3-1.7b": 32, "qwen2.5-3b": 16, "llama3.1-8b": 8}
STRONG = (256, 512, 1024)
A_GPU = 256
LEAST_SECONDS = 60  # less would not even start a run


def recipe_of(run: str, work: Path) -> Recipe:
    """Return the recipe of a run, SHAPE:GPUS:COMPLETIONS."""
    shape, gpus, completions = run.split(":")
    own = int(completions) // int(gpus)
    recipe = read_recipe(bench.ROOT / "recipes" / f"{bench.SHAPES[shape][1]}.toml")
    recipe = bench.changed(recipe, f"unsloth:{shape}:{completions}:{MICRO_BATCH[shape]}", work)
    return replace(recipe, vllm=replace(recipe.vllm, sequences=min(own, 512)))


def measure_rank(run: str, work: Path, folder: Path) -> dict[str, Any]:
    """Train as one rank of a run; write its steps to a file of its own. Returns nothing that is not in there."""
    recipe = recipe_of(run, work)
    started = time.monotonic()
    import_engine(recipe)
    import torch
    from transformers import TrainerCallback, trainer
    from trl.generation.vllm_generation import VLLMGeneration

    spent: dict[str, float] = {}
    path = folder / f"steps-{ranks.rank()}.jsonl"

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            spent.setdefault("start", time.monotonic() - started)
            self.began = time.monotonic()

        def on_step_end(self, args, state, control, model=None, **kwargs):
            whole, generation = time.monotonic() - self.began, spent.pop("generation", 0.0)
            free, total = torch.cuda.mem_get_info()
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            digest = hashlib.sha256()
            for weight in weights:
                digest.update(weight.detach().float().cpu().numpy().tobytes())
            line = {"step": whole, "generation": generation, "training": whole - generation, "start": spent["start"]}
            line |= {"gib": (total - free) / 2**30, "adapter": digest.hexdigest()}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{run} rank {ranks.rank()} step {state.global_step}: {whole:.2f} s", flush=True)

    trainer.DEFAULT_CALLBACKS.append(Timer)
    bench.watch(VLLMGeneration, "generate", spent, "generation")
    bench.spread_out(recipe, 0.0, 0.0, [])
    problems = grpo.Rows(work / "problems.jsonl", work / "problems.jsonl")
    grpo.train(recipe, problems, work / f"{run.split(':')[0]}-adapter", Run(folder))
    return {}


def figures(run: str, folder: Path) -> dict[str, Any]:
    """Return what a finished run came to."""
    shape, gpus, completions = run.split(":")
    files = [folder / f"steps-{rank}.jsonl" for rank in range(int(gpus))]
    by_rank = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    steps = list(zip(*by_rank, strict=True))
    counted = steps[1:]

    def median(key: str) -> float:
        return statistics.median(max(rank[key] for rank in step) for step in counted)

    waiting = [
        max(rank["generation"] for rank in step) - statistics.mean(rank["generation"] for rank in step)
        for step in counted
    ]
    return {
        "run": run,
        "shape": shape,
        "gpus": int(gpus),
        "completions": int(completions),
        "tokens_per_second": round(int(completions) * bench.COMPLETION_TOKENS / median("step")),
        **{key: round(median(key), 2) for key in ("step", "generation", "training")},
        "waiting": round(statistics.median(waiting), 2),
        "start": round(max(rank[0]["start"] for rank in by_rank), 1),
        "first step": round(max(rank["step"] for rank in steps[0]), 1),
        "gib_a_gpu": round(max(rank["gib"] for step in steps for rank in step), 1),
        "equal": all(len({rank["adapter"] for rank in step}) == 1 for step in steps),
        "changed": len({rank[0]["adapter"] for rank in steps}) == len(steps),
    }


def measure(run: str, work: Path, seconds: float) -> dict[str, Any] | None:
    """Measure a run in processes of its own; None when it did not end in `seconds`."""
    count = int(run.split(":")[1])
    folder = work / "scaling"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints" / "logs").mkdir(parents=True)
    command = [sys.executable, "-m", "bench.scaling", "--work", str(work), "--rank-of", run]
    if count == 1:  # as the stage itself: without torch.distributed
        try:
            subprocess.run([*command, "--folder", str(folder)], cwd=bench.ROOT, timeout=seconds, check=True)
        except subprocess.TimeoutExpired:
            return None
        except subprocess.CalledProcessError as error:
            return {"run": run, "failed": f"exit code {error.returncode}"}
        return figures(run, folder)
    try:
        launch.supervise(["timeout", "--signal=KILL", str(int(seconds)), *command], count, folder)
    except ladder.OutOfMemory as error:
        return {"run": run, "failed": f"out of memory at step {error.step}: {error}"}
    except (UserError, SystemExit) as error:
        failed = str(getattr(error, "message", error))
        return None if "SIGKILL" in failed or "137" in failed else {"run": run, "failed": failed[-2000:]}
    return figures(run, folder)


def prepare(shapes: list[str], work: Path) -> None:
    """Write the models, adapters and problems that are not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        folder = bench.make_model(shape, work)
        if not (work / f"{shape}-adapter" / "adapter_config.json").is_file():
            recipe = read_recipe(bench.ROOT / "recipes" / f"{bench.SHAPES[shape][1]}.toml")
            bench.make_adapter(recipe, folder, work / f"{shape}-adapter")
    with (work / "problems.jsonl").open("w") as file:
        for number in range(8000):
            turns = [{"role": "user", "content": "one two three four " * 24 + str(number)}]
            file.write(json.dumps({"prompt": turns, "answer": str(number)}) + "\n")


def runs_of(shapes: list[str], gpus: list[int]) -> list[str]:
    """Return the runs, those that fill the headline first: the weak ones and 256 in all, then the other strong ones."""
    first = [f"{shape}:{count}:{own}" for shape in shapes for count in gpus for own in (A_GPU * count, A_GPU)]
    rest = [f"{shape}:{count}:{own}" for shape in shapes for own in STRONG for count in gpus]
    return list(dict.fromkeys(first + rest))


@click.command(help=__doc__.partition("\n")[0])
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where models go.")
@click.option("--gpus", default="1,2", show_default=True, help="Numbers of GPUs.")
@click.option("--shapes", default=",".join(MICRO_BATCH), show_default=True)
@click.option("--seconds", default=560, show_default=True, help="For all of this call.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="bench/results/scaling.jsonl")
@click.option("--rank-of", hidden=True, help="Be a rank of this run.")
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(work: Path, gpus: str, shapes: str, seconds: int, out: Path, rank_of: str | None, folder: Path | None) -> None:
    work = work.absolute()
    if rank_of:
        given = folder or Path(os.environ[launch.RANK_FOLDER])
        if folder:
            measure_rank(rank_of, work, given)
            os._exit(0)
        return launch.work_as_rank(Run(given), lambda: measure_rank(rank_of, work, given))
    ends = time.monotonic() + seconds
    done = {json.loads(line)["run"] for line in out.read_text().splitlines()} if out.is_file() else set()
    for run in runs_of(shapes.split(","), [int(count) for count in gpus.split(",")]):
        if run in done:
            continue
        # In a process of its own: torch's memory on the GPU, where models are drawn, is gone with it.
        program = (
            "import sys, pathlib; from bench.scaling import prepare; prepare([sys.argv[1]], pathlib.Path(sys.argv[2]))"
        )
        subprocess.run([sys.executable, "-c", program, run.split(":")[0], str(work)], cwd=bench.ROOT, check=True)
        left = ends - time.monotonic()
        result = measure(run, work, left) if left > LEAST_SECONDS else None
        if result is None:
            click.echo(f"{run}: the time is over; the same command goes on here")
            break
        bench.note(result, out)


if __name__ == "__main__":
    main()
