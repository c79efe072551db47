"""Chat with the finished GGUF in the terminal: /reset starts a new conversation, /quit ends."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.lib import options
from stages.lib.errors import nearest
from stages.lib.gguf.tokens import Vocabulary
from stages.lib.recipe.read import read_recipe
from stages.lib.serve.setting import Setting, answer_with, open_model, read_setting

if TYPE_CHECKING:
    from llama_cpp import Llama

COMMANDS = ("/reset", "/quit")
Message = dict[str, str]


@click.command(help=__doc__)
@options.recipe
@options.reads("ollama-modelfile")
def main(recipe: Path, ollama_modelfile: Path) -> None:
    max_tokens = read_recipe(recipe).infer.max_completion_tokens
    setting = read_setting(ollama_modelfile)
    with contextlib.closing(Vocabulary(setting.path)) as vocabulary, open_model(setting) as file:

        def count(messages: list[Message]) -> int:
            return len(vocabulary.tokenize(vocabulary.render(setting.with_system(messages))))

        click.echo(f"{setting.path.name}, {setting.context_tokens:,} tokens of context. {' '.join(COMMANDS)}", err=True)
        converse(file, setting, max_tokens, count)


def converse(file: "Llama", setting: Setting, max_tokens: int, count: Callable[[list[Message]], int]) -> None:
    """Answer each line of standard input in at most `max_tokens`. `count`: a prompt's tokens. Ctrl-C drops a turn."""
    turns: list[Message] = []
    while (question := ask_for_question()) is not None:
        if not question.strip():
            continue
        if question == "/quit":
            return
        if question == "/reset":
            turns = []
            click.echo("(a new conversation)", err=True)
            continue
        if question.startswith("/") and question[1:].isalpha():
            close = nearest(question, COMMANDS)
            click.echo(f"({question} is no command{close}; expected {' or '.join(COMMANDS)})", err=True)
            continue
        messages = [*turns, {"role": "user", "content": question}]
        room = min(max_tokens, setting.context_tokens // 2)  # for the answer
        prompt = fitting(messages, setting.context_tokens - room, count)
        if not prompt:
            click.echo(
                f"(too long; expected a question that leaves {room:,} tokens for the answer in the context of "
                f"{setting.context_tokens:,})",
                err=True,
            )
            continue
        if left_out := (len(messages) - len(prompt)) // 2:
            click.echo(f"(the context is full: the oldest {left_out} of {len(messages) // 2} turns are gone)", err=True)
        answer = ""
        try:
            for piece in answer_with(file, setting, prompt, room):
                answer += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo("\n(stopped; this turn is left out of the conversation)", err=True)
            turns = prompt[:-1]
            continue
        click.echo()
        turns = [*prompt, {"role": "assistant", "content": answer}]


def ask_for_question() -> str | None:
    """Return the next line of standard input; None at its end and at Ctrl-C."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        return line.encode(errors="surrogateescape").decode(
            errors="replace"
        )  # bytes that are not UTF-8 become "\ufffd"
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        return None


def fitting(messages: list[Message], most_tokens: int, count: Callable[[list[Message]], int]) -> list[Message]:
    """Return `messages` without the oldest turns, in at most `most_tokens` by `count`, [] if none fit."""
    while messages and count(messages) > most_tokens:
        messages = messages[2:]
    return messages


if __name__ == "__main__":
    main()
