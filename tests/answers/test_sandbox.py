"""Programs as answers: right ones pass, wrong ones do not, and no hostile one gets anything or leaves anything."""

import contextlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stages.lib.answers import sandbox, sandbox_inside
from stages.lib.answers.formats import THINK, XML, Answer
from stages.lib.answers.grade import grade, mark
from stages.lib.data.problem import PROGRAM_ALONE, parts_of, problem_of
from stages.lib.data.shapes import Unusable
from stages.lib.errors import UserError
from stages.lib.rewards.any_format import python_tests
from stages.lib.rewards.xml import correctness
from tests.support.hostile_programs import hostile_programs

DOUBLE = "def f(x):\n    return 2 * x"
RIGHT = [
    ("assert f(21) == 42", DOUBLE),
    ("assert f(21) == 42", f"```python\n{DOUBLE}\n```"),
    ("assert f(21) == 42", f"The function doubles.\n```py\n{DOUBLE}\n```\nThat is all."),
    ('["assert f(1) == 2", "assert f(-1) == -2"]', DOUBLE),
    ("assert sum(10, 15) == 25", "def sum(a, b):\n    return a + b"),
    ("assert f([3, 1, 2]) == [1, 2, 3]", "import heapq\ndef f(x):\n    return heapq.nsmallest(9, x)"),
    ("assert f('aab') == {'a': 2, 'b': 1}", "from collections import Counter\nf = Counter"),
    ("assert f(3) == (0, 1, 2) and f(0) == ()", "def f(n):\n    return tuple(range(n))"),
    ("assert list(f(3)) == [0, 1, 2]", "def f(n):\n    yield from range(n)"),
    ("assert f({1, 2}, b=frozenset({3})) == {1, 2, 3}", "def f(a, b):\n    return a | b"),
    ("import math\nassert math.isclose(f(2), 2 ** 0.5)", "import math\nf = math.sqrt"),
    ("assert f() == (None, 1.5, 1j, b'x', {(1, 2): [3]})", "def f():\n    return None, 1.5, 1j, b'x', {(1, 2): [3]}"),
    ("assert f(9) == 10 ** 9000", "def f(n):\n    return 10 ** (n * 1000)"),
    ("assert f(float('inf')) == float('-inf')", "def f(x):\n    return -x"),
    ("try:\n    f(1)\n    assert 0\nexcept ValueError:\n    pass", "def f(x):\n    raise ValueError(x)"),
    ("from solution import add\ndef test_add():\n    assert add(1, 2) == 3", "def add(a, b):\n    return a + b"),
    ("def check(candidate):\n    assert candidate(1) == 2", f"def _help(x):\n    return x\n{DOUBLE}"),
    ("def check(g):\n    assert g(1) == 2\ncheck(f)", DOUBLE),
    ("assert f(1) == 2", f"{DOUBLE}\nif __name__ == '__main__':\n    print(input())"),
    ("assert f(1) == 2", f"print('hello ' * 100_000)\n{DOUBLE}"),
    ("assert f('é\\ud800') == 'É\\ud800'", "def f(s):\n    return s.upper()"),
]  # fmt: skip
WRONG = [
    ("assert f(21) == 43", DOUBLE),
    ('["assert f(1) == 2", "assert f(-1) == 2"]', DOUBLE),
    ("assert f(1) == 2", f"```python\n{DOUBLE}\n```\nor\n```python\n{DOUBLE}\n```"),
    ("assert f(1) == 2", "assert f(1) == 2"),
    ("assert f(1) == 2", "Nothing."),
    ("assert abs(f(2) - 4) < 1", "def f(x):\n    return 99\ndef abs(x):\n    return 0"),
    ("assert isinstance(f(2), list)", "def f(x):\n    return 1\ndef isinstance(a, b):\n    return True"),
    ("x = [3, 1]\nassert f(x) == sorted(x)", "def f(x):\n    x.clear()\n    return []"),
    ("def test_f():\n    assert f(1) == 3", DOUBLE),
    ("def check(candidate):\n    assert candidate(1) == 3", DOUBLE),
    ("if False:\n    assert f(1) == 2", DOUBLE),
    ("try:\n    assert f(1) == 2\nexcept:\n    pass", "def f(x):\n    import os\n    os._exit(0)"),
    ("try:\n    assert f(1) == 2\nexcept Exception:\n    pass", "def f(x):\n    raise SystemExit"),
]  # fmt: skip


@pytest.mark.parametrize(("tests", "program"), RIGHT)
def test_a_program_that_passes_its_tests_is_right(tests, program):
    assert grade("python", tests, program) == 1.0


@pytest.mark.parametrize(("tests", "program"), WRONG)
def test_a_program_that_fails_a_test_is_wrong(tests, program):
    assert grade("python", tests, program) == 0.0


