"""The derived Go templates against transformers' Jinja and Go's own text/template, on all templates at hand."""

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.errors import UserError
from stages.lib.ollama.derive import derive_template, jinja_render, refuse_unused_system, rejects
from stages.lib.ollama.go import FIND_END, WHITESPACE, render_by_go
from stages.lib.ollama.proof import CONVERSATIONS
from tests.support import chat_templates

TOKENS = {"bos_token": "<bos>", "eos_token": "</s>"}

# Of the templates that come with llama.cpp: those that are refused, and a part of the reason.
DATED = "writes today's date"
REFUSED = {
    "CohereForAI-c4ai-command-r-plus-tool_use": "lone user message",  # cannot do without a list of tools
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "lone user message",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "lone user message",
    "fireworks-ai-llama-3-firefunction-v2": "lone user message",
    "meta-llama-Llama-3.2-3B-Instruct": DATED,
    "openai-gpt-oss-120b": DATED,
    "upstage-Solar-Open-100B": DATED,
}
# Those that are derived, but differ on empty contents, so that the stage refuses them.
DIFFERENT = {
    "ByteDance-Seed-OSS": "an empty answer",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "an empty system prompt",
    "GLM-4.6": "an empty answer",
    "MiniMax-M1": "an empty system prompt",
    "llama-cpp-deepseek-r1": "an empty answer",
    "meetkai-functionary-medium-v3.2": "an empty answer",
    "poolside-Laguna-XS-2.1": "an empty answer",
    "poolside-Laguna-XS.2": "an empty system prompt",
}
LLAMA_CPP = chat_templates.llama_cpp()
FAMILIES = {
    **chat_templates.MADE,
    **{name: text for name, text in LLAMA_CPP.items() if name not in REFUSED and name not in DIFFERENT},
}


@functools.cache
def derived(name):
    render = jinja_render({**LLAMA_CPP, **chat_templates.MADE}[name], TOKENS)
    return render, derive_template(render, "<bos>")


def rendered(render, found, conversations):
    """Give what the chat template makes of the conversations that it takes, and those."""
    taken = [each for each in conversations if not rejects(render, each)]
    return taken, [render(each, True).removeprefix(found.bos) for each in taken]


def test_the_templates_of_llama_cpp_are_there_and_the_lists_name_only_them():
    assert len(LLAMA_CPP) >= 60
    assert {*REFUSED, *DIFFERENT} <= {*LLAMA_CPP}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_go_and_jinja_give_one_text_on_every_conversation(name):
    render, found = derived(name)
    conversations, wanted = rendered(render, found, CONVERSATIONS)
    assert len(conversations) >= 20
    assert render_by_go(found.template, conversations) == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_said_in_go_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=REFUSED[name]):
        derived(name)


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_template_with_a_rule_of_its_own_for_nothing_differs_there_and_only_there(name):
    render, found = derived(name)
    conversations, wanted = rendered(render, found, CONVERSATIONS)
    by_go = render_by_go(found.template, conversations)
    differing = [each for each, go, jinja in zip(conversations, by_go, wanted, strict=True) if go != jinja]
    role = "assistant" if DIFFERENT[name] == "an empty answer" else "system"
    assert differing
    assert any(each["role"] == role and not each["content"].strip() for each in differing[0])
    assert all(any(not message["content"].strip() for message in each) for each in differing)


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write every content"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not write every content"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "does not write every content"),
        ("{% for m in messages %}{{ loop.index }}:{{ m.content }}{% endfor %}", "depends on its position"),
        ("{% for m in messages %}{{ '#' ~ messages|length }}{{ m.content }}{% endfor %}", "depends on its position"),
        ("{{ raise_exception('never') }}", "fails on a lone user message: TemplateError: never"),
        ("{{ messages[0].role == 'system' or raise_exception('who am I') }}", "asks for a system message"),
        ("{% if messages|length > 4 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}", "not write"),
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}", "writes today's date"),
        ("{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}", "has a '\\\\t' beside it"),
        ("{% for m in messages %}{{ m.content | replace(' ', '_') }}{% endfor %}", "has a ' ' beside it"),
        ("{% for m in messages %}{{ m['nothing'].nothing }}{% endfor %}", "fails on a lone user message: Undefined"),
    ],
)
def test_a_shape_that_is_none_of_ours_is_refused_with_the_reason(chat_template, reason):
    with pytest.raises(UserError, match=reason):
        derive_template(jinja_render(chat_template, TOKENS), "<bos>")


