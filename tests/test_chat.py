"""`make chat`: turns, commands, the end of the input, and a context that is never overrun."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from stages import chat
from stages.lib.serve.setting import Setting
from tests.support import tiny_models

ROOT = Path(__file__).parents[1]


def arguments() -> list[str]:
    folder = tiny_models.modelfile()
    return ["--recipe", str(tiny_models.made() / "tiny.toml"), "--ollama-modelfile", str(folder)]


def typed(*lines: str) -> Result:
    """Run the chat on these lines of standard input."""
    result = CliRunner().invoke(chat.main, arguments(), input="".join(line + "\n" for line in lines))
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.torch
def test_each_line_is_answered_and_the_end_of_the_input_ends_the_chat():
    result = typed("What is 17 + 25?", "", "What is 2 + 3?")
    assert result.stdout.count("</answer>\n") >= 2
    assert "model.q8_0.gguf, 1,024 tokens of context. /reset /quit" in result.stderr


@pytest.mark.torch
def test_quit_ends_the_chat_and_a_mistyped_command_is_no_question():
    result = typed("/qiut", "/quit", "What is 2 + 3?")
    assert result.stdout == ""
    assert "(/qiut is no command (did you mean '/quit'?); expected /reset or /quit)" in result.stderr


class Recorded:
    """Stands for the file: notes what it is asked and answers with one word."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.room: list[int] = []

    def create_chat_completion(self, messages, *, max_tokens, **rest):
        self.prompts.append([message["content"] for message in messages])
        self.room.append(max_tokens)
        yield {"choices": [{"delta": {"role": "assistant"}}]}
        if messages[-1]["content"] == "wait":
            raise KeyboardInterrupt
        for piece in ("ye", "s"):
            yield {"choices": [{"delta": {"content": piece}}]}


def words(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def conversation(lines: list[str], context: int, max_tokens: int = 4) -> tuple[Recorded, str]:
    """Return what a file with so many words of context was asked, and what the terminal showed."""
    file, setting = Recorded(), Setting(Path("x.gguf"), "", [], context, {"temperature": 0.0})

    @click.command()
    def command() -> None:
        chat.converse(file, setting, max_tokens, words)

    result = CliRunner().invoke(command, input="\n".join(lines))
    assert result.exit_code == 0, result.output
    return file, result.output


def test_an_answer_is_asked_for_with_all_that_was_said_before():
    file, shown = conversation(["one", "two"], context=100)
    assert file.prompts == [["one"], ["one", "yes", "two"]]
    assert shown.splitlines()[:2] == ["yes", "yes"]


def test_reset_forgets():
    file, _ = conversation(["one", "/reset", "two"], context=100)
    assert file.prompts == [["one"], ["two"]]


def test_the_oldest_turns_go_when_the_context_is_full_and_it_is_said():
    file, shown = conversation(["a b c", "d e f", "g h i", "j"], context=12)
    assert file.prompts == [["a b c"], ["a b c", "yes", "d e f"], ["d e f", "yes", "g h i"], ["g h i", "yes", "j"]]
    assert shown.count("(the context is full: the oldest 1 of ") == 2
    assert all(words([{"content": text} for text in prompt]) + 4 <= 12 for prompt in file.prompts)


@pytest.mark.parametrize(("context", "max_tokens", "room"), [(12, 4, 4), (12, 100, 6), (8, 4, 4), (7, 4, 3)])
def test_half_of_the_context_at_most_is_kept_for_the_answer(context, max_tokens, room):
    assert conversation(["one"], context, max_tokens)[0].room == [room]


def test_a_question_longer_than_the_context_is_not_asked_and_what_was_said_stays():
    file, shown = conversation(["one", "a b c d e f g h i", "two"], context=12)
    assert file.prompts == [["one"], ["one", "yes", "two"]]
    assert "(too long; expected a question that leaves 4 tokens for the answer in the context of 12)" in shown


def test_an_answer_that_is_stopped_is_no_part_of_the_conversation():
    file, shown = conversation(["one", "wait", "two"], context=100)
    assert file.prompts == [["one"], ["one", "yes", "wait"], ["one", "yes", "two"]]
    assert "(stopped; this turn is left out of the conversation)" in shown


@pytest.mark.torch
def test_in_a_terminal_it_prompts_answers_and_ends_on_ctrl_d():
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "stages.chat", *arguments()]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        shown = until(ours, b"> ")
        os.write(ours, b"What is 17 + 25?\n")
        shown += until(ours, b"</answer>\r\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        os.close(ours)
    assert b"1,024 tokens of context" in shown


def until(terminal: int, end: bytes) -> bytes:
    """Read what the terminal shows until it ends with `end`."""
    shown = b""
    while not shown.endswith(end):
        piece = os.read(terminal, 4096)
        assert piece, shown
        shown += piece
    return shown
