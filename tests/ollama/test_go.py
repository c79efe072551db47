"""Go's text/template in the helper: the rules of Ollama's messages, its refusals, and where the helper is found."""

import os

import pytest

from stages.lib.errors import UserError
from stages.lib.ollama.go import render_by_go


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
def test_messages_reach_a_template_as_ollama_hands_them_over(template, conversation, text):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [message(roles[word[0]], word[2:]) for word in conversation.split(" ")]
    assert render_by_go(template, [messages]) == [text]


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
    assert render_by_go(template, [conversation] * 2) == [text] * 2


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{range .Messages}}", "unexpected EOF"),
        ("{{range .Messages}}{{slice .Content 1}}{{end}}", "conversation 2: .*index out of range"),
        ("{{range .Messages}}{{.Content.Length}}{{end}}", "conversation 1: .*can't evaluate field Length"),
        ("{{range .Messages}}{{end}}{{trim .System}}", 'function "trim" not defined'),
        ('{{range .Messages}}{{template "missing" .}}{{end}}', 'template "missing" not defined'),
    ],
)
def test_go_says_why_it_refuses_a_template(template, reason):
    with pytest.raises(ValueError, match=reason):
        render_by_go(template, [[message("user", "x")], [message("user", "")]])


def test_the_helper_is_looked_for_beside_this_python_and_then_on_path(tmp_path, monkeypatch):
    beside, path = tmp_path / "env" / "bin", tmp_path / "path"
    monkeypatch.setattr("sys.prefix", str(tmp_path / "env"))
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    for folder in (path, beside):
        folder.mkdir(parents=True)
        program = folder / "temper-gotemplate"
        program.write_text(f'#!/bin/sh\necho \'{{"texts": ["{folder.name}"]}}\'\n')
        program.chmod(0o755)
        assert render_by_go("", [[]]) == [folder.name]


def test_without_the_helper_it_is_said_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        render_by_go("", [[]])
    assert caught.value.message == (
        "temper-gotemplate, which renders a Modelfile's template by Go, is neither in "
        f"{tmp_path}/bin nor on PATH; expected it beside the packages. Run: make setup"
    )
