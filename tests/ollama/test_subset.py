"""Our own renderer of Go templates against Go: the rules of Ollama's messages, and the edges of the subset."""

import pytest

from stages.lib.ollama.go import go_helper, render_by_go
from stages.lib.ollama.proof import CONVERSATIONS, render_go
from stages.lib.ollama.subset import NotInSubset
from tests.support import gotemplate


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("template", "conversation", "text"),
    [
        ("{{range .Messages}}[{{.Role}}:{{.Content}}]{{end}}", "u:a u:b", "[user:a\n\nb]"),
        ("{{range .Messages}}[{{.Role}}:{{.Content}}]{{end}}", "s:a u:b s:c", "[system:a][user:b][system:c]"),
        ("{{range .Messages}}{{end}}{{.System}}", "s:a u:b s:c", "a\n\nc"),
        ("{{range .Messages}}{{end}}<{{.System}}>", "u:a", "<>"),
        ("{{range $i, $_ := .Messages}}{{if eq (len (slice $.Messages $i)) 1}}{{.Role}}{{end}}{{end}}", "u:a", "user"),
        ('{{$x := "a"}}{{range .Messages}}{{$x}}{{$x = .Content}}{{end}}{{$x}}', "u:b a:c", "abc"),
        ('{{$x := "a"}}{{range .Messages}}{{$x := .Content}}{{$x}}{{end}}{{$x}}', "u:b a:c", "bca"),
        ('{{range .Messages}}{{if eq .Role "a" "user"}}1{{else if not .Content}}2{{else}}3{{end}}{{end}}', "u:x a: s:y",
         "123"),
        ('{{range .Messages}}{{if and (ge (len .Content) 2) (eq (slice .Content 0 2) "é")}}1{{else}}0{{end}}{{end}}',
         "u:é a:e", "10"),
        ('{{define "t"}}<{{.}}>{{end}}{{range .Messages}}{{template "t" .Content}}{{end}}', "u:b", "<b>"),
        ('{{range .Messages}}{{printf "%.1s" .Content}}|{{end}}', "u:日本 a:", "日||"),
        ('{{range .Messages}}{{end}}{{"\\"\\\\\\n\\t\\u00e9\\U0001f989"}}', "u:x", '"\\\n\té🦉'),
        ("} }} {% {{range .Messages}}{{end}} }}", "u:x", "} }} {%  }}"),
    ],
)  # fmt: skip
def test_go_and_our_renderer_agree(template, conversation, text):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [message(roles[word[0]], word[2:]) for word in conversation.split(" ")]
    assert render_by_go(gotemplate.program(), template, [messages]) == [text]
    assert render_go(template, messages) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{json .Messages}}",
        "{{- .System}}",
        "{{.System -}}",
        "{{.System | printf}}",
        "{{with .System}}{{.}}{{end}}",
        "{{/* nothing */}}",
        "{{.Tools}}",
        "{{$x}}",
        "{{`raw`}}",
        "{{.Messages}}",
        "{{len .System}}",
        "{{if .System}}",
        "{{end}}",
        "{{else}}",
        "{{.System",
        "{{}}",
        "{{range .Messages}}{{.Content.Length}}{{end}}",
        "{{index .Messages 0}}",
        "{{or .System .System}}",
        '{{printf "%d" 1}}',
        '{{template "missing" .}}',
        "{{range .Messages}}{{slice .Content 9}}{{end}}",
        "{{$x = .System}}",
    ],
)
def test_what_is_beyond_the_rules_is_refused_and_never_guessed(template):
    with pytest.raises(NotInSubset):
        render_go(template, [message("user", "x")])


def test_go_says_why_it_refuses_a_template():
    with pytest.raises(ValueError, match="unexpected EOF"):
        render_by_go(gotemplate.program(), "{{range .Messages}}", [[message("user", "x")]])
    with pytest.raises(ValueError, match=r"conversation 2: .*index out of range"):
        render_by_go(
            gotemplate.program(),
            "{{range .Messages}}{{slice .Content 1}}{{end}}",
            [[message("user", "x")], [message("user", "")]],
        )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{.System}}|{{.Prompt}}|{{.Response}}.", "s|q1|a1.|q2|"),
        ("{{.System}}|{{.Prompt}}|", "s|q1|a1|q2|"),
        ("{{if .Prompt}}U{{.Prompt}}{{end}}A{{.Response}}{{if .Response}}E{{end}}", "Uq1Aa1EUq2A"),
    ],
)
def test_a_template_of_the_older_kind_is_run_once_for_each_exchange(template, text):
    conversation = [message("system", "s"), message("user", "q1"), message("assistant", "a1"), message("user", "q2")]
    assert render_by_go(gotemplate.program(), template, [conversation] * 2) == [text] * 2


def test_there_are_enough_conversations_of_every_kind():
    conversations = CONVERSATIONS
    assert len(conversations) == 48
    assert len({str(each) for each in conversations}) == 48
    users = {sum(message["role"] == "user" for message in each) for each in conversations}
    assert users == {1, 2, 3, 4, 5}
    assert sum(each[0]["role"] == "system" for each in conversations) == 24
    assert all(each[-1]["role"] == "user" for each in conversations)


def test_the_helper_is_looked_for_beside_this_python_and_then_on_path(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.prefix", str(tmp_path / "env"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert go_helper() is None
    for folder in ("path", "env/bin"):
        program = tmp_path / folder / "temper-gotemplate"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert go_helper() == program
