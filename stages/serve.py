"""Serve the finished GGUF on this machine, by llama-cpp-python's server, which speaks OpenAI's HTTP API."""

import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from stages.lib import llama, options, serving
from stages.lib.errors import UserError
from stages.lib.recipe import read_recipe
from stages.lib.serving import Setting

HOST, ANY_HOST = "127.0.0.1", "0.0.0.0"
CHAT = "/v1/chat/completions"
PATIENCE_SECONDS = 3  # for answers that are being written when the server is told to end


@click.command(help=__doc__)
@options.recipe
@options.reads("ollama-modelfile")
@click.option(
    "--host",
    type=click.Choice([HOST, ANY_HOST]),
    default=HOST,
    show_default=True,
    help=f"The address to listen at. {ANY_HOST} is for a container, whose port is published to this machine alone.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0: any that is free."
)
def main(recipe: Path, ollama_modelfile: Path, host: str, port: int) -> None:
    read_recipe(recipe)
    if host == ANY_HOST and "TEMPER_IMAGE_ID" not in os.environ:  # which docker/run sets
        raise UserError(
            f"--host {ANY_HOST}: would offer the model to the whole network, with no log-in and no encryption; "
            f"expected {HOST} outside a container. Run: make serve"
        )
    setting = serving.read(ollama_modelfile)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    with listening(host, port) as listener:
        serve(setting, recipe.stem, listener)


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


def serve(setting: Setting, name: str, listener: socket.socket) -> None:
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
    with serving.loading(setting.path):
        from fastapi.middleware.cors import CORSMiddleware
        from llama_cpp.server.app import create_app
        from llama_cpp.server.settings import ModelSettings, ServerSettings
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        llama.library()  # once more: importing its server switched llama.cpp's log on again
        threads = llama.threads(setting.path)
        # Not the classes themselves: they read any setting that is not given from the environment.
        model = ModelSettings.model_construct(
            model=str(setting.path),
            model_alias=name,
            chat_format=serving.TEMPLATE,
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
    app.add_middleware(AsModelfile, setting=setting, vocabulary=llama.Vocabulary(setting.path))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # the last one added comes first
    return app


class TooLong(ValueError):
    """A conversation that does not fit into the context."""


class AsModelfile:
    """ASGI middleware that gives a chat request what the Modelfile says and the request does not.

    What is no request, and a conversation that does not fit into the context, it answers with status 400: the server
    behind it would answer 500, or a stream that ends before it began.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], setting: Setting, vocabulary: llama.Vocabulary) -> None:
        self.app, self.setting, self.vocabulary = app, setting, vocabulary

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Hand a request on, a chat's body rewritten."""
        if scope["type"] != "http" or scope["path"] != CHAT or scope["method"] != "POST":
            await self.app(scope, receive, send)
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
        except ValueError as error:
            from starlette.responses import JSONResponse

            code = (
                "context_length_exceeded" if isinstance(error, TooLong) else None
            )  # OpenAI's word, which clients know
            said = {"message": str(error), "type": "invalid_request_error", "param": None, "code": code}
            await JSONResponse({"error": said}, status_code=400)(scope, receive, send)
            return
        body = json.dumps(request).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            return rest.pop() if rest else await receive()

        await self.app({**scope, "headers": headers}, replay, send)

    def check_room(self, messages: list[dict[str, Any]]) -> None:
        """Raise `TooLong` when `messages` leave no room for an answer, `ValueError` for what can't be rendered."""
        tokens = len(self.vocabulary.tokenize(self.vocabulary.render(messages)))
        if tokens >= self.setting.context_tokens:
            raise TooLong(
                f"This model's maximum context length is {self.setting.context_tokens} tokens ([ollama] num_ctx); the "
                f"conversation has {tokens}. Shorten it"
            )


def completed(body: bytes, setting: Setting) -> dict[str, Any]:
    """Return a chat request with the Modelfile's system prompt, stops and sampling where it states none.

    Its own stops come on top. Raises `ValueError`, of json or pydantic too, for what is no request.
    """
    from llama_cpp.server.types import CreateChatCompletionRequest

    request = json.loads(body)
    if not isinstance(request, dict) or request.get("messages") is None:
        raise ValueError(f"expected a JSON object with messages; found {body[:80].decode(errors='replace')!r}")
    stated = {key: value for key, value in request.items() if value is not None}
    CreateChatCompletionRequest.model_validate(stated)
    stops = stated.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    stated["stop"] = [*stops, *(stop for stop in setting.stops if stop not in stops)]
    if "max_completion_tokens" in stated:  # what newer clients call it
        stated.setdefault("max_tokens", stated["max_completion_tokens"])
    messages = [with_text(message) for message in stated["messages"]]
    return {**setting.sampling, **stated, "messages": setting.with_system(messages)}


def with_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is text, which a list of parts is joined to: a chat template takes no list.

    Raises `ValueError` for a part that is no text, such as an image.
    """
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    for part in parts:
        if part["type"] != "text":
            raise ValueError(f"expected text, all that this model reads; found a part of type {part['type']!r}")
    return {**message, "content": "".join(part["text"] for part in parts)}


if __name__ == "__main__":
    main()
