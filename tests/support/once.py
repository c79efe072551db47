"""What all processes of a test run share: made by the first that asks for it, while the others wait."""

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "TEMPER_TEST_RUN"  # the processes that a run starts inherit it


def run_folder() -> Path:
    """Return the folder of this run; it goes when the process that asked first ends."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="temper-test-")
        atexit.register(shutil.rmtree, os.environ[VARIABLE], ignore_errors=True)
    return Path(os.environ[VARIABLE])


def once_a_run(make: Callable[[], Path]) -> Callable[[], Path]:
    """Let one process of the run call `make`, and all of them get the path that it returned."""

    @functools.cache
    def get() -> Path:
        note = run_folder() / f"{make.__module__}.{make.__name__}"
        with note.with_name(f"{note.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not note.is_file():
                note.write_text(str(make()))
            return Path(note.read_text())

    return get
