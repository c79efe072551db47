"""Ask the finished GGUF a question by llama.cpp, and print the answer as it is generated."""

from pathlib import Path

import click

from stages.lib import options
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.serve.setting import answer_with, open_model, read_setting


@click.command(help=__doc__)
@options.recipe
@options.reads("ollama-modelfile")
@click.option("--question", required=True, help="The question, in quotes.")
def main(recipe: Path, ollama_modelfile: Path, question: str) -> None:
    max_tokens = read_recipe(recipe).infer.max_completion_tokens
    if not question.strip():
        raise UserError('--question is empty; expected text. Run: make ask Q="What is 17 + 25?"')
    if any("\ud800" <= sign <= "\udfff" for sign in question):  # Python's surrogates for bytes that are no text
        raise UserError("--question is not UTF-8; expected text in the terminal's encoding")
    setting = read_setting(ollama_modelfile)
    with open_model(setting) as file:
        messages = [{"role": "user", "content": question}]
        for piece in answer_with(file, setting, messages, max_tokens, temperature=0.0):
            click.echo(piece, nl=False)
    click.echo()


if __name__ == "__main__":
    main()
