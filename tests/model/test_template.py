"""The run's choices in the chat template: what a server sets does not change a prompt, and what it does not is kept."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.errors import UserError
from stages.lib.model.template import write_choices
from stages.lib.ollama.derive import jinja_render, rejects
from stages.lib.ollama.proof import CONVERSATIONS
from tests.support import chat_templates

TOKENS = {"bos_token": "<bos>", "eos_token": "</s>"}
LLAMA_CPP = chat_templates.llama_cpp()
# What llama.cpp's server, and Ollama with it, gives a chat template today.
SERVED = {"enable_thinking": True, "date_string": "26 Nov 2026", "datetime": "Nov 26 2026"}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "17 + 25?"}]
QWEN = "Qwen-Qwen3-0.6B"
EMPTY_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def prompts(template: str, **variables: object) -> list[str]:
    render = jinja_render(template, TOKENS | variables)
    return [rejects(render, each) or render(each, True) for each in CONVERSATIONS]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*LLAMA_CPP, *chat_templates.MADE}))
def test_what_a_server_sets_changes_no_prompt(name):
    written = write_choices({**LLAMA_CPP, **chat_templates.MADE}[name], {}, TOKENS)
    assert prompts(written) == prompts(written, **SERVED)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*LLAMA_CPP, *chat_templates.MADE}))
def test_what_is_written_changes_no_prompt_but_its_date(name):
    template = {**LLAMA_CPP, **chat_templates.MADE}[name]
    if "strftime_now" not in template and "datetime" not in template:
        assert prompts(write_choices(template, {}, TOKENS)) == prompts(template)


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct"])
def test_llama_3_is_prompted_with_the_date_that_its_own_template_falls_back_to(name):
    written = write_choices(LLAMA_CPP[name], {}, TOKENS)
    prompt = jinja_render(written, TOKENS | SERVED)(ASKED, True)
    assert prompt.startswith(
        "<bos><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
    )


def test_a_date_of_the_recipe_is_taken():
    written = write_choices(LLAMA_CPP["meta-llama-Llama-3.1-8B-Instruct"], {"date_string": "1 May 2026"}, TOKENS)
    assert "Today Date: 1 May 2026\n" in jinja_render(written, TOKENS | SERVED)(ASKED, True)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        (QWEN, {True: "<|im_start|>assistant\n", False: EMPTY_THOUGHT}),
        ("Qwen3.5-4B", {True: "<|im_start|>assistant\n<think>\n", False: EMPTY_THOUGHT}),
    ],
)
@pytest.mark.parametrize("on", [True, False])
def test_thinking_on_or_off_is_the_recipes_whatever_a_server_sets(name, ends, on):
    written = write_choices(LLAMA_CPP[name], {"enable_thinking": on}, TOKENS)
    for served in (True, False):
        assert jinja_render(written, TOKENS | {"enable_thinking": served})(ASKED, True).endswith(ends[on])


def test_thinking_that_is_unset_stays_as_it_is_without_a_server():
    same_as = {"Bielik-11B-v3.0-Instruct": "false", "openbmb-MiniCPM5-1B": "none"}
    for name, value in same_as.items():
        written = write_choices(LLAMA_CPP[name], {}, TOKENS)
        assert written == f"{{% set enable_thinking = {value} %}}\n" + LLAMA_CPP[name]
        assert jinja_render(written, TOKENS | SERVED)(ASKED, True).endswith("<|im_start|>assistant\n")
    assert write_choices(LLAMA_CPP[QWEN], {}, TOKENS) == LLAMA_CPP[QWEN]  # there unset is what servers set


def test_three_ways_of_thinking_ask_for_a_choice():
    template = chat_templates.CHATML + "{{ enable_thinking if enable_thinking is defined else 'unset' }}"
    with pytest.raises(UserError, match=r"on, off and unset.* template_kwargs = \{enable_thinking = false\}"):
        write_choices(template, {}, TOKENS)
    assert write_choices(template, {"enable_thinking": False}, TOKENS) == (
        "{% set enable_thinking = false %}\n" + template
    )


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        (QWEN, "enable_thinkin", r"has no variable 'enable_thinkin' \(did you mean 'enable_thinking'\?\), which"),
        ("Qwen-Qwen2.5-7B-Instruct", "role", r"has no variable 'role'"),  # message.role is another
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(name, key, said):
    with pytest.raises(UserError, match=said + r".*\. Leave it out"):
        write_choices(LLAMA_CPP[name], {key: False}, TOKENS)


def test_a_template_that_is_no_jinja_is_refused():
    with pytest.raises(UserError, match="the chat template is not Jinja: line 2: "):
        write_choices("{{ messages }}\n{% if %}", {}, TOKENS)


@pytest.mark.parametrize(
    "beginning", ["", "\n", "\n\n", "  {% if true %}\n  x{% endif %}", "  {{ 1 }}", "{#- c -#}\n a"]
)
@given(value=st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])) | st.integers() | st.booleans())
def test_a_value_is_read_as_it_was_written_and_what_follows_is_kept(beginning, value):
    template = beginning + chat_templates.CHATML
    written = write_choices(template + "{{ choice | tojson if choice is defined }}", {"choice": value}, TOKENS)
    wanted = jinja_render(template, TOKENS)(ASKED, False) + json.dumps(value, ensure_ascii=False)
    assert jinja_render(written, TOKENS)(ASKED, False) == wanted
