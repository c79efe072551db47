"""Functions in processes of their own: with bounds, for work that foreign bytes decide, or to share or shield work.

None of them outlives the process that started it.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # here, since nothing may be loaded between fork and exec
# Runs the program that follows its parent's number, as `python PROGRAM ARGUMENTS` does, and ends with that parent.
END_WITH_PARENT = """
import os, runpy, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
sys.argv = sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name=__name__)
"""
WAIT_FACTOR = 10.0  # of the wall clock over processor time, on a machine with other work


class TooMuch(Exception):
    """The function took more than its bound; the message says of what."""


def end_with_parent() -> None:
    """Have Linux end this process when the thread that started it is gone, also by KILL."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def python_command(program: Path, *arguments: str) -> list[str]:
    """Return the command that runs a Python program and ends with this process, or with the thread that starts it."""
    return [sys.executable, "-c", END_WITH_PARENT, str(os.getpid()), str(program), *arguments]


def process_pool(processes: int, module: str = "") -> ProcessPoolExecutor:
    """Return a pool of new processes, which import `module` first and end with this one, however it ends.

    Left to itself, a process of a pool whose owner was killed waits for work for ever: it holds both ends of its queue.
    """
    return ProcessPoolExecutor(processes, get_context("spawn"), begin, (os.getpid(), module))


def begin(parent: int, module: str) -> None:
    """Begin a process of a pool."""
    end_with_parent()
    if os.getppid() != parent:  # it ended before
        os._exit(1)
    if module:
        importlib.import_module(module)


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
