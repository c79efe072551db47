"""The finished GGUF for `ask`, `chat` and `serve`: the proven Modelfile sets all, as in Ollama."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError
from stages.lib.gguf.library import llama_library, llama_said, threads_for
from stages.lib.ollama import modelfile

if TYPE_CHECKING:
    from llama_cpp import Llama

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")  # the same names in a Modelfile and llama.cpp
TEMPLATE = "chat_template.default"  # llama-cpp-python's name for the file's own; else it may take a stock one


@dataclass(frozen=True)
class Setting:
    """The values of a Modelfile. `path`: the GGUF file; `system`: "" for no system prompt."""

    path: Path
    system: str
    stops: list[str]
    context_tokens: int
    sampling: dict[str, float]

    def with_system(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return `messages` with the system prompt first unless they have one, as Ollama treats SYSTEM."""
        if not self.system or any(message.get("role") == "system" for message in messages):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]


def read_setting(folder: Path) -> Setting:
    """Return the values of the Modelfile in the finished ollama-modelfile artifact `folder`."""
    read_manifest(folder, "ollama-modelfile", "*")
    commands = modelfile.read(folder / "Modelfile")

    def number(name: str) -> float:
        (value,) = modelfile.values(commands, f"parameter {name}")
        return float(value)

    return Setting(
        path=folder / modelfile.values(commands, "from")[0],
        system="".join(modelfile.values(commands, "system")),
        stops=modelfile.values(commands, "parameter stop"),
        context_tokens=int(number("num_ctx")),
        sampling={name: number(name) for name in SAMPLING} | {"top_k": int(number("top_k"))},
    )


@contextlib.contextmanager
def loading_line(path: Path) -> Iterator[Any]:
    """Yield llama_cpp, to load `path` with. Raises `UserError` with llama.cpp's reason when it can't."""
    llama_cpp = llama_library()
    try:
        yield llama_cpp
    except ValueError as error:  # llama-cpp-python's only error for such a file
        raise UserError(
            f"{path}: llama.cpp can't load it. Delete its folder and run: make gguf ollama-modelfile. llama.cpp said:\n"
            f"{llama_said()}"
        ) from error


@contextlib.contextmanager
def open_model(setting: Setting) -> Iterator["Llama"]:
    """Yield the loaded GGUF file, with room for `context_tokens`. Raises `UserError` when it can't be loaded."""
    path, threads = setting.path, threads_for(setting.path)
    with loading_line(path) as llama_cpp:
        file = llama_cpp.Llama(
            str(path),
            n_ctx=setting.context_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            chat_format=TEMPLATE,
            verbose=False,
        )
    with contextlib.closing(file):
        yield file


def answer_with(
    file: "Llama", setting: Setting, messages: Sequence[dict[str, str]], max_tokens: int, **sampling: float
) -> Iterator[str]:
    """Yield the answer in pieces; `sampling` replaces the Modelfile's. Raises `UserError` for too long `messages`."""
    chunks = file.create_chat_completion(
        setting.with_system(messages),
        stream=True,
        stop=setting.stops,
        max_tokens=max_tokens,
        **setting.sampling | sampling,
    )
    try:
        for chunk in chunks:
            yield chunk["choices"][0]["delta"].get("content") or ""
    except ValueError as error:
        if "exceed context window" not in str(error):
            raise
        raise UserError(
            f"{setting.path.name}: the messages are too long: {error}; expected at most [ollama] num_ctx = "
            f"{setting.context_tokens} tokens. Shorten them"
        ) from error
