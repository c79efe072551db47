"""Serve the finished GGUF on this machine with OpenAI's HTTP API, by llama-server."""

import os
import signal
import sys
from pathlib import Path

import click

from stages.lib import options
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.serve.door import ANY_HOST, HOST, open_listener, serve_app
from stages.lib.serve.setting import read_setting


@click.command(help=__doc__)
@options.recipe
@options.reads("ollama-modelfile")
@click.option(
    "--host",
    type=click.Choice([HOST, ANY_HOST]),
    default=HOST,
    show_default=True,
    help=f"The address to listen on. {ANY_HOST} is for a container, whose port is published to this machine alone.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port; 0: any that is free."
)
def main(recipe: Path, ollama_modelfile: Path, host: str, port: int) -> None:
    read_recipe(recipe)
    if host == ANY_HOST and "TEMPER_IMAGE_ID" not in os.environ:  # which docker/run sets
        raise UserError(
            f"--host {ANY_HOST}: would offer the model to the whole network, without log-in or encryption; expected "
            f"{HOST} outside a container. Run: make serve"
        )
    setting = read_setting(ollama_modelfile)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with open_listener(host, port) as listener:
        serve_app(setting, recipe.stem, listener)


if __name__ == "__main__":
    main()
