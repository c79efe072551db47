"""The reward `math_correct`: math-verify as the comparator, in a worker process that can be killed."""

import functools
import multiprocessing
import re
import signal
import threading
from collections.abc import Sequence
from typing import Any

from stages.lib.answers.formats import Format
from stages.lib.answers.number import canonical_number, given_number
from stages.lib.errors import UserError
from stages.lib.rewards.judge import Completion, texts_of

MATH_TIMEOUT_SECONDS = 0.5
_MATH_MAX_CHARACTERS = 500
_MATH_MAX_MEMORY_BYTES = 4 << 30  # of address space, of which SymPy alone takes a good part
_ANOTHER_MATH_BLOCK = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin\{(?:equation|align|math)")
_NAMES_ITS_VALUE = re.compile(r"[A-Za-z](?:_[0-9A-Za-z]|\([a-z]\))?\s*=[^=]*")


def math_correct(
    completions: Sequence[Completion], answer: Sequence[str], *, format: Format, **columns: Any
) -> list[float]:
    """Pay 1.0 for an answer mathematically equal to the true one (math-verify: LaTeX, fractions, sets), else 0.0.

    Where the true answer is a number, so must the answer be: `17 + 25` is not an answer to 17 + 25. Each answer has
    `MATH_TIMEOUT_SECONDS` in a process of its own; one that takes longer, or takes that process down, is wrong.
    """
    rewards = []
    for text, true in zip(texts_of(completions), answer, strict=True):
        parts = format.read(text)
        rewards.append(1.0 if parts is not None and _is_math_equal(parts.answer, true.strip()) else 0.0)
    return rewards


def _is_math_equal(answer: str, true: str) -> bool:
    number, true_number = given_number(answer), canonical_number(true)
    if answer == true or (number is not None and number == true_number):
        return True
    if len(answer) > _MATH_MAX_CHARACTERS:
        return False
    # A division left to do; and words that change a number, which math-verify passes over.
    if true_number is not None and (number != canonical_number(answer) or "\\text" in answer):
        return False
    answer, true = _without_math_marks(answer), _without_math_marks(true)
    # Two blocks are two answers, of which math-verify would take the one that fits; and it takes the right-hand side
    # of an equation for its value, so that 43 = 42 would be worth 42.
    if _ANOTHER_MATH_BLOCK.search(answer):
        return False
    if "=" in answer and "=" not in true and not _NAMES_ITS_VALUE.fullmatch(answer):
        return False
    return _MATH_WORKER.ask(true, answer, true_number is not None)


def _without_math_marks(text: str) -> str:
    for start, end in (("\\boxed{", "}"), ("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            text = text[len(start) : -len(end)].strip()
    return text


class _MathWorker:
    """One process that compares, forked anew from a server that has math-verify loaded whenever it was killed.

    math-verify's own time limit works in the main thread only and not inside one long step of SymPy or of integer
    arithmetic (10 to the power of 10 to the power of 10), so the limit is the worker's death by SIGALRM.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe: Any = None  # a Connection, while there is a process

    def start(self) -> None:
        """Start the process, which takes a second the first time, unless it runs."""
        if self._pipe is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["math_verify", __name__])
            self._pipe, remote = context.Pipe()
            process = context.Process(target=_serve_math, args=(remote,), name="math_correct", daemon=True)
            process.start()
            remote.close()  # so that the worker's death ends the pipe
            try:
                self._pipe.recv()  # ready
            except EOFError as error:
                self._pipe = None
                raise UserError("[rewards] math_correct could not start its worker; its error is above") from error

    def ask(self, true: str, answer: str, number: bool) -> bool:
        """Say whether `answer` equals `true` and, if `number` asks for that, is one number."""
        with self._lock:
            self.start()
            # The pipe is kept only if the answer came: a late one must not be taken for that of the next question.
            pipe, self._pipe = self._pipe, None
            try:
                pipe.send((true, answer, number))
                equal: bool = pipe.recv()
            except (EOFError, ConnectionError):
                self.start()
                return False
            self._pipe = pipe
            return equal


_MATH_WORKER = _MathWorker()


def _serve_math(pipe: Any) -> None:
    """Compare what comes through the pipe until it closes; the worker's main function."""
    import logging
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limit is off
    resource.setrlimit(resource.RLIMIT_AS, (_MATH_MAX_MEMORY_BYTES, _MATH_MAX_MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end closes the pipe
    # LaTeX only: plain expressions math-verify gives to SymPy's parse_expr, which evaluates them as Python.
    read = functools.partial(
        parse, extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    verify(read("$1$"), read("$\\frac{2}{2}$"), timeout_seconds=None)  # loads the parser
    pipe.send(True)
    while True:
        try:
            true, answer, number = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, MATH_TIMEOUT_SECONDS)
        given = read(f"${answer}$")
        equal = len(given) > 0 and (not number or getattr(given[0], "is_Number", False))  # a matrix has no such thing
        equal = equal and verify(read(f"${true}$"), given, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(equal)
