"""llama-server, which docker/llama compiles with llama-cpp-python: started on a GGUF file, reached by a Unix socket."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from stages.lib.bounded import end_with_parent
from stages.lib.errors import UserError
from stages.lib.gguf.library import threads_for

if TYPE_CHECKING:
    import httpx

LOAD_SECONDS = 600  # of a large file on a slow disk
STOP_SECONDS = 5


class LlamaServer:
    """llama-server on one GGUF file, on a socket in a folder of its own that only this user can open.

    No port is taken, and no page in a browser and no other user reaches it. The environment sets nothing: llama-server
    would read LLAMA_ARG_ variables.
    """

    def __init__(self, path: Path, *arguments: str) -> None:
        """Start it on `path` with further `arguments`, and wait until it answers.

        Raises `UserError` with its last words when it does not.
        """
        self.path = path
        self.folder = tempfile.TemporaryDirectory(prefix="temper-")
        self.socket, self.log = Path(self.folder.name) / "llama.sock", Path(self.folder.name) / "log"
        threads = str(threads_for(path))
        self.command = [
            str(program()), "--model", str(path.absolute()), "--host", str(self.socket), "--offline", "--parallel", "1",
            "--threads", threads, "--threads-batch", threads, "--threads-http", "4", "--no-warmup", "--cache-ram", "0",
            "--gpu-layers", "0", "--fit", "off", "--log-verbosity", "2", *arguments,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start the process, also after a crash. Raises `UserError` when it ends or does not answer in time."""
        import httpx

        self.socket.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip
        try:
            with self.client() as client:
                until = time.monotonic() + LOAD_SECONDS
                while self.process.poll() is None and time.monotonic() < until:
                    try:
                        if client.get("/health").status_code == 200:
                            return
                    except httpx.TransportError:  # it does not listen yet
                        pass
                    time.sleep(0.02)
            raise UserError(f"{self.path}: llama-server can't serve it. llama-server said:\n{self.said()}")
        except BaseException:  # Ctrl-C too: no server is left behind
            self.stop()
            raise

    def client(self) -> "httpx.Client":
        """Return a client of this server, for addresses such as "/health"."""
        import httpx

        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://llama", timeout=LOAD_SECONDS)

    def said(self, lines: int = 8) -> str:
        """Return the last lines that it logged, indented."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        return "\n".join("  " + line for line in text.strip().splitlines()[-lines:])

    def stop(self) -> None:
        """End the process."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> "LlamaServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.folder.cleanup()


def program() -> Path:
    """Return llama-server, which lies beside llama_cpp in the wheel. Raises `UserError` where it does not."""
    import llama_cpp

    path = Path(llama_cpp.__file__).parents[1] / "bin" / "llama-server"
    if not path.is_file():
        raise UserError(
            f"{path} is missing; expected llama-server, compiled with llama-cpp-python. Run: make setup "
            "(for containers: make image)"
        )
    return path
