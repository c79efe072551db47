"""What a Go template is compared on, and what the comparison refuses."""

import pytest

from stages.lib.errors import UserError
from stages.lib.ollama.derive import derive_template, jinja_render
from stages.lib.ollama.proof import CONVERSATIONS, compare_renderings
from tests.support import chat_templates


def test_there_are_enough_conversations_of_every_kind():
    assert len(CONVERSATIONS) == 48
    assert len({str(each) for each in CONVERSATIONS}) == 48
    users = {sum(message["role"] == "user" for message in each) for each in CONVERSATIONS}
    assert users == {1, 2, 3, 4, 5}
    assert sum(each[0]["role"] == "system" for each in CONVERSATIONS) == 24
    assert all(each[-1]["role"] == "user" for each in CONVERSATIONS)


def test_a_template_is_compared_on_the_conversations_that_the_chat_template_takes():
    render = jinja_render(chat_templates.CHATML, {})
    assert compare_renderings("here", derive_template(render).template, render, "") == 48
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + chat_templates.CHATML
    render = jinja_render(no_system, {})
    assert compare_renderings("here", derive_template(render).template, render, "") == 24


def test_a_chat_template_that_takes_too_few_of_them_is_refused():
    one_turn = "{% if messages[1:] %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}"
    with pytest.raises(UserError, match="here: the chat template renders 15 of 48 conversations; expected at least 20"):
        compare_renderings("here", "{{range .Messages}}{{.Content}}{{end}}", jinja_render(one_turn, {}), "")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{range .Messages}}{{.Content}}{{end}}", "from character 1 on it has 'What is 6 times 7.' instead of '<|im_"),
        ("{{range .Messages}}", "here: Go can't render the TEMPLATE: .*unexpected EOF"),
    ],
)
def test_a_template_that_prompts_otherwise_or_not_at_all_is_refused(template, message):
    with pytest.raises(UserError, match=message):
        compare_renderings("here", template, jinja_render(chat_templates.CHATML, {}), "")
