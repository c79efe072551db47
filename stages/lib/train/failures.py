"""Why ranks ended: what a rank tells through a pipe, what is seen of one that told nothing, and the cause of all."""

import json
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from stages.lib.errors import UserError
from stages.lib.train import ladder, ranks

# In a rank's environment: the pipe that takes why it failed. A file could not be written on a full disk.
FAILURE = "TEMPER_FAILURE"
MAX_FAILURE = 10_000  # characters of a traceback's end; a pipe holds 64 KiB, and an escaped character takes up to 6
# In the errors of a rank whose partner is gone: the partner's own failure is the cause.
PARTNER_GONE = (
    "onnection closed by peer",
    "onnection reset",
    "onnection refused",
    "onnection timed out",
    "No route to host",
    "Network is unreachable",
    "Broken pipe",
    "NCCL",
    "ProcessGroup",
)
LAST_LINES = 15


@dataclass
class Failure:
    """Why a rank ended: the kind ("user", "memory", "crash", or "ended" where it told nothing), and the text to show.

    `step` is the optimizer step, `time` when it was told, `rank` which rank told it.
    """

    kind: str
    text: str
    step: int = 0
    time: float = 0.0
    rank: int = 0


@dataclass
class Outcome:
    """How the ranks of a machine ended: 0, 128 + the signal on which they stopped, or 1 with the cause.

    `handed` are the signals that came to this process, and were handed on to its ranks.
    """

    code: int
    failure: Failure | None
    handed: Sequence[int] = ()


def note_failure(error: BaseException) -> None:
    """Tell the supervisor why this rank failed; it says it once."""
    failure = Failure("crash", "".join(traceback.format_exception(error))[-MAX_FAILURE:])
    if isinstance(error, ladder.OutOfMemory):
        failure = Failure("memory", str(error), error.step)
    elif isinstance(error, click.ClickException):
        failure = Failure("user", error.message)
    failure.time, failure.rank = time.time(), ranks.rank()
    os.write(int(os.environ[FAILURE]), json.dumps(asdict(failure)).encode())
    if failure.kind == "crash" and not ranks.is_first():
        traceback.print_exception(error)


def read_failure(pipe: int) -> Failure | None:
    """Return why a rank that has ended failed, if it said so; closes the pipe."""
    try:
        told = os.read(pipe, 1 << 16)
    except BlockingIOError:
        told = b""
    os.close(pipe)
    return Failure(**json.loads(told)) if told else None


def failure_seen(name: str, code: int, log: Path) -> Failure:
    """Return the failure of a rank that told none: its exit code, with the end of its `log` if it has one.

    A message of the command line, as of a stage that refuses its inputs, is one of the user's own.
    """
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = [place for place, line in enumerate(lines) if line.startswith("Error: ")]
    if code == 1 and said:
        return Failure("user", f"{name}: " + "\n".join(lines[said[-1] :]).removeprefix("Error: "))
    return Failure("ended", "\n".join([f"{name} {how}", *lines[-LAST_LINES:]]))


def is_partners(failure: Failure) -> bool:
    """Say whether a rank failed because a partner was gone."""
    return failure.kind == "crash" and any(text in failure.text for text in PARTNER_GONE)


def cause(failures: Sequence[Failure]) -> Failure:
    """Return the first failure of a rank's own: one that was told, else one that was seen, else what is left."""

    def order(failure: Failure) -> tuple[bool, bool, float]:
        return is_partners(failure), failure.kind == "ended", failure.time

    return min(failures, key=order)


def raise_failure(failure: Failure, *, has_checkpoint: bool) -> None:
    """Raise what ended the ranks: `UserError`, `ladder.OutOfMemory`, or `SystemExit` after the traceback."""
    if failure.kind == "memory":
        raise ladder.OutOfMemory(failure.step, failure.text)
    if failure.kind == "user":
        raise UserError(failure.text)
    if failure.kind == "ended":
        how, *lines = failure.text.split("\n")
        again = "All ranks were ended. Run the same command again"
        again += ": it goes on from the last checkpoint" if has_checkpoint else ""
        raise UserError("\n".join([f"{how}. {again}", *lines]))
    click.echo(f"rank {failure.rank} failed:\n{failure.text}", err=True)
    raise SystemExit(1)
