"""Which token ids end a completion, by a generation config, a tokenizer and its chat template; where it is cut."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.lib.ends import cut_after, end_ids, turn_end, verify_end
from stages.lib.errors import UserError
from tests.support import tiny_models

TURN = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['content'] }}CLOSE{% endfor %}"


@functools.cache
def folder() -> Path:
    """Return a folder with a tokenizer like Gemma's, made once: <eos> is 1, <end_of_turn> 5."""
    made = Path(tempfile.mkdtemp(prefix="temper-test-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    texts = [
        message["content"] for row in tiny_models.rows(200, seed=1) for message in row["prompt"] + row["completion"]
    ]
    tiny_models.sentencepiece_tokenizer(made, texts)
    return made


def tokenizer(template: str | None = None, **tokens: str | None):
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder(), **tokens)
    made.chat_template = template or made.chat_template
    return made


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7, 1, 9], [7, 1]), ([1], [1]), ([7, 8], [7, 8]), ([], []), ([7, 2, 1], [7, 2]), ([7, 2, 0, 0], [7, 2]),
        ([7, 8, 1], [7, 8, 1]),
    ],
)  # fmt: skip
def test_a_completion_is_cut_after_its_first_end(tokens, expected):
    assert cut_after(tokens, [1, 2]) == expected


@pytest.mark.parametrize(("stated", "expected"), [(None, []), (5, [5]), (0, [0]), ([1, 5], [1, 5]), ([5, 5], [5])])
def test_a_generation_config_states_one_end_several_or_none(stated, expected):
    from transformers import GenerationConfig

    assert end_ids(GenerationConfig(eos_token_id=stated)) == expected


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(None, [5]), ([], [5]), (5, [5]), ([5], [5]), (1, [1, 5]), ([1, 5], [1, 5]), ([5, 1], [5, 1])],
)
def test_the_ends_are_the_stated_ones_in_their_order_and_the_turns_end(stated, expected):
    assert end_ids(SimpleNamespace(eos_token_id=stated), tokenizer()) == expected


def test_the_tokenizers_eos_is_an_end_beside_the_turns_end_and_no_eos_is_none():
    assert end_ids(None, tokenizer(eos_token="<eos>")) == [1, 5]
    assert end_ids(None, tokenizer(eos_token=None)) == [5]
    assert end_ids(None) == []


@pytest.mark.parametrize("close", ["<end_of_turn>", "<end_of_turn>\n", "\n<end_of_turn><eos>"])
def test_the_turns_end_is_the_control_token_right_after_an_answer(close):
    assert turn_end(tokenizer(TURN.replace("CLOSE", close)), "here") == 5


@pytest.mark.parametrize("close", ["", "\n", "END<end_of_turn>"])
def test_a_turn_that_no_control_token_closes_is_refused(close):
    with pytest.raises(UserError, match=r"here: the chat template closes the assistant's turn with .* control token"):
        turn_end(tokenizer(TURN.replace("CLOSE", close)), "here")


def test_an_end_that_is_not_the_turns_is_told_as_missing():
    verify_end(tokenizer(), [1, 5], "here")
    with pytest.raises(
        UserError, match=r"a stop token is missing: .*'<end_of_turn>' \(5\), and the end tokens are \[1\]"
    ):
        verify_end(tokenizer(), [1], "here")
