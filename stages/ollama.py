"""Give the model to Ollama and ask it one question; where Ollama is not installed, print the commands."""

import shlex
import shutil
import subprocess
from pathlib import Path

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
    """Create the model `name` from `folder`/Modelfile and print its answer. Raises `UserError` when Ollama fails."""
    steps = (["ollama", "create", name, "-f", "Modelfile"], ["ollama", "run", name, question])
    if shutil.which("ollama") is None:
        click.echo("ollama is not installed here (https://ollama.com/download). On a machine with it, run:")
        click.echo(f"  cd {shlex.quote(str(folder))}")
        for step in steps:
            click.echo(f"  {shlex.join(step)}")
        return
    for step in steps:
        done = subprocess.run(step, cwd=folder, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            command = " ".join(step[:3])
            raise UserError(f"{command} failed in {folder} with exit code {done.returncode}. Run: ollama serve")


if __name__ == "__main__":
    main()
