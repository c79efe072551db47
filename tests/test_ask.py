"""`make ask`: one question to the finished GGUF."""

import re

import pytest
from click.testing import CliRunner, Result

from stages import ask
from tests.support import tiny_models

pytestmark = pytest.mark.torch


def asked(question: str) -> Result:
    arguments = ["--recipe", str(tiny_models.made() / "tiny.toml"), "--ollama-modelfile", str(tiny_models.modelfile())]
    return CliRunner().invoke(ask.main, [*arguments, "--question", question])


def test_the_answer_of_the_recommended_file_is_printed():
    result = asked("What is 17 + 25?")
    assert result.exit_code == 0, result.output
    assert "<answer>" in result.output
    assert result.output.endswith("\n")


def test_the_answer_is_greedy_whatever_the_modelfile_samples_with():
    assert asked("What is 17 + 25?").output == asked("What is 17 + 25?").output


def test_a_question_longer_than_the_context_is_refused():
    result = asked("What is 17 + 25? " * 400)
    assert result.exit_code == 1
    assert re.search(
        r"Error: .*gguf: the messages are too long: .*; expected at most \[ollama\] num_ctx = \d+", result.output
    )


def test_bytes_that_are_no_text_are_refused():
    result = asked("What is 17 + \udcff?")
    assert (result.exit_code, "--question is not UTF-8" in result.output) == (1, True)


def test_an_empty_question_is_refused():
    result = asked(" ")
    assert (result.exit_code, "--question is empty" in result.output) == (1, True)
