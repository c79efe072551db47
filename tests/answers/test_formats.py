"""The answer formats: what is well formed, and that reading undoes writing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.lib.answers.formats import FORMATS, THINK, XML, Answer, get
from stages.lib.errors import UserError

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<think>", "</think>", "<SOLUTION>", "</SOLUTION>"]
PIECES = [
    *TAGS, "<", ">", "</", "answer", "<answer", "think>", "<<think", "42", " ", "\n", "\t", "\u00a0", "\x1c", "a", "é",
    "\U0001f600",
]  # fmt: skip
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@settings(max_examples=1000)
@given(reasoning=texts, answer=texts)
def test_reading_gives_what_was_written_or_writing_refuses(format, reasoning, answer):
    own = (format.reasoning_open, format.reasoning_close, format.answer_open, format.answer_close)
    sayable = reasoning.strip() and answer.strip() and not any(tag in reasoning + "|" + answer for tag in own)
    if sayable:
        completion = format.write(Answer(reasoning, answer))
        assert format.read(completion) == Answer(reasoning.strip(), answer.strip())
        assert format.is_exact(format.split(completion))
    else:
        with pytest.raises(ValueError, match=r"empty|holds <"):
            format.write(Answer(reasoning, answer))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@settings(max_examples=1000)
@given(completion=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_what_can_be_read_can_be_written_and_read_again(format, completion):
    answer = format.read(completion)
    if answer is not None:
        assert format.read(format.write(answer)) == answer
        assert all(completion.count(tag) == 1 for tag in format.tags)


def test_xml_is_written_with_its_tags_on_lines_of_their_own():
    written = XML.write(Answer(" 6 x 7\n= 42\n", "42"))
    assert written == "<reasoning>\n6 x 7\n= 42\n</reasoning>\n<answer>\n42\n</answer>"


def test_think_is_written_without_the_tag_that_the_generation_prompt_holds():
    assert THINK.write(Answer("6 x 7\n= 42", " 42 ")) == "6 x 7\n= 42</think><SOLUTION>42</SOLUTION>"
    assert THINK.generation_prefix.strip() == THINK.reasoning_open == "<think>"


@pytest.mark.parametrize(
    ("format", "completion"),
    [
        (XML, "<reasoning>a</reasoning><answer>42</answer>"),
        (XML, "\n\n <reasoning> a\n</reasoning>\r\n\t<answer>\u00a042 </answer> \n\n"),
        (THINK, "\na\n</think>\n\n<SOLUTION>\n42\n</SOLUTION>\n"),
        (THINK, "a </think> <SOLUTION> 42 </SOLUTION>"),
    ],
)
def test_white_space_around_tags_is_forgiven(format, completion):
    assert format.read(completion) == Answer("a", "42")


@pytest.mark.parametrize(
    ("format", "completion"),
    [
        (XML, "<reasoning>a</reasoning><answer>42</answer>."),
        (XML, ".<reasoning>a</reasoning><answer>42</answer>"),
        (XML, "<reasoning>a</reasoning>.<answer>42</answer>"),
        (XML, "<reasoning>a</reasoning><answer>42</answer><answer>43</answer>"),
        (XML, "<reasoning>a<answer>42</answer></reasoning>"),
        (XML, "<answer>42</answer><reasoning>a</reasoning>"),
        (XML, "<reasoning>a</reasoning><answer>42"),
        (XML, "<reasoning>a</reasoning><answer></answer>"),
        (XML, "<reasoning>\n</reasoning><answer>42</answer>"),
        (XML, "<reasoning>a</answer><answer>42</reasoning>"),
        (XML, "<Reasoning>a</Reasoning><Answer>42</Answer>"),
        (XML, "<reasoning>a</reasoning><answer>42</answer>\u200b"),
        (XML, "a</think><SOLUTION>42</SOLUTION>"),
        (THINK, "<think>a</think><SOLUTION>42</SOLUTION>"),
        (THINK, "a<think>b</think><SOLUTION>42</SOLUTION>"),
        (THINK, "a</think><SOLUTION><think>42</SOLUTION>"),
        (THINK, "a</think><SOLUTION>42</SOLUTION><|im_end|>"),
        (THINK, "a</think>b</think><SOLUTION>42</SOLUTION>"),
        (THINK, "a</think>.<SOLUTION>42</SOLUTION>"),
        (THINK, "</think><SOLUTION>42</SOLUTION>"),
        (THINK, "<SOLUTION>42</SOLUTION>"),
        (THINK, "a<SOLUTION>42</SOLUTION></think>"),
        (THINK, ""),
    ],
)
def test_anything_but_one_thought_and_then_one_answer_is_not_well_formed(format, completion):
    assert format.read(completion) is None


@pytest.mark.parametrize(
    ("completion", "exact"),
    [
        ("<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", True),
        ("<reasoning>\na\n\nb\n</reasoning>\n<answer>\n42\n</answer>\n", True),
        ("<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>\n\n", False),
        ("<reasoning>\na\n</reasoning>\n<answer>42</answer>", False),
        ("<reasoning>a\n</reasoning>\n<answer>\n42\n</answer>", False),
        ("<reasoning>\na\n</reasoning>\n\n<answer>\n42\n</answer>", False),
        ("\n<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", False),
    ],
)
def test_exact_means_that_each_tag_has_a_line_of_its_own(completion, exact):
    assert XML.is_exact(XML.split(completion)) is exact


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<SOLUTION>", "</SOLUTION>"])
def test_writing_a_tag_of_the_format_names_the_tag(tag):
    with pytest.raises(ValueError, match=f"holds {tag},"):
        THINK.write(Answer(f"a {tag} b", "42"))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_the_stop_string_ends_every_written_completion_and_the_system_prompt_names_every_tag(format):
    assert format.write(Answer("a", "42")).endswith(format.stops)
    assert all(tag in format.system_prompt for tag in (*format.tags, format.reasoning_open))


@pytest.mark.parametrize("options", [{}, {"trim_blocks": True, "lstrip_blocks": True}])
def test_the_chat_template_puts_the_completion_right_after_the_generation_prompt(options):
    template = ImmutableSandboxedEnvironment(**options).from_string(THINK.chat_template)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 x 7?"}]
    completion = THINK.write(Answer("It is 42.", "42"))
    rendered = template.render(messages=prompt, eos_token="<eos>", add_generation_prompt=True)
    assert rendered == "Be brief.<eos>6 x 7?\n<think>\n"
    whole = template.render(messages=[*prompt, {"role": "assistant", "content": completion}], eos_token="<eos>")
    assert whole == rendered + "It is 42.</think><SOLUTION>42</SOLUTION><eos>"


def test_an_unknown_format_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'xm1'.*did you mean 'xml'"):
        get("xm1")
    assert get("think") is THINK
