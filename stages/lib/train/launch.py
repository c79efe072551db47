"""The launcher: training and sampling on several GPUs of one machine, a process (a rank) a GPU.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import click

from stages.lib.artifact.folder import RANK_FOLDER, Run
from stages.lib.artifact.manifest import write_json
from stages.lib.disk import naming_disk_faults
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe
from stages.lib.train import ladder, ranks
from stages.lib.train.checkpoints import last_checkpoint

FIGURES = "figures.json"  # what rank 0 found, for the process that writes the manifest
RANKS = "checkpoints/ranks"  # beside the checkpoints: the output of each rank but 0
# In a rank's environment: the pipe that takes why it failed. A file could not be written on a full disk.
FAILURE = "TEMPER_FAILURE"
MAX_FAILURE = 10_000  # characters of a traceback's end; a pipe holds 64 KiB, and an escaped character takes up to 6
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
    """Why a rank ended: the kind ("user", "memory", "crash"), the text to show, the optimizer step, and when."""

    kind: str
    text: str
    step: int = 0
    time: float = 0.0


@dataclass
class Rank:
    """A process that was started, and the end of the pipe from which its failure is read."""

    process: subprocess.Popen
    failures: int


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
        work_as_rank(run, train)
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


def work_as_rank(run: Run, train: Callable[[], Any]) -> NoReturn:
    """Train as one rank, leave the figures in a file or tell the failure, and end this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a supervisor that is killed leaves no rank behind
    code = 0
    try:
        with naming_disk_faults(run.folder):
            figures = train()
            if ranks.is_first():
                write_json(run.checkpoints / FIGURES, figures)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        code = 1
        note_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries wait at exit for partners that may be gone


def note_failure(error: BaseException) -> None:
    """Tell the supervisor why this rank failed; it says it once."""
    kind, text, step = "crash", "".join(traceback.format_exception(error))[-MAX_FAILURE:], 0
    if isinstance(error, ladder.OutOfMemory):
        kind, text, step = "memory", str(error), error.step
    elif isinstance(error, click.ClickException):
        kind, text = "user", error.message
    record = {"kind": kind, "text": text, "step": step, "time": time.time()}
    os.write(int(os.environ[FAILURE]), json.dumps(record).encode())
    if kind == "crash" and not ranks.is_first():
        traceback.print_exception(error)


def supervise(command: Sequence[str], count: int, folder: Path, *, apart: bool = False) -> None:
    """Run `command` in `count` ranks until all have ended; each writes under `folder`.

    Rank 0 speaks; the output of the others goes to files. Hands INT, TERM and HUP on to all. When a rank fails,
    the others are killed. `apart`: they know nothing of each other, and each sees its own GPU alone. Raises `UserError`
    or `ladder.OutOfMemory` for a rank's own, else `SystemExit` after its traceback, or with 128 + the signal.
    """
    logs = folder / RANKS
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[Rank] = []
    with handing_on(started) as handed:
        try:
            for number in range(count):
                variables = share_variables(number, count) if apart else rank_variables(number, count, port)
                started.append(start_rank(command, number, variables, folder))
            codes = wait_for_all([rank.process for rank in started])
        finally:
            for rank in started:
                if rank.process.poll() is None:
                    rank.process.kill()
                rank.process.wait()
            failures = [read_failure(rank.failures) for rank in started]
    if any(codes):
        if sys.stderr.isatty():
            click.echo(err=True)  # below the bar of a rank 0 that was killed
        raise_failure(codes, failures, handed, logs)


def rank_variables(number: int, count: int, port: int) -> dict[str, str]:
    """Return the variables of torch.distributed for a rank."""
    ids = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {name: str(value) for name, value in ids.items()} | {"MASTER_ADDR": "127.0.0.1"}


def share_variables(number: int, count: int) -> dict[str, str]:
    """Return the variables of a process that samples apart: its number, and its GPU among those that are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = str(number) if visible is None else visible.split(",")[number % len(visible.split(","))]
    return {ranks.SHARE: f"{number}/{count}", "CUDA_VISIBLE_DEVICES": own}


def start_rank(command: Sequence[str], number: int, variables: Mapping[str, str], folder: Path) -> Rank:
    """Start one rank, in a session of its own: a terminal's Ctrl-C reaches it once, through the supervisor."""
    count = int(variables.get("WORLD_SIZE") or variables[ranks.SHARE].partition("/")[2])
    threads = max(1, (os.cpu_count() or 1) // count)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)  # a process that the rank left behind may hold the other end
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **variables}
    environment |= {RANK_FOLDER: str(folder.absolute()), FAILURE: str(writing)}
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, writing)
        log = stack.enter_context((folder / RANKS / f"{number}.log").open("wb")) if number else None
        errors = subprocess.STDOUT if log else None
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=errors, start_new_session=True, pass_fds=[writing]
        )
    return Rank(process, reading)


def read_failure(pipe: int) -> Failure | None:
    """Return why a rank that has ended failed, if it said so; closes the pipe."""
    try:
        told = os.read(pipe, 1 << 16)
    except BlockingIOError:
        told = b""
    os.close(pipe)
    return Failure(**json.loads(told)) if told else None


@contextlib.contextmanager
def handing_on(started: Sequence[Rank]) -> Iterator[list[int]]:
    """Hand INT, TERM and HUP on to all ranks `started`; yield the list of those that came. An ignored one stays so."""
    handed: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        handed.append(number)
        for rank in started:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    heeded = [
        each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, hand_on) for number in heeded}
    try:
        yield handed
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


def raise_failure(
    codes: Sequence[int | None], failures: Sequence[Failure | None], handed: Sequence[int], logs: Path
) -> None:
    """Raise what ended the ranks, whose exit codes are `codes`: the cause alone, not what followed in its partners."""
    ended = [128 - code if code < 0 else code for code in codes if code and (code >= 128 or -code in handed)]
    if not any(failures) and len(ended) == sum(bool(code) for code in codes):  # by a signal, and rank 0 has said so
        raise SystemExit(ended[0])
    failure = cause(codes, failures, logs)
    if failure.kind == "memory":
        raise ladder.OutOfMemory(failure.step, failure.text)
    if failure.kind == "user":
        raise UserError(failure.text)
    click.echo(failure.text, err=True)
    raise SystemExit(1)


def cause(codes: Sequence[int | None], failures: Sequence[Failure | None], logs: Path) -> Failure:
    """Return the first failure of a rank's own."""
    told = sorted((failure.time, number, failure) for number, failure in enumerate(failures) if failure)
    for _, number, failure in told:
        if failure.kind != "crash":
            return failure
        if not any(text in failure.text for text in PARTNER_GONE):
            return replace(failure, text=f"rank {number} failed:\n{failure.text}")
    for number, code in enumerate(codes):
        if code and not failures[number]:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            log = logs / f"{number}.log"
            last = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
            again = "All ranks were ended. Run the same command again"
            again += ": it goes on from the last checkpoint" if any(logs.parent.glob("checkpoint-*")) else ""
            return Failure("user", "\n".join([f"rank {number} of {len(codes)} {how}. {again}", *last]))
    _, number, failure = told[0]
    return replace(failure, text=f"rank {number} failed:\n{failure.text}")
