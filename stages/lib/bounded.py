"""A function in a process of its own, with bounds of processor time and memory, for work that foreign bytes decide."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError

ROOT = Path(__file__).parents[2]
WAIT_FACTOR = 10.0  # of the wall clock over processor time, on a machine with other work


class TooMuch(Exception):
    """The function took more than its bound; the message says of what."""


def call_bounded(function: Callable[..., Any], *given: Any, seconds: int, megabytes: int) -> Any:
    """Return what a function of a module of `stages.lib` returns for the arguments `given`, all of them JSON.

    It gets `seconds` of processor time and `megabytes` of memory beyond what Python takes. Raises `UserError` for one
    that it raises, `TooMuch` beyond a bound, and `RuntimeError` with its traceback for any other end.
    """
    module, name = function.__module__, function.__name__
    code = f"from stages.lib.bounded import answer; from {module} import {name}; answer({name})"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    # Arenas of allocators are address space, which is what is bounded.
    environment |= {"PYTHONUTF8": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    bounds = {"seconds": seconds, "megabytes": megabytes, "given": given}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, input=json.dumps(bounds).encode(),
            capture_output=True, check=False, timeout=WAIT_FACTOR * seconds + 30,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TooMuch(f"more than {seconds} s") from error
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise TooMuch(f"more than {seconds} s of processor time")
    try:
        kind, value = json.loads(done.stdout)
    except ValueError:
        kind, value = "", ""
    if kind == "user":
        raise UserError(value)
    said = done.stderr.decode(errors="replace").strip()
    if kind == "memory" or (not kind and (done.returncode == -signal.SIGABRT or "bad_alloc" in said)):
        raise TooMuch(f"more than {megabytes:,} MB of memory")
    if kind != "returned":
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{said}")
    return value


def answer(function: Callable[..., Any]) -> None:
    """Call `function` as standard input asks, and write what came of it: the main function of that process."""
    import resource

    asked = json.load(sys.stdin)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bound = mapped + (asked["megabytes"] << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = ["returned", function(*asked["given"])]
    except UserError as error:
        result = ["user", error.message]
    except MemoryError:
        result = ["memory", ""]
    sys.stdout.write(json.dumps(result))
