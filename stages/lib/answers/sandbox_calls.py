"""Calls from the tester to the program, through two pipes, with plain values alone. For `sandbox_inside.py`."""

import builtins
import json
import os
import types
from collections.abc import Callable
from typing import Any

REPLY_BYTES = 8 << 20


class Broken(BaseException):
    """The program's process has ended or does not keep to the protocol; no `except Exception` of a test stops it."""


def serve_program() -> None:
    """Run the program from standard input, then answer each call from the pipe, to the end of this process."""
    with open(0, encoding="utf-8", closefd=False) as file:
        source = file.read()
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(source, "<program>", "exec"), namespace)  # noqa: S102, in the sandbox
    except BaseException as error:  # of a program that may be anybody's: SystemExit too is its answer
        reply: Any = {"raised": type(error).__name__}
    else:
        reply = {"value": None}
    with open(4, encoding="utf-8") as calls, open(5, "w", encoding="utf-8") as replies:
        while True:
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
            line = calls.readline()
            if not line:
                os._exit(0)
            try:
                name, arguments, named = json.loads(line)
                function = namespace[name] if name else last_function(namespace)
                value = function(*decode(arguments), **decode(named))
                reply = {"value": encode(value)}
            except BaseException as error:  # as above
                reply = {"raised": type(error).__name__}


def last_function(namespace: dict[str, Any]) -> Callable[..., Any]:
    """Return the function that a program defines last, without those whose names begin with `_`."""
    return [
        value for name, value in namespace.items() if isinstance(value, types.FunctionType) and not name.startswith("_")
    ][-1]


def encode(value: Any) -> Any:
    """Return a plain value as JSON can hold it. Raises `TypeError` for any other value."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return {"str": "".join(value)}
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(each) for each in value]}
    if hasattr(value, "__iter__") and not isinstance(value, type):
        return {"list": [encode(each) for each in value]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    """Return the value that `encode` wrote, of exact built-in types. Raises for what `encode` does not write."""
    if value is None or value is True or value is False:
        return value
    ((kind, held),) = value.items()
    if kind == "str":
        return str(held)
    if kind == "int":
        return int(held, 16)
    if kind == "float":
        return float.fromhex(held)
    if kind == "complex":
        return complex(*map(float.fromhex, held))
    if kind == "bytes":
        return bytes.fromhex(held)
    if kind == "dict":
        return {decode(key): decode(each) for key, each in held}
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "list": list}[kind](decode(each) for each in held)


class Program:
    """The program, called through pipes."""

    def __init__(self, calls: int, replies: int) -> None:
        self.calls, self.replies = calls, replies
        self.answered, self.broken = 0, False

    def read(self) -> tuple[type[Exception] | None, Any]:
        """Return of the next reply the built-in exception that it names, or None, and the value. Raises `Broken`."""
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self.replies, 1 << 16)
            line += part
            if not part or len(line) > REPLY_BYTES or b"\n" in line[:-1]:
                raise Broken
        try:
            reply = json.loads(line)
            if "raised" not in reply:
                return None, decode(reply["value"])
            kind = getattr(builtins, reply["raised"], Exception)
        except Exception as error:  # whatever reading an answer raises that a program made up
            raise Broken from error
        if not (isinstance(kind, type) and issubclass(kind, Exception)):  # the program has asked for its end
            raise Broken
        return kind, None

    def call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return what the program's function `name` returns, as plain values; "" is the function it defines last.

        Raises the built-in exception that the program raised, and `Broken`.
        """
        text = json.dumps([name, encode(list(arguments)), encode(named)]).encode() + b"\n"
        if self.broken:
            raise Broken
        self.broken = True  # unless a reply comes
        while text:
            text = text[os.write(self.calls, text) :]
        raised, value = self.read()
        self.broken = False
        self.answered += 1
        if raised:
            raise raised
        return value

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function that calls the program's function `name`."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **named: self.call(name, arguments, named)
