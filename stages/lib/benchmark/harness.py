"""lm-eval, the harness by which public benchmarks are quoted: installed when asked for, run offline on local copies.

It lies in a folder of its own under data/cache, from `docker/benchmark.lock`, and comes first on the path of a process
of its own: it brings another antlr than the stages have.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from stages.lib.bounded import process_pool
from stages.lib.errors import UserError, nearest

LOCK = Path(__file__).parents[3] / "docker" / "benchmark.lock"
CACHE = Path("data/cache")
ALIASES = {"math_hard": "leaderboard_math_hard"}  # what people call a benchmark, and its name in the harness
FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of datasets: files that a task names itself


@dataclass(frozen=True)
class Asked:
    """What is to be run: tasks by name, at most `limit` problems of each, local copies in `data`."""

    tasks: tuple[str, ...]
    limit: int | None
    data: Path | None
    system_prompt: str | None  # prompts by the chat template, with this, and examples as turns; None: as plain texts
    batch_size: int


@dataclass(frozen=True)
class Judged:
    """A model: a folder or hub name for `hf` and `vllm`, a file for `gguf`; `tokenizer`: a folder, else the model's."""

    engine: str
    place: str
    revision: str | None = None
    dtype: str = "float32"
    memory_share: float = 0.9
    max_tokens: int = 2048  # of prompt and completion, where the engine has to be told
    tokenizer: str | None = None


def installed() -> Path:
    """Return the folder of the harness; the first time it is installed, every file checked against its hash.

    Raises `UserError` with pip's last line when that fails.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(LOCK.read_bytes() + version.encode()).hexdigest()[:12]
    folder = CACHE / f"benchmark-{digest}"
    if folder.is_dir():
        return folder
    click.echo(f"benchmark: installing lm-eval in {folder}, once", err=True)
    new = CACHE / f"benchmark-{digest}.{os.getpid()}"
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--target", str(new), "--requirement", str(LOCK)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise UserError(f"{LOCK}: pip could not install lm-eval: {said}. It needs the package registry, once")
        if not folder.is_dir():
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def run_apart(judged: Judged, asked: Asked, harness: Path) -> dict[str, Any]:
    """Return what `run` returns, from a process of its own: when it ends, memory and GPU are free again."""
    with process_pool(1) as pool:
        try:
            return pool.submit(run, judged, asked, harness).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{judged.place}: the process that ran the benchmark was ended; what it said is above. Out of memory? "
                f"Lower LIMIT, or [infer] batch_size"
            ) from error


def run(judged: Judged, asked: Asked, harness: Path) -> dict[str, Any]:
    """Return the harness' results of a model: `metrics`, `values` by problem, `counts`, and the harness' `version`.

    Raises `UserError` for a task that is not known, one without a local copy, and one that the harness will not run.
    """
    sys.path.insert(0, str(harness.absolute()))
    if asked.data:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    import datasets

    if asked.data:
        datasets.load_dataset = from_folder(asked.data, datasets.load_dataset)
    import lm_eval
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(asked.data) if asked.data else None)
    names = [ALIASES.get(name, name) for name in asked.tasks]
    for name in names:
        if name not in tasks.all_tasks:
            raise UserError(
                f"TASKS: lm-eval {lm_eval.__version__} has no task {name!r}{nearest(name, tasks.all_tasks)}, and "
                f"{asked.data or 'no BENCHMARKS=FOLDER'} has none of that name"
            )
    chat = asked.system_prompt is not None
    try:
        found = simple_evaluate(
            model=opened(judged, asked), tasks=names, limit=asked.limit, task_manager=tasks, bootstrap_iters=0,
            apply_chat_template=chat, fewshot_as_multiturn=chat, system_instruction=asked.system_prompt,
            confirm_run_unsafe_code=False,
        )  # fmt: skip
    except OSError as error:  # also what a task fetches by itself, such as a metric of the hub
        if not asked.data:
            raise
        said = str(error).splitlines()[0]
        raise UserError(
            f"TASKS: a task reads what is not in {asked.data}: {said} Leave it or BENCHMARKS out"
        ) from error
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        said = str(error).partition(". Set ")[0]
        raise UserError(
            f"TASKS: {said}. Temper runs no program of a model outside its sandbox: leave it out"
        ) from error
    return {"version": lm_eval.__version__, **plain(found)}


def opened(judged: Judged, asked: Asked) -> Any:
    """Return the model as the harness calls it."""
    if judged.engine == "gguf":
        from stages.lib.benchmark.served import served

        return served(Path(judged.place))
    if judged.engine == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(
            pretrained=judged.place, revision=judged.revision, dtype=judged.dtype, batch_size="auto",
            gpu_memory_utilization=judged.memory_share, max_model_len=judged.max_tokens, trust_remote_code=False,
            tokenizer=judged.tokenizer,
        )  # fmt: skip
    import torch
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=judged.place, revision=judged.revision, dtype=judged.dtype, batch_size=asked.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu", trust_remote_code=False, tokenizer=judged.tokenizer,
    )  # fmt: skip


def from_folder(folder: Path, fetch: Callable[..., Any]) -> Callable[..., Any]:
    """Return datasets' `load_dataset` on local copies: of "openai/gsm8k" the folder gsm8k, with its part if it has one.

    A folder with a README.md is a copy of the hub's repository, and its parts are those that this names.
    """

    def load(path: str, name: str | None = None, **rest: Any) -> Any:
        if path in FILE_BUILDERS:
            return fetch(path, name, **rest)
        here = folder / Path(path).name
        part = here / name if name and (here / name).is_dir() else here
        if not part.is_dir():
            raise UserError(
                f"{here}: there is no local copy of {path}, which a task of TASKS reads; expected a folder with a file "
                f"for each split, such as test.jsonl. Put it there, or leave BENCHMARKS out to fetch it"
            )
        parts = {"name": name} if name and part == here and (here / "README.md").is_file() else {}
        return fetch(str(part), **parts, **rest)

    return load


def plain(found: Any) -> dict[str, Any]:
    """Return of the harness' results the `metrics` by task and name, the `values` by problem, and the `counts`.

    A metric's name is "exact_match,strict-match": of an answer that a filter took out of the completion.
    """
    metrics: dict[str, dict[str, float]] = {}
    for task, own in found["results"].items():
        numbers = {name: value for name, value in own.items() if isinstance(value, int | float)}
        metrics[task] = {name: float(value) for name, value in numbers.items() if "," in name and "_stderr" not in name}
    values: dict[str, dict[str, dict[str, float]]] = {}
    for task, rows in found.get("samples", {}).items():
        for row in rows:
            for metric in row["metrics"]:
                if isinstance(row[metric], int | float):
                    by_problem = values.setdefault(task, {}).setdefault(f"{metric},{row['filter']}", {})
                    by_problem[str(row["doc_id"])] = float(row[metric])
    counts = {task: own["effective"] for task, own in found.get("n-samples", {}).items()}
    return {"metrics": metrics, "values": values, "counts": counts}


def checked_names(text: str) -> tuple[str, ...]:
    """Return the names of tasks, commas between them. Raises `UserError` for what is none, such as a path or option."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or not name[0].isalnum():
            raise UserError(f"TASKS: {name!r} is no name of a task; expected such as gsm8k,math_hard")
    return names
