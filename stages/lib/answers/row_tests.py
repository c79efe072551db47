"""The tests of a row, as Python: which functions they ask for, and whether a program passes them. For the sandbox."""

import ast
import builtins
import sys
import types
from collections.abc import Iterator
from typing import Any

from stages.lib.answers.sandbox_calls import Program


def passes(tests: list[str], program: Program) -> bool:
    """Return whether the tests, run in order in one namespace, end without an exception and called the program."""
    try:
        if program.read()[0]:
            return False
        tree = ast.parse("\n".join(tests))
        solution = types.ModuleType("solution")
        solution.__getattr__, solution.__all__ = program.function, []  # type: ignore[attr-defined, method-assign]
        sys.modules["solution"] = solution
        namespace: dict[str, Any] = {"__name__": "tests"}
        namespace |= {name: program.function(name) for name in functions_asked(tree)}
        exec(compile(tree, "<tests>", "exec"), namespace)  # noqa: S102, in the sandbox
        for name in functions_to_call(tree):
            namespace[name](*([program.function("")] if name == "check" else []))
    except BaseException:  # of a test, which may be anybody's: whatever ends it, SystemExit too, it was not passed
        return False
    return program.answered > 0 and not program.broken


def functions_asked(tree: ast.Module) -> list[str]:
    """Return the names that tests use and do not bind: the functions that a program has to define.

    A built-in's name is the program's only where the tests use no other (`assert sum(10, 15) == 6`); else a program
    could replace the `abs` or `isinstance` that it is tested with.
    """
    bound = set(names_bound(tree))
    used: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
            used[node.id] = None
    known = set(dir(builtins)) | {"__name__"}
    if asked := [name for name in used if name not in known]:
        return asked
    if functions_to_call(tree) or "solution" in modules_of(tree):
        return []
    asserted = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    called = [test.left for test in asserted if isinstance(test, ast.Compare) and isinstance(test.left, ast.Call)]
    names = [call.func.id for call in called if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
    return [name for name in names if name in used][:1]


def names_bound(tree: ast.Module) -> Iterator[str]:
    """Yield the names that tests bind, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def functions_to_call(tree: ast.Module) -> list[str]:
    """Return the functions of tests that are to be called: `test_...()`, and `check(candidate)` if nothing calls it."""
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in called]
    return [each.name for each in defined if each.name.startswith("test_") or each.name == "check"]


def modules_of(tree: ast.Module) -> set[str]:
    """Return the top-level modules that tests import."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def why_unusable(tests: list[str]) -> str:
    """Return why tests can't be run in the sandbox, "" if they can. Nothing of them is run."""
    try:
        tree = ast.parse("\n".join(tests))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"they are not Python: {error}"
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        return "they hold no assert"
    if others := modules_of(tree) - sys.stdlib_module_names - {"solution"}:
        return f"they import {', '.join(sorted(others))}, and the sandbox has Python's own library alone"
    called = functions_to_call(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in called and len(node.args.args) != (node.name == "check"):
            return f"{node.name} takes arguments that nothing gives it"
    if not (functions_asked(tree) or "check" in called or "solution" in modules_of(tree)):
        return "they call no function of a program"
    return ""
