"""The door of `make serve`: requests checked, completed by the Modelfile and passed to llama-server behind it."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from stages.lib.errors import UserError
from stages.lib.gguf.server import LlamaServer
from stages.lib.serve.setting import Setting

if TYPE_CHECKING:
    from httpx import Response as Answer
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST, ANY_HOST = "127.0.0.1", "0.0.0.0"
MAX_BODY = 8_000_000  # bytes, many times a context
PATIENCE_SECONDS = 3  # for the answers in progress when the server has to end
JSON = "application/json"


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

    context = str(setting.context_tokens)
    # The thought stays in the content, as in Ollama; the page and the addresses that show other people's prompts go.
    arguments = ("--ctx-size", context, "--alias", name, "--reasoning-format", "none", "--no-ui", "--no-slots")
    with LlamaServer(setting.path, *arguments) as server:
        app = application(setting, name, server)
        listener.listen(128)
        address = f"http://{HOST}:{listener.getsockname()[1]}/v1"
        click.echo(f"{setting.path.name} is served at {address} as {name!r}, to this machine only. Ctrl-C ends it")
        sys.stdout.flush()
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE_SECONDS)
        uvicorn.Server(settings).run(sockets=[listener])


def application(setting: Setting, name: str, server: LlamaServer) -> "Starlette":
    """Return the ASGI application in front of `server`, which serves the model of `setting` as `name`."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    door = Door(setting, name, server)
    routes = [
        Route("/health", door.pass_on, methods=["GET"]),
        Route("/v1/models", door.pass_on, methods=["GET"]),
        Route("/v1/models/{model:path}", door.model, methods=["GET"]),
        Route("/v1/chat/completions", door.chat, methods=["POST"]),
        Route("/v1/completions", door.text, methods=["POST"]),
    ]

    async def elsewhere(request: "Request", error: Exception) -> "Response":
        status = error.status_code if isinstance(error, HTTPException) else 404
        offered = ", ".join(f"{each.path}" for each in routes)
        return refusal(f"{request.method} {request.url.path} is not offered here; there are {offered}", status=status)

    @asynccontextmanager
    async def life(app: "Starlette") -> AsyncIterator[None]:
        yield
        await door.client.aclose()

    # No page in a browser may use the model: no permission is given to other origins, and no other host name is taken.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    handlers: dict[Any, Any] = {404: elsewhere, 405: elsewhere}
    app = Starlette(routes=routes, middleware=[hosts], exception_handlers=handlers, lifespan=life)
    app.router.redirect_slashes = False
    return app


class Door:
    """The handlers of requests, and the client of the llama-server behind them."""

    def __init__(self, setting: Setting, name: str, server: LlamaServer) -> None:
        import httpx

        self.setting, self.name, self.server = setting, name, server
        self.client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(server.socket), limits=httpx.Limits(max_connections=256)),
            base_url="http://llama",
            timeout=None,  # noqa: S113  # an answer takes as long as it takes; a client that leaves ends it
        )
        self.restart = asyncio.Lock()
        with server.client() as client:
            self.takes_tools = bool(client.get("/props").json()["chat_template_caps"].get("supports_tools"))

    async def chat(self, request: "Request") -> "Response":
        """Answer a chat."""
        from stages.lib.serve.request import complete_chat

        return await self.complete(request, lambda body: complete_chat(body, self.setting, self.name, self.takes_tools))

    async def text(self, request: "Request") -> "Response":
        """Continue raw text."""
        from stages.lib.serve.request import complete_text

        return await self.complete(request, lambda body: complete_text(body, self.name))

    async def model(self, request: "Request") -> "Response":
        """Answer whether a model is served, as OpenAI's clients ask."""
        from starlette.responses import JSONResponse

        name = request.path_params["model"]
        if name != self.name:
            return refusal(f"the model {name!r} is not served here; expected {self.name!r}", "model_not_found", 404)
        return JSONResponse({"id": self.name, "object": "model", "created": 0, "owned_by": "temper"})

    async def complete(self, request: "Request", complete: Any) -> "Response":
        """Pass on the body of `request` as `complete` makes it; refuse what it raises `ValueError` for."""
        from stages.lib.serve.request import UnknownModel, parse

        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            return refusal(f"expected the header Content-Type: {JSON}")  # a page in a browser can't send it unasked
        body, size = b"", 0
        async for piece in request.stream():
            size += len(piece)
            body = body + piece if size <= MAX_BODY else b""
        if size > MAX_BODY:
            return refusal(f"expected a body of at most {MAX_BODY:,} bytes; found {size:,}", status=413)
        try:
            made = complete(parse(body))
        except UnknownModel as error:
            return refusal(str(error), "model_not_found", 404)
        except ValueError as error:
            return refusal(str(error))
        return await self.pass_on(request, json.dumps(made).encode())

    async def pass_on(self, request: "Request", body: bytes | None = None) -> "Response":
        """Return llama-server's answer, in pieces as they come. A client that leaves ends its work.

        A request at which llama-server dies is answered with status 500; it is started again.
        """
        import httpx
        from starlette.responses import Response, StreamingResponse

        headers = {"content-type": JSON} if body is not None else {}
        outgoing = self.client.build_request(request.method, request.url.path, content=body, headers=headers)
        asking = asyncio.create_task(self.client.send(outgoing, stream=True))
        leaving = asyncio.create_task(left(request))
        try:
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return Response(status_code=499)  # nobody reads it
            answer = asking.result()
            if answer.status_code >= 400:
                return await translated(answer)
            kind = answer.headers.get("content-type", JSON)
            if not kind.startswith("text/event-stream"):  # whole, so that a crash in it is no half answer
                content = await answer.aread()
                return Response(content, answer.status_code, media_type=kind)
            return StreamingResponse(pieces(answer), answer.status_code, media_type=kind)
        except httpx.TransportError:
            await self.start_again()
            return refusal("llama-server, which answers, ended at this request; it was started again", status=500)
        finally:
            leaving.cancel()
            if not asking.done():
                asking.cancel()

    async def start_again(self) -> None:
        """Start llama-server anew where it ended."""
        async with self.restart:
            await asyncio.sleep(0.1)  # a process that closed its connections may need a moment to end
            if self.server.process.poll() is not None:
                click.echo(f"llama-server ended; starting it again. It said:\n{self.server.said()}", err=True)
                await asyncio.to_thread(self.server.start)


async def left(request: "Request") -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def pieces(answer: "Answer") -> AsyncIterator[bytes]:
    """Yield the body of `answer` as it comes; an end of llama-server in it becomes an error in the stream."""
    import httpx

    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.TransportError:
        message = json.dumps({"error": {"message": "llama-server ended in this answer", "type": "server_error"}})
        yield f"data: {message}\n\n".encode()
    finally:
        await answer.aclose()


async def translated(answer: "Answer") -> "Response":
    """Return llama-server's error as OpenAI's clients know it."""
    content = await answer.aread()
    try:
        error = json.loads(content)["error"]
        message, kind = str(error["message"]), error.get("type")
    except (ValueError, KeyError, TypeError):
        message, kind = content.decode(errors="replace"), None
    long = kind == "exceed_context_size_error"
    # llama-server's 500 are faults of the request too: a template that can't be rendered, a grammar that can't be read
    return refusal(message, "context_length_exceeded" if long else None, 503 if answer.status_code == 503 else 400)


def refusal(message: str, code: str | None = None, status: int = 400) -> "Response":
    """Return an error for OpenAI's clients."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status_code=status)
