"""The shapes that a question or an answer has in people's columns: a conversation, a text with a marked answer."""

import json
import re
from collections.abc import Sequence
from typing import Any

# Who speaks, by the names that OpenAI's messages, ShareGPT's conversations and their kin have.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
ANSWER_IS = re.compile(r".*\banswer(?:\s+is\s*:?|\s*:)\s*(.+?)\s*\.?", re.IGNORECASE)
BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{]))")


class Unusable(ValueError):
    """A row that can't be in a set, with the reason that it is counted under."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(found)
        self.reason = reason


def as_list(columns: str | Sequence[str]) -> list[str]:
    """Return the columns that a key of a source names: one, several, or none."""
    return [columns] if isinstance(columns, str) and columns else list(columns)


def joined(parts: Sequence[Any]) -> str:
    """Return a question that stands in several columns as one text, a line each; what is empty is left out."""
    texts = (str(part).strip() for part in parts if isinstance(part, str | int | float))
    return "\n".join(text for text in texts if text)


def turns_of(value: Any) -> list[tuple[str, str]] | None:
    """Return (role, text) of each message of a conversation, also of one written as JSON; None for another value."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return None
    turns = []
    for each in value:
        role, content = each.get("role", each.get("from")), each.get("content", each.get("value"))
        if isinstance(content, list):  # parts: of these the texts
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "\n".join(text for text in texts if isinstance(text, str))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        turns.append((ROLES.get(role.lower(), role.lower()), content.strip()))
    return turns


def question_of(value: Any) -> str:
    """Return the question in a column's value: a text, or what the user says in a conversation of one question.

    Raises `Unusable` for another value, and for a conversation of several questions.
    """
    turns = turns_of(value)
    if turns is None:
        if isinstance(value, str) and value.strip():
            return value.strip()
        found = "" if value is None or value == "" else f", but {shown(value)}"
        raise Unusable("no question", f"the question's column holds no text{found}")
    asked = [text for role, text in turns if role == "user"]
    answered = [text for role, text in turns if role == "assistant"]
    if len(asked) != 1 or len(answered) > 1:
        raise Unusable(
            "several turns",
            f"a conversation of {len(asked)} questions and {len(answered)} replies; expected one question",
        )
    if not asked[0]:
        raise Unusable("no question", "the user says nothing in this conversation")
    return asked[0]


def reply_of(value: Any) -> str | None:
    """Return what the assistant says last in a conversation, "" if nothing; None for a value that is none."""
    turns = turns_of(value)
    if turns is None:
        return None
    return next((text for role, text in reversed(turns) if role == "assistant"), "")


def marked_answer(text: str) -> tuple[str, str] | None:
    """Return the working in a text and the answer that it marks; None without a mark.

    Marks are, in this order: the last `\\boxed`, what follows the last `####`, `the answer is` or `Answer:` in the last
    line. The working is the text, less what `####` begins.
    """
    if boxed := last_boxed(text):
        return text, boxed
    before, mark, after = text.rpartition("####")
    if mark and after.strip():
        return before.strip(), after.strip()
    lines = text.rstrip().rpartition("\n")
    match = ANSWER_IS.fullmatch(lines[2].strip())
    return (text, match[1].strip(" *")) if match and match[1].strip(" *") else None


def last_boxed(text: str) -> str:
    r"""Return what the last `\boxed{...}` of a text holds, or the one character after `\boxed`; "" without one."""
    for match in reversed(list(BOXED.finditer(text))):
        if not match[0].endswith("{"):
            return text[match.end()]
        depth = 1
        for place in range(match.end(), len(text)):
            if text[place] in "{}" and text[place - 1] != "\\":
                depth += 1 if text[place] == "{" else -1
            if not depth:
                return text[match.end() : place].strip()
    return ""


def shown(value: Any) -> str:
    """Return what a value is, for a message: its kind and its beginning."""
    kind = {list: "a list", dict: "a struct", bool: "true or false"}.get(type(value), f"a {type(value).__name__}")
    text = repr(value)
    return f"{kind}, {text if len(text) <= 80 else text[:80] + '...'}"
