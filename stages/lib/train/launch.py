"""The launcher: training and sampling on several GPUs, a process (a rank) a GPU.

The stage's own process holds the artifact and supervises. It starts its own command once a GPU, with the variables of
torch.distributed, and imports no torch. It hands signals on, ends all ranks when one fails, starts them anew one rung
down the memory ladder, and alone writes the manifest. On a CPU or one GPU it trains in its own process. With several
machines (`nodes.py`) each supervises its own ranks, and node 0 all.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from stages.lib.artifact.digests import digest_of
from stages.lib.artifact.folder import RANK_FOLDER, Run
from stages.lib.artifact.manifest import write_json
from stages.lib.bounded import end_with_parent
from stages.lib.disk import naming_disk_faults
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe
from stages.lib.train import ladder, nodes, ranks
from stages.lib.train.checkpoints import last_checkpoint
from stages.lib.train.failures import (
    FAILURE,
    Outcome,
    cause,
    failure_seen,
    note_failure,
    raise_failure,
    read_failure,
)
from stages.lib.train.nodes import Group, Peer

FIGURES = "figures.json"  # what rank 0 found, for the process that writes the manifest
RANKS = "checkpoints/ranks"  # beside the checkpoints: the output of each rank but 0
POLL_SECONDS = 0.1


@dataclass
class Rank:
    """A process that was started, the pipe from which its failure is read, its number, and how many there are."""

    process: subprocess.Popen
    failures: int
    number: int
    size: int


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
    own = process_count()
    if own == nodes.node_count() == 1:
        run.world_size = 1
        return train()
    with nodes.gathered(stage) as others:
        run.world_size = own + sum(node.processes for node in others)
        refuse_uneven(recipe, stage, run.world_size)
        (run.checkpoints / FIGURES).unlink(missing_ok=True)
        command = [sys.executable, *sys.orig_argv[1:]]
        while True:
            # Clears away what a crash left, before all read.
            checkpoint = last_checkpoint(run.checkpoints, getattr(recipe, stage).steps)
            group = Group(0, own, run.world_size, *rendezvous())
            try:
                variables = [rank_variables(group, place) for place in range(own)]
                if others:
                    variables = [each | nodes.own_interface(others[0].connection) for each in variables]
                    files = nodes.files_to_hand_over(run, checkpoint)
                    nodes.hand_over({"stage": stage, "recipe": digest_of(recipe.path)}, group, files, others)
                run_or_raise(command, variables, run.folder, others)
            except ladder.OutOfMemory as error:
                now = ladder.lowered(recipe, stage, run.checkpoints)
                ladder.write_rung(now, stage, run.checkpoints, error.step, error)
                continue
            return json.loads((run.checkpoints / FIGURES).read_text())


def refuse_uneven(recipe: Recipe, stage: str, size: int) -> None:
    """Raise `UserError` when a step of `stage` can't be shared by `size` ranks alike."""
    rows = recipe.sft.batch_size
    if stage == "grpo":
        rows = recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt
    if rows % size:
        names = "prompts_per_step x completions_per_prompt" if stage == "grpo" else "batch_size"
        raise UserError(
            f"{recipe.path}: [{stage}] {names} = {rows} can't be shared by {size} processes alike. Choose a "
            f"multiple of {size}, or name fewer GPUs"
        )


def rendezvous() -> tuple[str, int]:
    """Return the address and a free port where rank 0 waits for the others."""
    address = nodes.master()[0] if nodes.node_count() > 1 else "127.0.0.1"
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def work_as_rank(run: Run, train: Callable[[], Any]) -> NoReturn:
    """Train as one rank, leave the figures in a file or tell the failure, and end this process."""
    end_with_parent()  # a supervisor that is killed leaves no rank behind
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


def supervise(command: Sequence[str], count: int, folder: Path, *, apart: bool = False) -> None:
    """Run `command` in `count` ranks on this machine until all have ended; each writes under `folder`.

    `apart`: they know nothing of each other, and each sees its own GPU alone. Raises as `run_or_raise` does.
    """
    group = Group(0, count, count, "127.0.0.1", 0 if apart else rendezvous()[1])
    run_or_raise(
        command, [share_variables(n, count) if apart else rank_variables(group, n) for n in range(count)], folder
    )


