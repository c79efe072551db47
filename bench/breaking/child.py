"""A call in a forked process, with what it said, took and left: the modules that it needs are loaded once, before."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from stages.lib.errors import UserError

WALL_SECONDS = 120


@dataclass
class Outcome:
    """How a call ended: "fine", "refused" with a message, or "broken"; its processor seconds and memory in MB."""

    how: str
    said: str
    seconds: float
    megabytes: float

    @property
    def last(self) -> str:
        """Return the last line that was said, to 200 characters."""
        return (self.said.strip().splitlines() or [""])[-1][:200]


def call_apart(call: Callable[[], object]) -> Outcome:
    """Return how `call` ends in a process of its own, those that it starts counted in."""
    with tempfile.TemporaryFile() as output:
        number = os.fork()
        if number == 0:
            work(call, output.fileno())
        until = time.monotonic() + WALL_SECONDS
        found, status, usage = os.wait4(number, os.WNOHANG)
        while not found:
            if time.monotonic() > until:
                os.killpg(number, signal.SIGKILL)
                os.wait4(number, 0)
                return Outcome("broken", f"took more than {WALL_SECONDS} s", float(WALL_SECONDS), 0.0)
            time.sleep(0.02)
            found, status, usage = os.wait4(number, os.WNOHANG)
        output.seek(0)
        said = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    how = {0: "fine", 1: "refused"}.get(code, "broken")
    if "Traceback (most recent call last)" in said or (code == 1 and "Error: " not in said):
        how = "broken"
    return Outcome(how, f"{code}: {said[-2000:]}", usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def work(call: Callable[[], object], output: int) -> None:
    """Call, in the child, and end it: 0, 1 after a `UserError`, or 70 after any other."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 70
    try:
        call()
        code = 0
    except UserError as error:
        print(f"Error: {error.message}")
        code = 1
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 70
    except BaseException:  # whatever it is, it is what this looks for
        traceback.print_exc()
    with contextlib.suppress(ValueError, OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
