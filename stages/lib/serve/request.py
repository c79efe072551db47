"""A request to `make serve`, checked and completed by the Modelfile, as llama-server gets it."""

import json
import math
from typing import Any

from stages.lib.serve.messages import templated
from stages.lib.serve.schema import MAX_DEPTH, MAX_SCHEMA, Chat, Completion, checked
from stages.lib.serve.setting import Setting


class UnknownModel(ValueError):
    """A model that is not served here."""


def parse(body: bytes) -> Any:
    """Return the JSON value in `body`. Raises `ValueError` for what is none, or holds a text that is no Unicode."""
    try:
        value = json.loads(body, parse_constant=finite, parse_float=finite)
    except RecursionError as error:
        raise ValueError(f"expected at most {MAX_DEPTH} brackets in one another") from error
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair raises
    return value


def finite(text: str) -> float:
    """Return the number in `text`. Raises `ValueError` for NaN and infinities, with which nothing can be sampled."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number; found {text}")
    return number


def complete_chat(request: Any, setting: Setting, name: str, takes_tools: bool) -> dict[str, Any]:
    """Return a chat completed by the Modelfile: system prompt, sampling, stops. Raises `ValueError`.

    `name` is the model's; `takes_tools` whether its chat template shows tools to it.
    """
    parameters = checked(request, Chat)
    check_model(parameters, name)
    messages = templated(parameters.get("messages"))
    if "max_completion_tokens" in parameters:  # the name in newer clients
        parameters["max_tokens"] = parameters.pop("max_completion_tokens")
    if parameters.get("tools") and not takes_tools:
        raise ValueError("tools: this model's chat template shows no tools to it; leave them out")
    for number, message in enumerate(messages):
        if not takes_tools and (message["role"] == "tool" or "tool_calls" in message):
            raise ValueError(
                f"messages.{number}: is a call of a tool or its result, and this model's chat template shows no tools "
                f"to it; leave it out"
            )
    if not parameters.get("tools"):
        for unused in ("tools", "tool_choice", "parallel_tool_calls"):
            parameters.pop(unused, None)
    if "top_logprobs" in parameters and not parameters.get("logprobs"):
        raise ValueError("top_logprobs: expected logprobs = true with it")
    check_schemas(parameters)
    stops = parameters.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    parameters["stop"] = [*stops, *(stop for stop in setting.stops if stop not in stops)]
    return {
        **setting.sampling,
        **parameters,
        "messages": setting.with_system(messages),
        "cache_prompt": False,  # else the numbers of an answer depend on the request before it
    }


def complete_text(request: Any, name: str) -> dict[str, Any]:
    """Return a request for the continuation of raw text, which the Modelfile does not touch. Raises `ValueError`."""
    parameters = checked(request, Completion)
    check_model(parameters, name)
    return {**parameters, "cache_prompt": False}


def check_model(parameters: dict[str, Any], name: str) -> None:
    """Raise `UnknownModel` for another model than `name`; a request may leave it out."""
    if parameters.get("model", name) != name:
        raise UnknownModel(f"the model {parameters['model']!r} is not served here; expected {name!r}")


def check_schemas(parameters: dict[str, Any]) -> None:
    """Raise `ValueError` for a response format that llama-server does not know, and schemas too large for it."""
    form = parameters.get("response_format", {"type": "text"})
    if form.get("type") not in ("text", "json_object", "json_schema"):
        raise ValueError(f"response_format.type: expected text, json_object or json_schema; found {str(form)[:80]}")
    if form["type"] == "json_schema":
        schema = form.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise ValueError(f"response_format.json_schema.schema: expected an object; found {str(schema)[:80]}")
    for key in ("response_format", "tools"):
        text = json.dumps(parameters.get(key, ""))
        if len(text) > MAX_SCHEMA:
            raise ValueError(f"{key}: expected at most {MAX_SCHEMA:,} characters; found {len(text):,}")
        if text.count("(") > MAX_DEPTH * 4:
            raise ValueError(f"{key}: expected patterns with at most {MAX_DEPTH * 4} brackets")