def run_or_raise(
    command: Sequence[str], variables: Sequence[Mapping[str, str]], folder: Path, others: Sequence[Peer] = ()
) -> None:
    """Run the ranks, as `run_ranks` does. Raises `UserError` or `ladder.OutOfMemory` for a rank's own, else
    `SystemExit` after its traceback, or with 128 + the signal.
    """
    outcome = run_ranks(command, variables, folder, others)
    if outcome.failure:
        if sys.stderr.isatty():
            click.echo(err=True)  # below the bar of a rank 0 that was killed
        raise_failure(outcome.failure, has_checkpoint=any((folder / RANKS).parent.glob("checkpoint-*")))
    if outcome.code:  # by a signal, and rank 0 has said so
        raise SystemExit(outcome.code)


def run_ranks(
    command: Sequence[str], variables: Sequence[Mapping[str, str]], folder: Path, others: Sequence[Peer] = ()
) -> Outcome:
    """Run `command` once with each of `variables`, until all have ended; return how.

    Rank 0 speaks; the output of the others goes to files. Hands INT, TERM and HUP on to all. When a rank fails, here
    or on one of the `others`, all are killed.
    """
    logs = folder / RANKS
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.iterdir():
        old.unlink()
    started: list[Rank] = []
    with handing_on(started) as handed:
        try:
            for each in variables:
                started.append(start_rank(command, each, folder))
            codes = wait_for_all([rank.process for rank in started], others)
        finally:
            for rank in started:
                if rank.process.poll() is None:
                    rank.process.kill()
                rank.process.wait()
            told = [read_failure(rank.failures) for rank in started]
    failed = None in codes or any(map(has_failed, codes))
    for node in others:
        node.settle(failed=failed)
    failures = [failure for failure in told if failure]
    failures += [node.failure for node in others if failed and node.failure]
    ended = [128 - code if code < 0 else code for code in codes if code and (code >= 128 or -code in handed)]
    if not failures and len(ended) == sum(bool(code) for code in codes):
        return Outcome(ended[0] if ended else int(failed), None, handed)
    for rank, code, failure in zip(started, codes, told, strict=True):
        if code and not failure:
            name = f"rank {rank.number} of {rank.size}"
            failures.append(failure_seen(name, code, logs / f"{rank.number}.log"))
    return Outcome(1, cause(failures), handed)


def rank_variables(group: Group, place: int) -> dict[str, str]:
    """Return the variables of torch.distributed for the rank at a `place` of its machine."""
    ids = {"RANK": group.first + place, "LOCAL_RANK": place, "WORLD_SIZE": group.size, "LOCAL_WORLD_SIZE": group.own}
    return {name: str(value) for name, value in ids.items()} | {
        "MASTER_ADDR": group.address,
        "MASTER_PORT": str(group.port),
    }


def share_variables(number: int, count: int) -> dict[str, str]:
    """Return the variables of a process that samples apart: its number, and its GPU among those that are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = str(number) if visible is None else visible.split(",")[number % len(visible.split(","))]
    return {ranks.SHARE: f"{number}/{count}", "CUDA_VISIBLE_DEVICES": own}


def start_rank(command: Sequence[str], variables: Mapping[str, str], folder: Path) -> Rank:
    """Start one rank, in a session of its own: a terminal's Ctrl-C reaches it once, through the supervisor."""
    place, _, count = variables.get(ranks.SHARE, "").partition("/")
    number, size = int(place or variables["RANK"]), int(count or variables["WORLD_SIZE"])
    threads = max(1, (os.cpu_count() or 1) // int(count or variables["LOCAL_WORLD_SIZE"]))
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
    return Rank(process, reading, number, size)


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


def has_failed(code: int | None) -> bool:
    """Say whether an exit code is a failure. A rank that saves and stops on a signal has not failed: so do all."""
    return code is not None and (code < 0 or 0 < code < 128)


def wait_for_all(started: Sequence[subprocess.Popen], others: Sequence[Peer]) -> list[int | None]:
    """Return the exit codes of all that were started here, in order; None: still running.

    Waits until all have ended, or one has failed, here or on one of the `others`.
    """
    while True:
        codes = [process.poll() for process in started]
        is_lost = any(has_failed(node.poll()) for node in others)
        if None not in codes or is_lost or any(map(has_failed, codes)):
            time.sleep(POLL_SECONDS)  # the first to fail may be one whose partner is about to
            return [process.poll() for process in started]
        time.sleep(POLL_SECONDS)
