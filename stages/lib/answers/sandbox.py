"""Programs as answers: a row's tests are run against the program in a sandbox of Linux's own parts.

The sandbox (`sandbox_inside.py`) has no network, no file of the machine but Python's library, no other process in
sight, and bounds for processor time, memory, processes and output. Where the machine does not give it, nothing is run.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from stages.lib.answers import row_tests, sandbox_inside
from stages.lib.errors import UserError

WALL_SECONDS = 20.0  # for a program that waits; one that works ends sooner, by its processor time
MAX_PROGRAM_CHARACTERS = 1 << 16
_ROOT = Path(__file__).parents[3]
FENCED = re.compile(r"^```[\w+-]*[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
REMEDY = (
    "A machine gives it by unprivileged user namespaces: sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu "
    "24.04), user.max_user_namespaces over 0; in a container: SANDBOX=1"
)


def program_of(text: str) -> str:
    """Return the program in an answer: the one fenced block of Markdown, or the text itself if there is none."""
    blocks = FENCED.findall(text + "\n")
    return blocks[0] if len(blocks) == 1 else text


def tests_of(answer: str) -> list[str]:
    """Return the tests that a row holds: a JSON list of texts, or one text."""
    try:
        several = json.loads(answer) if answer.startswith("[") else None
    except ValueError:
        return [answer]
    return several if several and all(isinstance(each, str) for each in several) else [answer]


@functools.lru_cache(1 << 12)
def passes_tests(answer: str, given: str) -> bool:
    """Return whether the program in `given` passes all tests of the row's `answer`.

    Raises `UserError` where the machine does not give the sandbox.
    """
    program = program_of(given)
    if not program.strip() or len(program) > MAX_PROGRAM_CHARACTERS:
        return False
    inside = sandbox_inside.__name__
    source, tests = _held(program.encode(errors="replace")), _held(json.dumps(tests_of(answer)).encode())
    try:
        process = subprocess.Popen(
            [sys.executable, "-S", "-B", "-c", f"import {inside}; {inside}.main()", str(tests)],
            cwd=_ROOT, env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}, pass_fds=(tests,), start_new_session=True,
            stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with process:
            try:
                verdict, said = process.communicate(timeout=WALL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # and by its end all others
                return False
    finally:
        os.close(source)
        os.close(tests)
    if said != b"ready\n":
        why = said.decode(errors="replace").strip().rpartition("\n")[2] or "it ended at once"
        raise UserError(f"this machine gives no sandbox to run programs in ({why[:200]}). {REMEDY}")
    return verdict == b"1"


def check_sandbox() -> None:
    """Raise `UserError` unless a right program passes and a wrong one does not: nothing is run outside a sandbox."""
    said = [passes_tests("assert f(6) == 42", f"def f(x): return {factor} * x") for factor in (7, 8)]
    if said != [True, False]:
        raise UserError(f"the sandbox for programs judges wrongly: a right and a wrong one give {said}. {REMEDY}")


def why_unusable(answer: str) -> str:
    """Return why a row's tests can't be run in the sandbox, "" if they can."""
    return row_tests.why_unusable(tests_of(answer))


def _held(content: bytes) -> int:
    """Return the descriptor of a file in memory that holds `content`, at its beginning."""
    descriptor = os.memfd_create("temper")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