@pytest.mark.parametrize(
    ("name", "template"),
    [
        (
            "chatml",
            '{{$system := false}}{{range .Messages}}{{if eq .Role "system"}}{{$system = true}}{{end}}{{end}}'
            + FIND_END + "{{if $system}}<|im_start|>system\n{{$.System}}<|im_end|>\n{{end}}"
            "{{range $i, $_ := .Messages}}{{$last := eq $i $end}}"
            '{{if eq .Role "user"}}<|im_start|>user\n{{.Content}}<|im_end|>\n{{if $last}}<|im_start|>assistant\n{{end}}'
            '{{else if eq .Role "assistant"}}<|im_start|>assistant\n{{.Content}}{{if gt (len (slice $.Messages $i)) 1}}'
            "<|im_end|>\n{{if $last}}<|im_start|>assistant\n{{end}}{{end}}"
            "{{end}}{{end}}{{if lt $end 0}}<|im_start|>assistant\n{{end}}",
        ),
        (
            "system prompt in the last user turn",
            '{{$system := false}}{{range .Messages}}{{if eq .Role "system"}}{{$system = true}}{{end}}{{end}}'
            + FIND_END + "{{range $i, $_ := .Messages}}{{$last := eq $i $end}}"
            '{{if eq .Role "user"}}[INST] {{if $last}}{{if $system}}{{$.System}}\n\n{{end}}{{end}}{{.Content}} [/INST]'
            '{{else if eq .Role "assistant"}} {{.Content}}{{if gt (len (slice $.Messages $i)) 1}}</s>'
            "{{end}}{{end}}{{end}}",
        ),
    ],
)  # fmt: skip
def test_what_is_written_is_short_and_readable(name, template):
    assert derived(name)[1].template == template


RESULT = {"role": "tool", "content": "42"}
LATER = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("name", ["chatml", "gemma-3", "phi-4", "system prompt in the last user turn", "SmolLM2"])
@pytest.mark.parametrize("ending", [[RESULT], [LATER], [RESULT, LATER]])
def test_a_last_message_of_a_tool_or_the_system_leaves_the_prompt_as_without_it(name, ending):
    render, found = derived(name)
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "why?"},
    ]
    system = [LATER] if LATER in ending else []
    wanted = render([*system, *turns], True).removeprefix(found.bos)
    assert render_by_go(found.template, [[*turns, *ending]]) == [wanted]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n"),
        ("phi-4", "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>assistant<|im_sep|>"),
        ("gemma-3", "<start_of_turn>model\n"),  # its system prompt is in the first question
    ],
)
def test_a_conversation_of_a_system_message_alone_has_its_generation_prompt(name, text):
    render, found = derived(name)
    assert render([LATER], True).removeprefix(found.bos) == text
    assert render_by_go(found.template, [[LATER]]) == [text]


@pytest.mark.parametrize("name", ["chatml", "gemma-3", "phi-4"])
def test_an_answer_before_a_tools_result_is_closed_and_the_next_one_prompted(name):
    render, found = derived(name)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert render_by_go(found.template, [[*turns, RESULT]]) == [render(turns, True).removeprefix(found.bos)]


def test_gemma_folds_the_system_prompt_into_the_first_turn_and_leaves_the_bos_to_the_tokenizer():
    found = derived("gemma-3")[1]
    assert found.bos == "<bos>"
    assert found.turn_end == "<end_of_turn>\n"
    assert "<bos>" not in found.template
    conversation = [{"role": "system", "content": " s "}, {"role": "user", "content": " u "}]
    expected = "<start_of_turn>user\n s \n\nu<end_of_turn>\n<start_of_turn>model\n"
    assert render_by_go(found.template, [conversation]) == [expected]


@pytest.mark.parametrize(
    ("chat_template", "takes"),
    [
        (LLAMA_CPP["google-gemma-2-2b-it"], False),  # refuses one
        (chat_templates.MADE["phi-3 medium"], False),
        (chat_templates.MADE["its own system message instead"], False),
        (chat_templates.MADE["gemma-3"], True),
        (chat_templates.CHATML, True),
    ],
)
def test_a_template_that_refuses_or_leaves_out_the_system_prompt_says_so(chat_template, takes):
    found = derive_template(jinja_render(chat_template, TOKENS), "<bos>")
    assert found.takes_system is takes
    if takes:
        refuse_unused_system(found, "Be brief.", "xml", "here")
        return
    with pytest.raises(UserError, match="here: the chat template refuses system messages or leaves them out"):
        refuse_unused_system(found, "Be brief.", "xml", "here")


def test_a_date_beside_no_system_message_is_taken_and_one_beside_it_is_not():
    no_system = "{% if messages[0].role != 'system' %}{{ strftime_now('%d') }}{% endif %}" + chat_templates.CHATML
    render = jinja_render(no_system, TOKENS)
    found = derive_template(render)
    assert render([{"role": "user", "content": "q"}], True)[:2].isdigit()
    assert render_by_go(found.template, [[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]]) == [
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ]
    with pytest.raises(UserError, match="writes today's date"):
        jinja_render("{{ strftime_now('%d') }}" + chat_templates.CHATML, TOKENS)


