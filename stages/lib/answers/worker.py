"""Processes that grade answers, by math-verify and by the scorers of reasoning-gym, and die when that takes long."""

import contextlib
import functools
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import spawn
from typing import Any

from stages.lib.errors import UserError

TIMEOUT_SECONDS = 0.5  # of processor time, so that other work of the machine does not count
_WALL_SECONDS = 60.0  # for a process that waits instead of working
_RESTART_SECONDS = 30.0  # for a server that was killed
_STARTING = threading.Lock()  # of all workers: they start by the same function of multiprocessing
_MAX_MEMORY_BYTES = 4 << 30  # of address space, of which SymPy alone takes a good part


class Worker:
    """A process that grades; after it was killed, a new one is forked from a server with math-verify loaded.

    `load` is called in the process and returns the function that grades. math-verify's own time limit works in the main
    thread only and not inside one long step of SymPy or of integer arithmetic (10 to the power of 10 to the power of
    10), so the limit is the worker's death by SIGPROF or SIGALRM.
    """

    def __init__(self, name: str, load: Callable[[], Callable[[str, str], float]]) -> None:
        self.name, self.load = name, load
        self._lock = threading.Lock()
        self._pipe: Any = None
        self.pid: int | None = None  # of the process that grades now; multiprocessing forgets it with its server

    def start(self) -> None:
        """Start the process, which takes a second the first time, unless it runs."""
        deadline = time.monotonic() + _RESTART_SECONDS
        while self._pipe is None:
            try:
                self._fork()
            except (
                EOFError,
                ConnectionError,
            ):  # the server was killed; once it is gone, a new one is started
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _fork(self) -> None:
        """Let the server fork a process, and wait until it is ready. Raises `UserError` if it ends before that."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["math_verify", __name__])
        pipe, remote = context.Pipe()
        process = context.Process(target=_serve, args=(remote, self.load), name=self.name, daemon=True)
        with _no_main_module():
            process.start()
        remote.close()  # so that the worker's death ends the pipe
        try:
            pipe.recv()  # ready
        except (EOFError, ConnectionError) as error:
            process.join()
            ended = f"it was ended by {signal.Signals(-code).name}" if (code := process.exitcode or 0) < 0 else ""
            raise UserError(
                f"the process that grades ({self.name}) could not start: {ended or 'its error is above'}"
            ) from error
        self._pipe, self.pid = pipe, process.pid

    def ask(self, true: str, given: str) -> float:
        """Return the grade of `given`, from 0 to 1, where `true` is the right answer; 0.0 if that takes too long."""
        with self._lock:
            self.start()
            # The pipe is kept only if the answer came: a late one must not answer the next question.
            pipe, self._pipe = self._pipe, None
            try:
                pipe.send((true, given))
                grade: float = pipe.recv()
            except (EOFError, ConnectionError):
                self.start()
                return 0.0
            self._pipe = pipe
            return grade


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep the main module from the worker, which does not need it and would run a script's lines again."""
    with _STARTING:
        told = spawn.get_preparation_data
        spawn.get_preparation_data = lambda name: {k: v for k, v in told(name).items() if not k.startswith("init_main")}
        try:
            yield
        finally:
            spawn.get_preparation_data = told


def _serve(pipe: Any, load: Callable[[], Callable[[str, str], float]]) -> None:
    """Answer the questions from the pipe until it closes; the worker's main function."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end closes the pipe
    grade = load()
    pipe.send(True)
    while True:
        try:
            true, given = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, TIMEOUT_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, _WALL_SECONDS)
        graded = grade(true, given)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(graded)


def _load_math() -> Callable[[str, str], float]:
    """Return the comparison of two LaTeX texts by math-verify."""
    import logging

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limit is off
    # LaTeX only: math-verify gives plain expressions to SymPy's parse_expr, which evaluates them as Python.
    # Units stay: "2m" is twice m.
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    read: Callable[..., list[Any]] = functools.partial(
        parse,
        extraction_config=[LatexExtractionConfig(boxed_match_priority=-1, normalization_config=spelling)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    verify(read("$1$"), read("$\\frac{2}{2}$"), timeout_seconds=None)  # loads the parser
    return lambda true, given: float(verify(read(f"${true}$"), read(f"${given}$"), timeout_seconds=None))


WORKER = Worker("math", _load_math)
