"""Give the model to Ollama, compare its prompts and ask it one question; without Ollama, print the commands."""

import json
import os
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe

QUESTION = "A baker makes 12 rolls a tray and fills 7 trays. She sells 50 rolls. How many are left?"


@click.command(help=__doc__)
@options.recipe
@options.reads("ollama-modelfile")
@click.option("--question", default=QUESTION, show_default=True, help="The question.")
def main(recipe: Path, ollama_modelfile: Path, question: str) -> None:
    read_recipe(recipe)
    read_manifest(ollama_modelfile, "ollama-modelfile", "*")
    create_and_ask(recipe.stem, ollama_modelfile, question)


def create_and_ask(name: str, folder: Path, question: str) -> None:
    """Create the model `name` from `folder`/Modelfile, compare its prompts and print its answer.

    Raises `UserError` when Ollama fails or prompts otherwise than in training.
    """
    create, ask = ["ollama", "create", name, "-f", "Modelfile"], ["ollama", "run", name, question]
    if shutil.which("ollama") is None:
        click.echo("ollama is not installed here (https://ollama.com/download). On a machine with it, run:")
        click.echo(f"  cd {shlex.quote(str(folder))}")
        for step in (create, ask):
            click.echo(f"  {shlex.join(step)}")
        return
    run(create, folder)
    click.echo(compare_prompts(name, folder / "prompts.json", address()))
    run(ask, folder)


def run(step: Sequence[str], folder: Path) -> None:
    """Run one command of Ollama in `folder`. Raises `UserError` when it fails."""
    done = subprocess.run(step, cwd=folder, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        command = " ".join(step[:3])
        raise UserError(f"{command} failed in {folder} with exit code {done.returncode}. Run: ollama serve")


def address() -> str:
    """Return the address of Ollama's server, by OLLAMA_HOST as Ollama's own client reads it."""
    host = os.environ.get("OLLAMA_HOST", "").strip() or "127.0.0.1"
    scheme, _, place = host.rpartition("://")
    place = place.rstrip("/").replace("0.0.0.0", "127.0.0.1", 1)  # noqa: S104  asked here, not listened on
    return f"{scheme or 'http'}://{place}" + ("" if ":" in place.rpartition("]")[2] else ":11434")


def compare_prompts(name: str, path: Path, server: str) -> str:
    """Compare the prompts that Ollama shows for the model `name` with those in `path`; return what was found.

    Raises `UserError` for the first difference in a text that a run asks. One in a text with blanks at its ends, or
    nothing but blanks, is counted.
    """
    expected = json.loads(path.read_text(encoding="utf-8"))
    odd = 0
    for each in expected["prompts"]:
        found = shown_prompt(name, each["messages"], server)
        if found is None:
            return "This Ollama does not show its prompts, so they were not compared."
        if found.removeprefix(expected["bos"]) == each["prompt"]:
            continue
        if any(message["content"] != (message["content"].strip() or "none") for message in each["messages"]):
            odd += 1
            continue
        raise UserError(
            f"{name}: Ollama prompts otherwise than training did:\n"
            f"  conversation: {json.dumps(each['messages'], ensure_ascii=False)}\n"
            f"  training:     {each['prompt']!r}\n"
            f"  Ollama:       {found!r}\n"
            f"Run OLLAMA_GO_TEMPLATE=1 ollama serve, by which it prompts with the Modelfile's TEMPLATE"
        )
    total = len(expected["prompts"])
    said = f"Ollama prompts as training did in {total - odd} of {total} conversations"
    return said + (f"; the other {odd} have a text with blanks at its ends, or none." if odd else ".")


def shown_prompt(name: str, messages: Sequence[dict[str, str]], server: str) -> str | None:
    """Return the prompt that Ollama makes of `messages`, None if it is one that does not show it.

    Raises `UserError` when the server does not answer, or refuses.
    """
    asked: dict[str, Any] = {"model": name, "messages": messages, "stream": False, "_debug_render_only": True}
    asked["options"] = {"num_predict": 1}  # for one that answers instead
    request = urllib.request.Request(
        f"{server}/api/chat", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=600) as answer:
            return (json.load(answer).get("_debug_info") or {}).get("rendered_template")
    except urllib.error.HTTPError as error:
        reason = error.read(2000).decode(errors="replace")
        raise UserError(f"{server}: Ollama refused the conversation {json.dumps(messages)}: {reason}") from error
    except OSError as error:
        raise UserError(f"{server}: Ollama's server does not answer: {error}. Run: ollama serve") from error


if __name__ == "__main__":
    main()
