"""The OpenAI-compatible server of the finished GGUF, made from llama-cpp-python's."""

import json
import math
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import click

from stages.lib.errors import UserError
from stages.lib.gguf.library import llama_library, threads_for
from stages.lib.gguf.tokens import Vocabulary
from stages.lib.serve.setting import TEMPLATE, Setting, loading_line

HOST, ANY_HOST = "127.0.0.1", "0.0.0.0"
CHAT = "/v1/chat/completions"
MAX_GRAMMAR = 20_000  # characters; llama.cpp crashes on one with 200,000 brackets
PATIENCE_SECONDS = 3  # for the answers in progress when the server has to end


def leave(*_: object) -> None:
    """End this process with exit code 0, and with it a thread that may still write an answer."""
    sys.stdout.flush()
    os._exit(0)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket bound to the port. Raises `UserError` when it is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"--port {port}: {error.strerror} on {host}; expected a free port. Run: make serve PORT={port + 1}"
        ) from error
    return listener


def serve_app(setting: Setting, name: str, listener: socket.socket) -> None:
    """Serve the model as `name` on `listener` until INT or TERM; uvicorn raises the signal again at its end."""
    import uvicorn

    app = application(setting, name)
    listener.listen()
    address = f"http://{HOST}:{listener.getsockname()[1]}/v1"
    click.echo(f"{setting.path.name} is served at {address} as {name!r}, to this machine only. Ctrl-C ends it")
    sys.stdout.flush()
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE_SECONDS)
    uvicorn.Server(settings).run(sockets=[listener])


def application(setting: Setting, name: str) -> Any:
    """Return llama-cpp-python's server of one model, set as in Ollama. Raises `UserError` when it can't be loaded."""
    with loading_line(setting.path):
        from fastapi.middleware.cors import CORSMiddleware
        from llama_cpp.server.app import create_app
        from llama_cpp.server.settings import ModelSettings, ServerSettings
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        llama_library()  # again: the import of its server set llama.cpp's log
        refuse_what_llama_cpp_can_not_take()
        threads = threads_for(setting.path)
        # `model_construct`, because the classes read a setting that is left out from the environment.
        model = ModelSettings.model_construct(
            model=str(setting.path),
            model_alias=name,
            chat_format=TEMPLATE,
            n_ctx=setting.context_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            use_mlock=False,
            logits_all=False,  # else it keeps context x vocabulary logits
            verbose=False,
        )
        server = ServerSettings.model_construct(interrupt_requests=False)  # else a request ends the one before it
        os.environ.pop("CONFIG_FILE", None)  # else it replaces these settings
        app = create_app(server_settings=server, model_settings=[model])
    # No page in a browser may use the model: neither across origins, which the server permits, nor by a host name that
    # points here.
    app.user_middleware = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    app.add_middleware(AsModelfile, setting=setting, vocabulary=Vocabulary(setting.path))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # comes before the others
    return app


def refuse_what_llama_cpp_can_not_take() -> None:
    """Make llama-cpp-python raise for a grammar that llama.cpp refuses, and its server answer with status 400.

    Otherwise it passes on a null pointer and the process crashes: its converter writes such grammars for JSON schemas
    with a pattern. Its server answers 500 to all errors but two.
    """
    import llama_cpp
    from llama_cpp._internals import LlamaSampler
    from llama_cpp.server.errors import RouteErrorHandler

    def add_grammar(self: Any, model: Any, grammar: Any) -> None:
        sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, grammar._grammar.encode(), grammar._root.encode())
        if not sampler:
            raise ValueError("llama.cpp can't take the grammar, given or made from a JSON schema (such as its pattern)")
        llama_cpp.llama_sampler_chain_add(self.sampler, sampler)

    def refused(request: Any, match: re.Match) -> tuple[int, dict[str, Any]]:
        return 400, invalid_request(match.string)

    LlamaSampler.add_grammar = add_grammar
    reasons = "grammar|logprobs is not supported|Tool choice|invalid literal for int"
    RouteErrorHandler.pattern_and_formatters[re.compile(reasons)] = refused


class TooLong(ValueError):
    """A conversation that does not fit into the context."""


