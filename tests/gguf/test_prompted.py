"""llama-server's prompts held against transformers': the same file and tokenizer, and templates that part."""

import os
from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.gguf.prompted import compare_prompts, conversations
from stages.lib.gguf.server import LlamaServer
from tests.support import tiny_models

pytestmark = [pytest.mark.torch, pytest.mark.slow]
QUESTION = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 17 + 25?"}]


def file() -> Path:
    return tiny_models.quantized() / "model.q8_0.gguf"


def tokenizer(template: str | None = None):
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(tiny_models.merged() / "model")
    read.chat_template = template or read.chat_template
    return read


def test_a_run_s_conversations_are_prompted_as_trained_and_counted():
    asked, others = conversations([QUESTION], tokenizer())
    figures = compare_prompts(file(), tokenizer(), asked, [])
    assert figures["conversations"] == len(asked)
    expected = tokenizer().apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert compare_prompts(file(), tokenizer(), [QUESTION], [])["tokens"] == len(expected)
    texts = [messages[-1]["content"] for messages in others]
    assert "" in texts
    assert any("\u00a0" in text for text in texts)
    assert any("<end_of_turn>" in text for text in texts)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ bos_token }}{{ messages[-1]['content'] }}", "at token 1, transformers has"),
        (tiny_models.CHAT_TEMPLATE.replace("\n\n", "\n"), "at token"),
        (tiny_models.CHAT_TEMPLATE.replace("{{ bos_token }}", ""), "at token 0, transformers has"),
    ],
)
def test_another_prompt_than_the_trained_one_is_an_error_that_shows_both(template, said):
    with pytest.raises(UserError, match="llama-server prompts otherwise than this run trained") as raised:
        compare_prompts(file(), tokenizer(template), [QUESTION], [])
    assert said in raised.value.message
    assert "What is 17 + 25?" in raised.value.message


def test_a_difference_in_text_that_no_run_asks_is_returned_and_no_error():
    shouting = tiny_models.CHAT_TEMPLATE.replace("m['content'] | trim", "m['content'] | trim | replace('odd', 'ODD')")
    odd = [{"role": "user", "content": "an odd sum"}]
    figures = compare_prompts(file(), tokenizer(shouting), [QUESTION], [odd])
    (difference,) = figures["differences"]
    assert "an ODD sum" in difference
    assert "an odd sum" in difference


def test_a_conversation_that_the_template_refuses_in_training_is_left_out():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    assert compare_prompts(file(), tokenizer(strict), [QUESTION], [])["conversations"] == 0


def test_the_environment_does_not_set_llama_server_and_nothing_is_left_of_it(monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "77")
    monkeypatch.setenv("LLAMA_ARG_ALIAS", "other")
    with LlamaServer(file(), "--ctx-size", "256") as server, server.client() as client:
        properties = client.get("/props").json()
        assert properties["default_generation_settings"]["n_ctx"] == 256
        folder = Path(server.folder.name)
        assert folder.stat().st_mode & 0o77 == 0
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(server.process.pid, 0)


def test_a_file_that_llama_server_can_not_load_is_refused_with_its_reason(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(file().read_bytes()[:100_000])
    with pytest.raises(UserError, match="llama-server can't serve it") as raised:
        LlamaServer(path)
    assert "failed to load model" in raised.value.message or "error loading model" in raised.value.message
