"""The messages of a chat request, as the model's chat template takes them."""

from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


def templated(messages: Any) -> list[dict[str, Any]]:
    """Return `messages` with text contents, role "developer" as "system". Raises `ValueError` for what is no message.

    A last message of the assistant begins the answer, which goes on from there.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: expected a list with at least one message; found {str(messages)[:80]}")
    return [templated_message(number, message) for number, message in enumerate(messages)]


def templated_message(number: int, message: Any) -> dict[str, Any]:
    """Return message `number` with its text in one piece. Raises `ValueError`."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(
            f"messages.{number}: expected an object with a role of {', '.join(ROLES)}; found {str(message)[:80]}"
        )
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if content is None and role == "assistant" and calls:
        content = ""
    kept = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name)}
    return {**kept, "role": role, "content": text_of(number, content)}


def text_of(number: int, content: Any) -> str:
    """Return the text of the content of message `number`, whose parts are joined. Raises `ValueError`."""
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"messages.{number}: expected text, all that this model reads; found the part {str(part)[:80]}"
                )
            parts.append(part["text"])
        return "".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"messages.{number}: expected a text as content; found {str(content)[:80]}")
    return content