class AsModelfile:
    """ASGI middleware that completes a chat request from the Modelfile.

    It answers status 400 to an invalid request and to a conversation longer than the context. The server behind it
    would answer 500 to the first and an empty stream to the second.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], setting: Setting, vocabulary: Vocabulary) -> None:
        self.app, self.setting, self.vocabulary = app, setting, vocabulary

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Pass a request on, the body of a chat completed."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] != CHAT or scope["method"] != "POST":
            await answer(self.app, scope, receive, send)
            return
        if not dict(scope["headers"]).get(b"content-type", b"").startswith(b"application/json"):
            # Else the server takes the body for text. And a page in a browser can't send this type without permission.
            await refuse("expected the header Content-Type: application/json")(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            request = complete_request(body, self.setting)
            self.check_room(request["messages"])
            body = json.dumps(request).encode()
        except (ValueError, RecursionError) as error:  # the second: json's, for deeply nested lists
            code = "context_length_exceeded" if isinstance(error, TooLong) else None  # OpenAI's word
            await refuse(str(error), code)(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            return rest.pop() if rest else await receive()

        await answer(self.app, {**scope, "headers": headers}, replay, send)

    def check_room(self, messages: list[dict[str, Any]]) -> None:
        """Raise `TooLong` when `messages` leave no room for an answer, `ValueError` when they can't be rendered."""
        from jinja2 import TemplateError

        try:
            text = self.vocabulary.render(messages)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template can't render these messages: {error}") from error
        tokens = len(self.vocabulary.tokenize(text))
        if tokens >= self.setting.context_tokens:
            raise TooLong(
                f"This model's maximum context length is {self.setting.context_tokens} tokens ([ollama] num_ctx); the "
                f"conversation has {tokens}. Shorten it"
            )


async def answer(app: Callable[..., Awaitable[None]], scope: dict[str, Any], receive: Callable, send: Callable) -> None:
    """Let `app` answer, but send status 200 only with the first content: an error before it becomes status 400.

    llama-cpp-python's server begins a stream before it checks the request.
    """
    starts: list[dict[str, Any]] = []

    async def late(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            starts.append(message)
            return
        if starts and message.get("body"):
            await send(starts.pop())
        if not starts:
            await send(message)

    try:
        await app(scope, receive, late)
        for start in starts:  # an empty answer
            await send(start)
            await send({"type": "http.response.body"})
    except Exception as error:  # bare, or in the exception groups of a stream's tasks
        reason = error
        while isinstance(reason, ExceptionGroup):
            reason = reason.exceptions[0]
        if not starts or not isinstance(reason, ValueError):  # llama-cpp-python's error for an invalid request
            raise
        await refuse(str(reason))(scope, receive, send)


def refuse(message: str, code: str | None = None) -> Callable[..., Awaitable[None]]:
    """Return an ASGI answer with status 400 for OpenAI's clients."""
    from starlette.responses import JSONResponse

    return JSONResponse({"error": invalid_request(message, code)}, status_code=400)


def invalid_request(message: str, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error for an invalid request."""
    return {"message": message, "type": "invalid_request_error", "param": None, "code": code}


def complete_request(body: bytes, setting: Setting) -> dict[str, Any]:
    """Return the request `body`, completed by the Modelfile. Raises `ValueError`, also json's and pydantic's."""
    from llama_cpp.server.types import CreateChatCompletionRequest

    request = json.loads(body, parse_constant=finite, parse_float=finite)
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise ValueError(
            f"expected a JSON object with a list of messages; found {body[:80].decode(errors='replace')!r}"
        )
    parameters = {key: value for key, value in request.items() if value is not None}
    parameters["messages"] = [with_text(message) for message in parameters["messages"]]
    if "max_completion_tokens" in parameters:  # the name in newer clients
        parameters.setdefault("max_tokens", parameters["max_completion_tokens"])
    CreateChatCompletionRequest.model_validate(parameters)
    if parameters.get("repeat_penalty", 1) == 0 or len(parameters.get("grammar", "")) > MAX_GRAMMAR:
        raise ValueError(f"expected a repeat_penalty over 0 and a grammar of at most {MAX_GRAMMAR:,} characters")
    stops = parameters.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    parameters["stop"] = [*stops, *(stop for stop in setting.stops if stop not in stops)]
    return {**setting.sampling, **parameters, "messages": setting.with_system(parameters["messages"])}


def finite(text: str) -> float:
    """Return the number in `text`. Raises `ValueError` for NaN and infinities, with which nothing can be sampled."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number; found {text}")
    return number


def with_text(message: Any) -> Any:
    """Return a message with its text parts joined: a template takes no list. Raises `ValueError` for other parts."""
    if not isinstance(message, dict):
        return message
    if message.get("role") == "assistant" and message.get("content") is None:  # a call of a tool
        return {**message, "content": ""}
    if not isinstance(message.get("content"), list):
        return message
    text = ""
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected text, all that this model reads; found the part {str(part)[:80]}")
        text += part["text"]
    return {**message, "content": text}
