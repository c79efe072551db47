"""Talk to the finished GGUF in the terminal, turn by turn: /reset starts anew, /quit ends."""

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
    """Read questions from standard input, a line each, and write answers of at most `max_tokens`, until the end of it.

    `count` gives the tokens of a conversation's prompt. Ctrl-C ends an answer, which then is no part of the
    conversation, or between answers everything.
    """
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
            click.echo(f"({question} is no command{close}; {', '.join(COMMANDS)})", err=True)
            continue
        asked = [*turns, {"role": "user", "content": question}]
        room = min(max_tokens, setting.context_tokens // 2)  # for the answer
        kept = fitting(asked, setting.context_tokens - room, count)
        if not kept:
            click.echo(
                f"(too long: with room for {room:,} tokens of answer it does not fit into the context of "
                f"{setting.context_tokens:,})",
                err=True,
            )
            continue
        if dropped := (len(asked) - len(kept)) // 2:
            click.echo(f"(the context is full: without the oldest {dropped} of {len(asked) // 2} turns)", err=True)
        written = ""
        try:
            for piece in answer_with(file, setting, kept, room):
                written += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo("\n(stopped; this turn is left out of the conversation)", err=True)
            turns = kept[:-1]
            continue
        click.echo()
        turns = [*kept, {"role": "assistant", "content": written}]


def ask_for_question() -> str | None:
    """Return the next line of standard input; None at its end, or at Ctrl-C."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        return line.encode(errors="surrogateescape").decode(errors="replace")  # what is not UTF-8 becomes "\ufffd"
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        return None


def fitting(messages: list[Message], most_tokens: int, count: Callable[[list[Message]], int]) -> list[Message]:
    """Return `messages`, questions and answers in turn, without as many of the oldest turns as have to go.

    `count` gives the tokens of a prompt, which is to have at most `most_tokens`. Nothing is returned when the last
    question alone has more.
    """
    while messages and count(messages) > most_tokens:
        messages = messages[2:]
    return messages


if __name__ == "__main__":
    main()