def test_a_turn_marker_that_the_tokenizer_never_adds_stays_in_the_go_template():
    render = jinja_render(chat_templates.CHATML, {"bos_token": "<|im_start|>"})
    found = derive_template(render, "")
    assert found.bos == ""
    assert render_by_go(found.template, [[{"role": "user", "content": "q"}]]) == [
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ]


@pytest.mark.parametrize("name", ["chatml", "gemma-3", "qwen-3 with think", "meta-llama-Llama-3.1-8B-Instruct"])
def test_a_last_answer_is_left_open_for_the_model_to_go_on_with(name):
    render, found = derived(name)
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]
    text = render_by_go(found.template, [conversation])[0]
    closed = render(conversation, False).removeprefix(found.bos)
    assert text == closed[: closed.index("The answer is") + len("The answer is")]


def test_a_conversation_whose_beginning_ollama_dropped_is_still_rendered_as_the_chat_template_does():
    render, found = derived("chatml")
    conversation = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]
    assert render_by_go(found.template, [conversation]) == [render(conversation, True)]


@pytest.mark.parametrize("place", ["left", "right", "both"])
def test_trimming_drops_every_character_that_python_calls_white_space_and_no_other(place):
    render, found = derived("gemma-3")
    beside = [*WHITESPACE, "\u200b", "\ufeff", "\u2060", "\u180e", "\0", "é", "\u00a1", "\u2fff"]
    contents = [{"left": c + "x", "right": "x" + c, "both": "\n" + c + " x y \t" + c + c}[place] for c in beside]
    contents += ["", " ", " \n" * 40, "\u3000", "\u00a0\u3000"]
    conversations = [[{"role": "user", "content": content}] for content in contents]
    _, wanted = rendered(render, found, conversations)
    assert render_by_go(found.template, conversations) == wanted


@pytest.mark.slow
def test_go_trims_forty_thousand_blanks_at_either_end():
    _, found = derived("gemma-3")
    conversation = [{"role": "user", "content": " " * 40_000 + "x" + "\n" * 40_000}]
    expected = "<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n"
    assert render_by_go(found.template, [conversation]) == [expected]


CONTENT = st.text(
    st.one_of(st.sampled_from([*WHITESPACE, *'{}<>"\\`%$.-|/*#']), st.characters(codec="utf-8")),
    max_size=12,
)


@st.composite
def conversations(draw):
    """Lists of conversations: a system prompt or none, one to five user messages, any contents."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        contents = draw(st.lists(CONTENT, min_size=1, max_size=9).filter(lambda contents: len(contents) % 2 == 1))
        messages = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        found.append(messages)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", chat_templates.MADE)
@settings(max_examples=15, deadline=None)
@given(conversations())
def test_go_and_jinja_agree_on_any_contents(name, generated):
    render, found = derived(name)
    kept, wanted = rendered(render, found, generated)
    assert render_by_go(found.template, kept) == wanted


WORDS = st.text(st.sampled_from("ab {}<\n\"'%-\u00a0é"), max_size=6).map(repr)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=9, max_size=9), st.booleans(), st.booleans())
def test_any_concatenation_by_role_is_derived(words, trims_user, folds):
    """Template text drawn at random, with and without trimming and folding, is said in Go to the letter."""
    before, system, user, after, answer, closing, prompt, joint, start = words
    trim = " | trim" if trims_user else ""
    head = f"{{{{ {start} }}}}" + (
        "{% set s = '' %}{% if messages[0].role == 'system' %}"
        f"{{% set s = messages[0].content + {joint} %}}{{% set messages = messages[1:] %}}{{% endif %}}"
        if folds
        else f"{{% if messages[0].role == 'system' %}}{{{{ {before} + messages[0].content + {system} }}}}"
        "{% set messages = messages[1:] %}{% endif %}"
    )
    fold = "(s if loop.first else '') + " if folds else ""
    chat_template = (
        head + "{% for m in messages %}{% if m.role == 'user' %}"
        f"{{{{ {user} + {fold}(m.content{trim}) + {after} }}}}{{% else %}}{{{{ {answer} + m.content + {closing} }}}}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )
    render = jinja_render(chat_template, TOKENS)
    found = derive_template(render)
    kept, wanted = rendered(render, found, CONVERSATIONS)
    assert render_by_go(found.template, kept) == wanted


@pytest.mark.slow
def test_no_template_holds_what_a_modelfile_would_lose():
    for name in FAMILIES:
        template = derived(name)[1].template
        assert '"""' not in template
        assert all(c.isprintable() or c in "\n\t" for c in template)
        assert not re.search(r"\{\{-|-\}\}", re.sub(r'"[^"]*"', "", template))


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{{ [][1:2] + 1 }}", "{{ '%d' % 'x' }}", "{{ 'x'.encode('no') }}"]
)
def test_whatever_a_template_raises_is_a_refusal_of_the_conversation(template):
    render = jinja_render(template, {})
    with pytest.raises(UserError, match="the chat template fails on a lone user message: "):
        derive_template(render)
