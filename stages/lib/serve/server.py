"""An OpenAI-compatible server of the finished GGUF, on llama-cpp-python's."""

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
MAX_GRAMMAR = 20_000  # characters; llama.cpp dies of one with 200,000 brackets
PATIENCE_SECONDS = 3  # for answers that are being written when the server is told to end


def leave(*_: object) -> None:
    """End this process with exit code 0, and with it a thread that may be writing an answer for which nobody waits."""
    sys.stdout.flush()
    os._exit(0)


def listening(host: str, port: int) -> socket.socket:
    """Return a socket bound to the port. Raises `UserError` when it is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"--port {port}: {error.strerror} on {host}; expected a port that is free. Run: make serve PORT={port + 1}"
        ) from error
    return listener


def serve_app(setting: Setting, name: str, listener: socket.socket) -> None:
    """Serve the model as `name` on `listener` until INT or TERM, which uvicorn raises again when it has ended."""
    import uvicorn

    app = application(setting, name)
    listener.listen()
    address = f"http://{HOST}:{listener.getsockname()[1]}/v1"
    click.echo(f"{setting.path.name} is served at {address} as {name!r}, to this machine only. Ctrl-C ends it")
    sys.stdout.flush()
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE_SECONDS)
    uvicorn.Server(settings).run(sockets=[listener])


def application(setting: Setting, name: str) -> Any:
    """Return llama-cpp-python's server of one model, to which a chat is prompted, stopped and sampled as in Ollama.

    Raises `UserError` when the file can't be loaded.
    """
    with loading_line(setting.path):
        from fastapi.middleware.cors import CORSMiddleware
        from llama_cpp.server.app import create_app
        from llama_cpp.server.settings import ModelSettings, ServerSettings
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        llama_library()  # once more: importing its server switched llama.cpp's log on again
        refuse_what_llama_cpp_can_not_take()
        threads = threads_for(setting.path)
        # Not the classes themselves: they read any setting that is not given from the environment.
        model = ModelSettings.model_construct(
            model=str(setting.path),
            model_alias=name,
            chat_format=TEMPLATE,
            n_ctx=setting.context_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            use_mlock=False,
            logits_all=False,  # or it keeps context x vocabulary logits
            verbose=False,
        )
        server = ServerSettings.model_construct(interrupt_requests=False)  # or a request cuts off the one before it
        os.environ.pop("CONFIG_FILE", None)  # it would be read instead of these settings
        app = create_app(server_settings=server, model_settings=[model])
    # No page that happens to be open in a browser may use the model: neither across origins, as the server has it, nor
    # by a name that its owner lets point here.
    app.user_middleware = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    app.add_middleware(AsModelfile, setting=setting, vocabulary=Vocabulary(setting.path))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # the last one added comes first
    return app


def refuse_what_llama_cpp_can_not_take() -> None:
    """Have llama-cpp-python raise for a grammar that llama.cpp refuses, and its server answer such requests with 400.

    It would hand a null pointer on, of which the process dies; its converter writes such grammars from JSON schemas
    with a pattern in them. Its server answers 500 to all errors but two.
    """
    import llama_cpp
    from llama_cpp._internals import LlamaSampler
    from llama_cpp.server.errors import RouteErrorHandler

    def add_grammar(self: Any, model: Any, grammar: Any) -> None:
        sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, grammar._grammar.encode(), grammar._root.encode())
        if not sampler:
            raise ValueError("llama.cpp can't take the grammar, stated or made of a JSON schema (such as its pattern)")
        llama_cpp.llama_sampler_chain_add(self.sampler, sampler)

    def refused(request: Any, match: re.Match) -> tuple[int, dict[str, Any]]:
        return 400, invalid_request(match.string)

    LlamaSampler.add_grammar = add_grammar
    known = "grammar|logprobs is not supported|Tool choice|invalid literal for int"
    RouteErrorHandler.pattern_and_formatters[re.compile(known)] = refused


class TooLong(ValueError):
    """A conversation that does not fit into the context."""


class AsModelfile:
    """ASGI middleware that gives a chat request what the Modelfile says and the request does not.

    What is no request, and a conversation that does not fit into the context, it answers with status 400: the server
    behind it would answer 500 to the one, and to the other, if it is asked for a stream, nothing.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], setting: Setting, vocabulary: Vocabulary) -> None:
        self.app, self.setting, self.vocabulary = app, setting, vocabulary

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Hand a request on, a chat's body rewritten."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] != CHAT or scope["method"] != "POST":
            await answer(self.app, scope, receive, send)
            return
        if not dict(scope["headers"]).get(b"content-type", b"").startswith(b"application/json"):
            # The server would take the body for text. And a page in a browser can only send this type if it is let.
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
            request = completed(body, self.setting)
            self.check_room(request["messages"])
            body = json.dumps(request).encode()
        except (ValueError, RecursionError) as error:  # the second is json's, for lists within lists within lists
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
        """Raise `TooLong` when `messages` leave no room for an answer, `ValueError` for what can't be rendered."""
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
    """Let `app` answer, but begin with status 200 only when there is something: until then an error is still said.

    llama-cpp-python's server begins a stream, and then looks whether it can be.
    """
    held: list[dict[str, Any]] = []

    async def late(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            held.append(message)
            return
        if held and message.get("body"):
            await send(held.pop())
        if not held:
            await send(message)

    try:
        await app(scope, receive, late)
        for start in held:  # an answer with nothing in it
            await send(start)
            await send({"type": "http.response.body"})
    except Exception as error:  # as it is, or within the groups of the tasks that write a stream
        reason = error
        while isinstance(reason, ExceptionGroup):
            reason = reason.exceptions[0]
        if not held or not isinstance(reason, ValueError):  # what llama-cpp-python raises for a request
            raise
        await refuse(str(reason))(scope, receive, send)


def refuse(message: str, code: str | None = None) -> Callable[..., Awaitable[None]]:
    """Return the ASGI answer with status 400 that OpenAI's clients read."""
    from starlette.responses import JSONResponse

    return JSONResponse({"error": invalid_request(message, code)}, status_code=400)


def invalid_request(message: str, code: str | None = None) -> dict[str, Any]:
    """Return what OpenAI says of a request that it does not take."""
    return {"message": message, "type": "invalid_request_error", "param": None, "code": code}


def completed(body: bytes, setting: Setting) -> dict[str, Any]:
    """Return a chat request with the Modelfile's system prompt, stops and sampling where it states none.

    Its own stops come on top. Raises `ValueError`, of json or pydantic too, for what is no request.
    """
    from llama_cpp.server.types import CreateChatCompletionRequest

    request = json.loads(body, parse_constant=finite, parse_float=finite)
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise ValueError(
            f"expected a JSON object with a list of messages; found {body[:80].decode(errors='replace')!r}"
        )
    stated = {key: value for key, value in request.items() if value is not None}
    stated["messages"] = [with_text(message) for message in stated["messages"]]
    if "max_completion_tokens" in stated:  # what newer clients call it
        stated.setdefault("max_tokens", stated["max_completion_tokens"])
    CreateChatCompletionRequest.model_validate(stated)
    if stated.get("repeat_penalty", 1) == 0 or len(stated.get("grammar", "")) > MAX_GRAMMAR:
        raise ValueError(f"expected a repeat_penalty over 0 and a grammar of at most {MAX_GRAMMAR:,} characters")
    stops = stated.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    stated["stop"] = [*stops, *(stop for stop in setting.stops if stop not in stops)]
    return {**setting.sampling, **stated, "messages": setting.with_system(stated["messages"])}


def finite(text: str) -> float:
    """Return the number in `text`. Raises `ValueError` for NaN and infinities, which leave nothing to sample."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number; found {text}")
    return number


def with_text(message: Any) -> Any:
    """Return a message whose content is text, to which a list of parts is joined: a chat template takes no list.

    What is no message comes back as it is. Raises `ValueError` for a part that is no text, such as an image.
    """
    if not isinstance(message, dict):
        return message
    if message.get("role") == "assistant" and message.get("content") is None:  # what it says when it calls a tool
        return {**message, "content": ""}
    if not isinstance(message.get("content"), list):
        return message
    text = ""
    for part in message["content"]:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected text, all that this model reads; found the part {str(part)[:80]}")
        text += part["text"]
    return {**message, "content": text}
