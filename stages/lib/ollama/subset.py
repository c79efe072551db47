"""The subset of Go templates that this package renders by itself, without the helper."""

import re
from typing import Any

from stages.lib.ollama.derive import Conversation

ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|[()=,]|[^\s()=,:]+)')
ESCAPE = re.compile(r'\\(U[0-9a-f]{8}|u[0-9a-f]{4}|["\\nt])')


class NotInSubset(ValueError):
    """The template holds something that the rules here do not cover."""


def collate(conversation: Conversation) -> tuple[bytes, list[dict[str, bytes]]]:
    """Give what Ollama hands to a template: .System, and .Messages with neighbours of one role joined."""
    messages: list[dict[str, bytes]] = []
    for message in conversation:
        role, content = message["role"].encode(), message["content"].encode()
        if messages and messages[-1]["Role"] == role:
            messages[-1]["Content"] += b"\n\n" + content
        else:
            messages.append({"Role": role, "Content": content})
    system = [message["content"].encode() for message in conversation if message["role"] == "system"]
    return b"\n\n".join(system), messages


def parse(template: str, defined: dict[str, list[Any]]) -> list[Any]:
    """Give the template's nodes: bytes for text, (kind, expression, body, else-body) for actions."""
    pieces = ACTION.split(template)  # text, action, text, ...
    if any("{{" in text for text in pieces[::2]):
        raise NotInSubset("an action that does not end")
    position = 1

    def body(closers: tuple[str, ...]) -> tuple[list[Any], list[str]]:
        nonlocal position
        nodes: list[Any] = [pieces[position - 1].encode()]
        while position < len(pieces):
            tokens = tokenize(pieces[position])
            position += 2
            if tokens[0] in closers:
                return nodes, tokens
            if tokens[0] in ("if", "range"):
                nodes.append(branch(tokens))
            elif tokens[0] == "define":
                defined[tokens[1]], _ = body(("end",))
            elif tokens[0] in ("else", "end"):
                raise NotInSubset(f"{tokens[0]} without a beginning")
            else:
                nodes.append((tokens[0] if tokens[0] == "template" else "write", tokens, [], []))
            nodes.append(pieces[position - 1].encode())
        if closers:
            raise NotInSubset("an action without its end")
        return nodes, []

    def branch(tokens: list[str]) -> tuple[str, list[str], list[Any], list[Any]]:
        yes, closer = body(("else", "end"))
        if closer == ["end"]:
            return tokens[0], tokens[1:], yes, []
        if closer[1:2] == ["if"]:
            return tokens[0], tokens[1:], yes, [branch(closer[1:])]
        no, _ = body(("end",))
        return tokens[0], tokens[1:], yes, no

    return body(())[0]


def tokenize(action: str) -> list[str]:
    """Cut an action into words, strings and signs."""
    found, position = [], 0
    while action[position:].strip():
        match = TOKEN.match(action, position)
        if match is None or action.startswith("-") or action.endswith("-"):
            raise NotInSubset(action)
        found.append(match[1])
        position = match.end()
    if not found:
        raise NotInSubset("an empty action")
    return found


def string(token: str) -> bytes:
    """Give the value of a Go string literal."""
    known = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
    return ESCAPE.sub(lambda found: known.get(found[1]) or chr(int(found[1][1:], 16)), token[1:-1]).encode()


class Execution:
    """The running of a template; `scopes` are the variables, innermost last."""

    def __init__(self, defined: dict[str, list[Any]]) -> None:
        self.defined = defined

    def run(self, nodes: list[Any], dot: Any, scopes: list[dict[str, Any]]) -> bytes:
        """Give what `nodes` write."""
        written = b""
        scopes = [*scopes, {}]
        for node in nodes:
            if isinstance(node, bytes):
                written += node
                continue
            kind, tokens, yes, no = node
            if kind == "if":
                written += self.run(yes if self.value(tokens, dot, scopes) else no, dot, scopes)
            elif kind == "range":
                index = tokens[0] if tokens[1:2] == [","] else None
                for number, message in enumerate(self.value(tokens[4:] if index else tokens, dot, scopes)):
                    written += self.run(yes, message, [*scopes, {index: number} if index else {}])
            elif kind == "template":
                if tokens[1] not in self.defined:
                    raise NotInSubset(f"the template {tokens[1]}, which is not defined")
                argument = self.value(tokens[2:], dot, scopes)
                written += self.run(self.defined[tokens[1]], argument, [{"$": argument}])
            elif tokens[1:2] == [":="]:
                scopes[-1][tokens[0]] = self.value(tokens[2:], dot, scopes)
            elif tokens[1:2] == ["="]:
                scope_of(tokens[0], scopes)[tokens[0]] = self.value(tokens[2:], dot, scopes)
            else:
                value = self.value(tokens, dot, scopes)
                if not isinstance(value, bytes):
                    raise NotInSubset(f"writing a {type(value).__name__}")
                written += value
        return written

    def value(self, tokens: list[str], dot: Any, scopes: list[dict[str, Any]]) -> Any:
        """Give the value of an expression."""
        if not tokens:
            raise NotInSubset("an expression without words")
        operands: list[list[str]] = []
        depth = 0
        for token in tokens:
            if depth:
                operands[-1].append(token)
            else:
                operands.append([token])
            depth += (token == "(") - (token == ")")
        if len(operands) == 1:
            inner = operands[0]
            return self.value(inner[1:-1], dot, scopes) if inner[0] == "(" else atom(inner[0], dot, scopes)
        name = operands[0][0]
        if name == "and":  # Go evaluates no further than the first that is empty
            result: Any = True
            for operand in operands[1:]:
                result = self.value(operand, dot, scopes)
                if not result:
                    break
            return result
        arguments = [self.value(operand, dot, scopes) for operand in operands[1:]]
        if name == "not":
            return not arguments[0]
        if name == "eq":
            return arguments[0] in arguments[1:]
        if name == "ge":
            return arguments[0] >= arguments[1]
        if name == "len":
            return len(arguments[0])
        if name == "slice":
            if not all(0 <= index <= len(arguments[0]) for index in arguments[1:]):
                raise NotInSubset("a slice out of range, which Go refuses")
            return arguments[0][slice(*arguments[1:])] if arguments[2:] else arguments[0][arguments[1] :]
        if name == "printf" and arguments[0] == b"%.1s":
            return arguments[1].decode(errors="surrogateescape")[:1].encode(errors="surrogateescape")
        raise NotInSubset(f"{name} in {' '.join(tokens)}")


def atom(token: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    """Give the value of one word: a string, a number, a truth, a variable or a field."""
    if token.startswith('"'):
        return string(token)
    if token.isdecimal():
        return int(token)
    if token in ("true", "false"):
        return token == "true"
    name, _, field = token.partition(".")
    if name and not name.startswith("$"):
        raise NotInSubset(token)
    value = scope_of(name, scopes)[name] if name else dot
    if field and (not isinstance(value, dict) or field not in value):
        raise NotInSubset(token)
    return value[field] if field else value


def scope_of(name: str, scopes: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the innermost scope that holds the variable `name`."""
    for scope in reversed(scopes):
        if name in scope:
            return scope
    raise NotInSubset(f"the variable {name}, which is not set")
