"""llama-cpp-python's binding of llama.h: loaded, its log kept, its threads measured."""

import contextlib
import functools
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL_BYTES = 50_000_000
TRIAL_SECONDS = 0.3  # for each number of threads
SLOWER, AS_FAST = 1.2, 1.05  # times the fastest: a trial that ends the search, and one that is as good
CGROUP = Path("/sys/fs/cgroup")
LOG: deque[str] = deque(maxlen=200)  # llama.cpp's last words, for the message when it fails


def llama_library() -> Any:
    """Return llama_cpp, its log going to `LOG` instead of the terminal."""
    import llama_cpp

    llama_cpp.llama_log_set(log_callback(), None)  # again each time: importing llama_cpp's modules sets its own
    return llama_cpp


@functools.cache
def log_callback() -> Any:
    """Return the function that llama.cpp logs to; the cache keeps it alive as long as the process."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, data: Any) -> None:
        LOG.append(text.decode(errors="replace"))

    llama_cpp.llama_backend_init()
    return keep


def llama_said(lines: int = 8) -> str:
    """Return the last lines that llama.cpp logged, indented."""
    return "\n".join("  " + line for line in "".join(LOG).strip().splitlines()[-lines:])


def threads_for(path: Path) -> int:
    """Return the most threads for the file `path`: as many as run at once, 1 for a small model.

    llama.cpp's threads spin while they wait for each other, a hundred times a token. One thread too many costs more
    than it brings, as in a container that sees all processors and may use a few.
    """
    return 1 if path.stat().st_size <= SMALL_BYTES else processors_at_once()


def processors_at_once() -> int:
    """Return the number of processors that this process may use at once, by its affinity and its container's quota."""
    return max(1, min(len(os.sched_getaffinity(0)), int(processor_quota())))


def fastest_threads(most: int, decode: Callable[[int], object]) -> int:
    """Return the number of threads with which `decode`, called with it, takes the least time now.

    Tried are `most`, its half, its quarter and so on, until fewer are slower. A number that other programs, or a
    second thread of the same core, slow down is seen here and by no count. Of numbers that are as fast, the lowest.
    """
    if most == 1:
        return 1
    decode(most)  # reads the weights from the disk
    seconds: dict[int, float] = {}
    count = most
    while count and (not seconds or seconds[min(seconds)] <= SLOWER * min(seconds.values())):
        start, decodes = time.monotonic(), 0
        while (passed := time.monotonic() - start) < TRIAL_SECONDS:
            decode(count)
            decodes += 1
        seconds[count] = passed / decodes
        count //= 2
    return min(count for count, each in seconds.items() if each <= AS_FAST * min(seconds.values()))


def processor_quota() -> float:
    """Return the processors that this container may use, in processor time; `sys.maxsize` without a limit.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files, and for version 1
    https://docs.kernel.org/scheduler/sched-bwc.html.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError):
            quota, period = "\n".join((CGROUP / name).read_text() for name in names).split()
            return sys.maxsize if quota in ("max", "-1") else int(quota) / int(period)
    return sys.maxsize
