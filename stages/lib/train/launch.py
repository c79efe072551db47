"""The launcher: training on several GPUs of one machine, a process (a rank) a GPU.

The stage's own process holds the artifact and supervises. It starts its own command once a GPU, with the variables of
torch.distributed, and imports no torch. It hands signals on, ends all ranks when one fails, starts them anew one rung
down the memory ladder, and alone writes the manifest. On a CPU or one GPU it trains in its own process.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from stages.lib.artifact.folder import RANK_FOLDER, Run
from stages.lib.artifact.manifest import write_json
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe
from stages.lib.train import ladder, ranks
from stages.lib.train.checkpoints import last_checkpoint

FIGURES = "figures.json"  # what rank 0 found, for the process that writes the manifest
RANKS = "checkpoints/ranks"  # beside the checkpoints: the output of each rank but 0, and why one failed
# In the errors of a rank whose partner is gone: the partner's own failure is the cause.
PARTNER_GONE = (
    "onnection closed by peer",
    "onnection reset",
    "onnection refused",
    "Broken pipe",
    "NCCL",
    "ProcessGroup",
)
POLL_SECONDS = 0.1
LAST_LINES = 15
PR_SET_PDEATHSIG = 1


@dataclass
class Failure:
    """Why a rank ended: the kind ("user", "memory", "crash"), the text to show, and the optimizer step."""

    kind: str
    text: str
    step: int = 0


def process_count(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many processes are to train: one for each GPU that make's GPUS names, or PROCESSES on a CPU.

    Raises `UserError` when GPUS is `all` and nvidia-smi lists none.
    """
    asked, gpus = environment.get("PROCESSES", ""), environment.get("TEMPER_GPUS", "")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise UserError(f"PROCESSES={asked} is not known. Expected the number of processes, such as 2")
        return int(asked)
    if gpus != "all":
        return len(gpus.split(",")) if gpus not in ("", "none") else 1
    if visible := environment.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError("GPUS=all, and nvidia-smi lists no GPU. Run: make doctor; or leave GPUS out") from error
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


def train_on_gpus(recipe: Recipe, stage: str, run: Run, train: Callable[[], Any]) -> Any:
    """Return the figures of `train`: called here on a CPU or one GPU, else by a process a GPU.

    Raises `UserError` for one that a rank raised, and `SystemExit` with 128 + the signal when one ended training.
    """
    if RANK_FOLDER in os.environ:
        return work_as_rank(run, train)
    run.world_size = process_count()
    if run.world_size == 1:
        return train()
    rows = recipe.sft.batch_size
    if stage == "grpo":
        rows = recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt
    if rows % run.world_size:
        names = "prompts_per_step x completions_per_prompt" if stage == "grpo" else "batch_size"
        raise UserError(
            f"{recipe.path}: [{stage}] {names} = {rows} can't be shared by {run.world_size} processes alike. Choose a "
            f"multiple of {run.world_size}, or name fewer GPUs"
        )
    (run.checkpoints / FIGURES).unlink(missing_ok=True)
    while True:
        last_checkpoint(run.checkpoints, getattr(recipe, stage).steps)  # clears away what a crash left, before all read
        command = [sys.executable, *sys.orig_argv[1:]]
        try:
            supervise(command, run.world_size, run.folder)
        except ladder.OutOfMemory as error:
            now = ladder.lowered(recipe, stage, run.checkpoints)
            ladder.write_rung(now, stage, run.checkpoints, error.step, error)
            continue
        return json.loads((run.checkpoints / FIGURES).read_text())