def test_rewards_and_evaluation_say_the_same_of_a_program():
    for program, worth in ((DOUBLE, 1.0), ("def f(x): return x", 0.0)):
        for answer_format in (XML, THINK):
            completion = answer_format.write(Answer("so", program))
            assert python_tests([completion], ["assert f(1) == 2"], format=answer_format) == [worth]
            assert mark(answer_format, completion, "assert f(1) == 2", "python") == {
                "well_formed": True, "given": program, "right": worth == 1.0,
            }  # fmt: skip
        completion = XML.write(Answer("so", program))
        assert correctness([completion], ["assert f(1) == 2"], ["python"]) == [2.0 * worth]
    assert python_tests([DOUBLE], ["assert f(1) == 2"], format=XML) == [0.0]  # not well formed
    assert python_tests([XML.write(Answer("so", "42"))], ["42"], ["number"], format=XML) == [1.0]


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        ("assert f(1) == 2", ""),
        ("assert f(1) ==", "they are not Python: "),
        ("f(1)", "they hold no assert"),
        (
            "import numpy as np\nassert f(1) == np.ones(1)",
            "they import numpy, and the sandbox has Python's own library",
        ),
        ("def test_f(tmp_path):\n    assert f(1)", "test_f takes arguments that nothing gives it"),
        ("def f(x):\n    return x\nassert f(1) == 1", "they call no function of a program"),
    ],
)
def test_tests_that_the_sandbox_can_not_run_are_named(tests, why):
    assert sandbox.why_unusable(tests).startswith(why)
    assert bool(sandbox.why_unusable(tests)) is bool(why)


@pytest.mark.parametrize(
    ("solution", "parts"),
    [
        (DOUBLE, (PROGRAM_ALONE, DOUBLE)),
        (f"Twice.\n```python\n{DOUBLE}\n```", ("Twice.", f"```python\n{DOUBLE}\n```")),
        (f"```python\n{DOUBLE}\n```", (PROGRAM_ALONE, f"```python\n{DOUBLE}\n```")),
        ("", ("", "")),
    ],
)
def test_a_solution_is_taught_as_thought_and_program(solution, parts):
    assert parts_of(solution) == parts


def test_a_row_with_tests_is_read_and_one_without_is_named():
    tests = ["assert f(1) == 2", "assert f(2) == 4"]
    read = problem_of("Double x: f(x).", tests, DOUBLE, "plain", "python")
    assert read == ("Double x: f(x).", '["assert f(1) == 2", "assert f(2) == 4"]', DOUBLE)
    with pytest.raises(Unusable, match="they hold no assert: 'f'"):
        problem_of("Double x: f(x).", "f", DOUBLE, "plain", "python")


def test_a_machine_without_namespaces_is_refused_with_the_remedy_and_runs_nothing(monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    monkeypatch.setattr(sandbox_inside, "__name__", "stages.lib.answers.no_such_module")
    with pytest.raises(UserError, match=r"gives no sandbox to run programs in \(.*no_such_module.*SANDBOX=1"):
        sandbox.passes_tests("assert f(1) == 2", f"open({str(seen)!r}, 'w')\n{DOUBLE}")
    assert not seen.exists()


def processes_seen() -> list[str]:
    """Give the sandboxes' outer processes that this process started and that still run, with their parent's number."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if sandbox_inside.__name__ in (folder / "cmdline").read_text():
                found.append((folder / "stat").read_text())
    return found


@pytest.mark.slow
def test_two_hundred_hostile_programs_get_nothing_and_leave_nothing(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    canary.write_text("here")
    monkeypatch.setenv("HOSTILE_SECRET", "42")
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(8) as pool:
        listening.settimeout(0)
        programs = hostile_programs(str(tmp_path), str(canary), listening.getsockname()[1])
        assert len(set(programs)) >= 200
        answers = json.dumps(["assert f(6) == 42"])
        honest = programs[0].partition("FOLDER, CANARY")[0] + "def f(x):\n    return 7 * x"
        assert grade("python", answers, honest) == 1.0  # what stands before each attack runs

        def timed(program: str) -> tuple[float, float]:
            start = time.monotonic()
            return grade("python", answers, program), time.monotonic() - start

        graded = list(pool.map(timed, programs))
        with pytest.raises(BlockingIOError):
            listening.accept()
    assert [program for program, (worth, _) in zip(programs, graded, strict=True) if worth != 0.0] == []
    assert max(seconds for _, seconds in graded) < 3 * sandbox.WALL_SECONDS
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]
    assert canary.read_text() == "here"
    assert [line for line in processes_seen() if line.split()[3] == str(os.getpid())] == []