def work_as_rank(run: Run, train: Callable[[], Any]) -> None:
    """Train as one rank, leave the figures or the failure in files, and end this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a supervisor that is killed leaves no rank behind
    code = 0
    try:
        figures = train()
        if ranks.is_first():
            write_json(run.checkpoints / FIGURES, figures)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        code = 1
        note_failure(run.folder, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries wait at exit for partners that may be gone


def note_failure(folder: Path, error: BaseException) -> None:
    """Write why this rank failed, for the supervisor to say it once."""
    kind, text, step = "crash", "".join(traceback.format_exception(error)), 0
    if isinstance(error, ladder.OutOfMemory):
        kind, text, step = "memory", str(error), error.step
    elif isinstance(error, click.ClickException):
        kind, text = "user", error.message
    record = {"kind": kind, "text": text, "step": step, "time": time.time()}
    with contextlib.suppress(OSError):  # a full disk: the last lines of the rank's output say it
        write_json(folder / RANKS / f"{ranks.rank()}.json", record)
    if kind == "crash" and not ranks.is_first():
        traceback.print_exception(error)


def supervise(command: Sequence[str], count: int, folder: Path) -> None:
    """Run `command` in `count` ranks until all have ended; each writes under `folder`.

    Rank 0 speaks; the output of the others goes to files. Hands INT, TERM and HUP on to all. When a rank fails,
    the others are killed. Raises `UserError` or `ladder.OutOfMemory` for a rank's own, else `SystemExit` after its
    traceback.
    """
    logs = folder / RANKS
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[subprocess.Popen] = []
    with handing_on(started):
        try:
            for number in range(count):
                started.append(start_rank(command, number, count, port, folder))
            codes = wait_for_all(started)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait()
    if any(codes):
        raise_failure(codes, logs)


def start_rank(command: Sequence[str], number: int, count: int, port: int, folder: Path) -> subprocess.Popen:
    """Start one rank, in a session of its own: a terminal's Ctrl-C reaches it once, through the supervisor."""
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, RANK_FOLDER: str(folder.absolute())}
    environment |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    environment |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / RANKS / f"{number}.log").open("wb")) if number else None
        errors = subprocess.STDOUT if log else None
        return subprocess.Popen(command, env=environment, stdout=log, stderr=errors, start_new_session=True)


@contextlib.contextmanager
def handing_on(started: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Hand INT, TERM and HUP on to all processes `started`; a signal that is ignored stays so."""

    def hand_on(number: int, frame: Any) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    heeded = [
        each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, hand_on) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_all(started: Sequence[subprocess.Popen]) -> list[int | None]:
    """Return the exit codes of all, in order, as soon as all have ended or one has failed; None: still running.

    A rank that saves and stops on a signal has not failed: its partners do the same.
    """
    while True:
        codes = [process.poll() for process in started]
        if None not in codes or any(code is not None and (code < 0 or 0 < code < 128) for code in codes):
            time.sleep(POLL_SECONDS)  # the first to fail may be one whose partner is about to
            return [process.poll() for process in started]
        time.sleep(POLL_SECONDS)


def raise_failure(codes: Sequence[int | None], logs: Path) -> None:
    """Raise what ended the ranks, whose exit codes are `codes`: the cause alone, not what followed in its partners."""
    failure = cause(codes, logs)
    if failure is None:  # all stopped by a signal, and rank 0 has said so
        raise SystemExit(next(code for code in codes if code))
    if failure.kind == "memory":
        raise ladder.OutOfMemory(failure.step, failure.text)
    if failure.kind == "user":
        raise UserError(failure.text)
    click.echo(failure.text, err=True)
    raise SystemExit(1)


def cause(codes: Sequence[int | None], logs: Path) -> Failure | None:
    """Return the first failure of a rank's own; None when all ended by a signal that they heeded."""
    records = [(int(path.stem), json.loads(path.read_text())) for path in logs.glob("*.json")]
    for number, record in sorted(records, key=lambda each: each[1]["time"]):
        if record["kind"] != "crash" or not any(text in record["text"] for text in PARTNER_GONE):
            text = f"rank {number} failed:\n{record['text']}" if record["kind"] == "crash" else record["text"]
            return Failure(record["kind"], text, record["step"])
    for number, code in enumerate(codes):
        if code is not None and (code < 0 or 0 < code < 128) and number not in dict(records):
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            log = logs / f"{number}.log"
            last = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
            again = "All ranks were ended. Run the same command again: it goes on from the last checkpoint"
            return Failure("user", "\n".join([f"rank {number} of {len(codes)} {how}. {again}", *last]))
    if records:
        number, record = min(records, key=lambda each: each[1]["time"])
        return Failure("crash", f"rank {number} failed:\n{record['text']}")
    return None
