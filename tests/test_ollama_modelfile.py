"""The ollama-modelfile stage on a real tokenizer and GGUF, the sabotages it has to catch, and npm's second opinion."""

import dataclasses
import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from stages import ollama, ollama_modelfile
from stages.lib.answers import formats
from stages.lib.artifact.folder import write_artifact
from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError
from stages.lib.gguf.convert import run_converter
from stages.lib.ollama import modelfile
from stages.lib.ollama.derive import derive_template, jinja_render, rejects
from stages.lib.ollama.go import render_by_go
from stages.lib.ollama.proof import CONVERSATIONS
from stages.lib.recipe.tables import Format, Ollama
from stages.lib.report.figures import OllamaModelfileFigures, figures_of
from tests.support import chat_templates, tiny_models
from tests.support.npm import npm_folder

pytestmark = pytest.mark.slow

KNOBS = Ollama(
    quantization="q4_k_m", num_ctx=512, temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, license="Apache-2.0"
)
XML = Format("xml", system_prompt=formats.XML.system_prompt)
DATA = SimpleNamespace(max_prompt_tokens=192)
RECIPE = SimpleNamespace(format=XML, ollama=KNOBS, data=DATA)
GEMMA = tiny_models.CHAT_TEMPLATE


def inputs(folder: Path, chat_template: str) -> SimpleNamespace:
    """Write what merge and gguf hand on, less the weights, for a tokenizer with `chat_template`."""
    from transformers import Gemma3TextConfig

    model, gguf = folder / "merge" / "model", folder / "gguf"
    model.mkdir(parents=True)
    gguf.mkdir()
    rows = tiny_models.rows(200, seed=1)
    texts = [message["content"] for row in rows for message in row["prompt"] + row["completion"]]
    tokenizer = tiny_models.sentencepiece_tokenizer(model, texts)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(model)
    Gemma3TextConfig(vocab_size=len(tokenizer), architectures=["Gemma3ForCausalLM"]).save_pretrained(model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    file = gguf / "model.q4_k_m.gguf"
    run_converter([str(model), "--vocab-only", "--outfile", str(file)])
    return SimpleNamespace(model=model, gguf=gguf, file=file)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("gemma"), GEMMA)


def test_the_modelfile_holds_what_the_tokenizer_the_format_and_the_recipe_say(gemma, tmp_path):
    metrics = ollama_modelfile.make(RECIPE, gemma.model, gemma.gguf, tmp_path)
    assert metrics == {
        "conversations": 48,
        "stops": ["<eos>", "<end_of_turn>"],
        "system_prompt": True,
        "earlier_answers_as_trained": True,
        "file": "model.q4_k_m.gguf",
        "architecture": "gemma3",
        "prompted_by": "TEMPLATE",
    }
    assert (tmp_path / "model.q4_k_m.gguf").samefile(gemma.file)
    commands = modelfile.read(tmp_path / "Modelfile")
    assert [command for command in commands if command[0] != "template"] == [
        ("from", "./model.q4_k_m.gguf"),
        ("system", formats.XML.system_prompt),
        ("parameter stop", "<eos>"),
        ("parameter stop", "<end_of_turn>"),
        ("parameter num_ctx", "512"),
        ("parameter temperature", "0.5"),
        ("parameter top_p", "0.9"),
        ("parameter top_k", "40"),
        ("parameter min_p", "0.05"),
        ("parameter repeat_penalty", "1.0"),
        ("parameter num_predict", "320"),
        ("license", "Apache-2.0"),
    ]
    (template,) = modelfile.values(commands, "template")
    assert "<bos>" not in template
    asked = [{"role": "system", "content": "Think."}, {"role": "user", "content": " 6 * 7? "}]
    expected = "<start_of_turn>user\nThink.\n\n6 * 7?<end_of_turn>\n<start_of_turn>model\n"
    assert render_by_go(template, [asked]) == [expected]


def test_the_prompts_that_ollama_is_asked_for_are_those_of_the_chat_template_with_the_system_prompt(gemma, tmp_path):
    ollama_modelfile.make(RECIPE, gemma.model, gemma.gguf, tmp_path)
    written = json.loads((tmp_path / "prompts.json").read_text())
    assert (written["bos"], len(written["prompts"])) == ("<bos>", 48)
    assert written["prompts"][0] == {
        "messages": [{"role": "user", "content": "What is 6 times 7?"}],
        "prompt": f"<start_of_turn>user\n{formats.XML.system_prompt}\n\nWhat is 6 times 7?<end_of_turn>\n"
        "<start_of_turn>model\n",
    }
    assert written["prompts"][1]["prompt"].startswith("<start_of_turn>user\nYou are a careful tutor.\n\nWhat is 6 t")


def test_the_recipes_system_prompt_takes_the_place_of_the_formats(gemma, tmp_path):
    recipe = SimpleNamespace(format=Format("xml", system_prompt='Say "why" first.'), ollama=KNOBS, data=DATA)
    ollama_modelfile.make(recipe, gemma.model, gemma.gguf, tmp_path)
    assert modelfile.values(modelfile.read(tmp_path / "Modelfile"), "system") == ['Say "why" first.']


THOUGHT = GEMMA.replace("{{ '<start_of_turn>model\n' }}", "{{ '<start_of_turn>model\n<think>\n' }}{# </think> #}")


@pytest.mark.parametrize(
    ("chat_template", "prompted_by", "parsers"),
    [
        (GEMMA + "{# tools #}", "the GGUF file", []),
        (THOUGHT, "TEMPLATE by PARSER", ["passthrough"]),  # the whole answer would be thought to Ollama
    ],
)
def test_what_ollama_prompts_with_is_said_and_template_comes_back_where_an_answer_would_be_lost(
    tmp_path, chat_template, prompted_by, parsers
):
    given = inputs(tmp_path, chat_template)
    figures = ollama_modelfile.make(RECIPE, given.model, given.gguf, tmp_path)
    assert (figures["prompted_by"], figures["conversations"]) == (prompted_by, 48)
    assert modelfile.values(modelfile.read(tmp_path / "Modelfile"), "parser") == parsers


def test_the_gguf_is_copied_where_it_cannot_be_linked(gemma, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr("os.link", no_links)
    ollama_modelfile.make(RECIPE, gemma.model, gemma.gguf, tmp_path)
    assert (tmp_path / "model.q4_k_m.gguf").read_bytes() == gemma.file.read_bytes()


def test_the_stage_writes_a_finished_artifact_once(gemma, tmp_path, monkeypatch):
    folders = {}
    for stage, content in (("merge", gemma.model), ("gguf", gemma.file)):
        folders[stage] = tmp_path / stage
        with write_artifact(folders[stage], stage, {}, {}) as run:
            if content.is_dir():
                shutil.copytree(content, run.folder / "model")
            else:
                shutil.copy(content, run.folder)
    recipe = SimpleNamespace(**vars(RECIPE), tables=lambda *names: {name: str(getattr(RECIPE, name)) for name in names})
    monkeypatch.setattr(ollama_modelfile, "read_recipe", lambda _: recipe)
    out = tmp_path / "ollama-modelfile"
    asked = ["--recipe", __file__, "--out", str(out)]
    asked += [word for stage, folder in folders.items() for word in (f"--{stage}", str(folder))]
    first = CliRunner().invoke(ollama_modelfile.main, asked, catch_exceptions=False)
    assert first.exit_code == 0
    assert f"ollama-modelfile: finished {out}" in first.output
    assert "Ollama prompts with TEMPLATE: 48 conversations are rendered as in training\n" in first.output
    manifest = read_manifest(out, "ollama-modelfile")
    assert sorted(manifest["files"]) == ["Modelfile", "model.q4_k_m.gguf", "prompts.json"]
    assert sorted(manifest["recipe"]) == ["data", "format", "ollama"]
    assert manifest["recipe"]["data"] == {"max_prompt_tokens": 192}
    assert figures_of(manifest, OllamaModelfileFigures)["conversations"] == 48
    second = CliRunner().invoke(ollama_modelfile.main, asked, catch_exceptions=False)
    assert "ollama-modelfile: up to date" in second.output


def test_a_missing_quantization_is_named(gemma, tmp_path):
    recipe = SimpleNamespace(format=XML, ollama=dataclasses.replace(KNOBS, quantization="q8_0"), data=DATA)
    with pytest.raises(UserError, match="holds 0 files of the type 'q8_0'"):
        ollama_modelfile.make(recipe, gemma.model, gemma.gguf, tmp_path)


# Sabotage


@pytest.fixture(scope="session")
def made(gemma, tmp_path_factory):
    """A finished Modelfile, to be damaged, and what it is proven against."""
    folder = tmp_path_factory.mktemp("made")
    ollama_modelfile.make(RECIPE, gemma.model, gemma.gguf, folder)
    tokens = {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}
    render = jinja_render(GEMMA, tokens)
    return SimpleNamespace(path=folder / "Modelfile", render=render, derived=derive_template(render, "<bos>"))


CHATML = derive_template(jinja_render(chat_templates.CHATML, {})).template


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<start_of_turn>user\n", "<start_of_turn>user \n", "instead of '\\nWhat is 6 times 7?"),
        ("<start_of_turn>user\n", "<start_of_turn>user", "does not prompt as the chat template of training does"),
        ("{{$.System}}\n\n", "{{$.System}}\n", "careful tutor"),
        ('{{template "trim-all-all" .Content}}<end', "{{.Content}}<end", "conversation:"),
        ("{{range .Messages}}{{if", "<bos>{{range .Messages}}{{if", "it has 'bos>"),
        ("TEMPLATE", "CHATML", "does not prompt as the chat template of training does; from character 2"),
        ("{{end}}{{end}}{{end}}", "{{end}}{{end}}", "Go can't render the TEMPLATE"),
        ('PARAMETER stop "<end_of_turn>"\n', "", "the stop '<end_of_turn>' is missing"),
        ('PARAMETER stop "<eos>"\n', "", "the stop '<eos>' is missing"),
        ("PARAMETER num_ctx", 'PARAMETER stop "</answer>"\nPARAMETER num_ctx', "'</answer>' is a part of every answer"),
        ("Respond in the following", "Answer in the following", "SYSTEM is .* expected the format's"),
        ("PARAMETER temperature 0.5\n", "", "PARAMETER temperature is not 0.5; expected the recipe's value"),
        ("PARAMETER top_k 40", "PARAMETER top_k 4", "PARAMETER top_k is not 40"),
        ("PARAMETER num_predict 320\n", "", "PARAMETER num_predict is not 320"),
        ("SYSTEM", "PARSER passthrough\nSYSTEM", r"PARSER is \['passthrough'\]; expected \[\], by which Ollama"),
        ("FROM ./model", "FROM ./other", "FROM ./other.q4_k_m.gguf names no file beside it"),
        ('"""\nSYSTEM', "\nSYSTEM", "SYSTEM is"),
    ],
)
def test_a_damaged_modelfile_is_caught_and_the_cause_is_named(made, old, new, message):
    text = made.path.read_text()
    assert old in text
    if new == "CHATML":
        (template,) = modelfile.values(modelfile.read(made.path), "template")
        damaged = text.replace(template, CHATML)
    else:
        damaged = text.replace(old, new)
    path = made.path.with_name("Damaged")
    path.write_text(damaged)
    with pytest.raises(UserError, match=message.replace("\\n", r"\\n")):
        ollama_modelfile.prove(path, made.render, made.derived, ["<eos>", "<end_of_turn>"], RECIPE, passthrough=False)


def test_a_difference_is_shown_with_the_conversation_and_both_texts(made):
    path = made.path.with_name("Damaged")
    path.write_text(made.path.read_text().replace("<start_of_turn>model\n{{end}}", "<start_of_turn>model\n\n{{end}}"))
    with pytest.raises(UserError) as caught:
        ollama_modelfile.prove(path, made.render, made.derived, [], RECIPE, passthrough=False)
    assert caught.value.message.splitlines() == [
        f"{path}: the TEMPLATE does not prompt as the chat template of training does; "
        "from character 74 on it has '\\n' instead of ''",
        '  conversation:  [{"role": "user", "content": "What is 6 times 7?"}]',
        "  chat template: '<start_of_turn>user\\nWhat is 6 times 7?<end_of_turn>\\n<start_of_turn>model\\n'",
        "  Modelfile:     '<start_of_turn>user\\nWhat is 6 times 7?<end_of_turn>\\n<start_of_turn>model\\n\\n'",
    ]


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (GEMMA.replace("<start_of_turn>user\n", "<start_of_turn>user \n"), "from character 243 on it has"),
        (chat_templates.CHATML, "has another chat template than the merged model's tokenizer"),
    ],
)
def test_a_chat_template_changed_after_the_gguf_was_made_is_caught(gemma, chat_template, message):
    found = derive_template(jinja_render(chat_template, {"bos_token": "<bos>"}), "<bos>")
    with pytest.raises(UserError, match=message):
        ollama_modelfile.check_gguf(gemma.file, chat_template, found)


def test_a_bos_that_the_chat_template_does_not_write_is_caught(tmp_path):
    bare = GEMMA.replace("{{ bos_token }}", "")
    given = inputs(tmp_path, bare)
    with pytest.raises(UserError, match="a prompt with one BOS; expected no BOS, as in the chat template of training"):
        ollama_modelfile.make(RECIPE, given.model, given.gguf, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("m['content'] | trim", "m['content'] | trim | replace('7', 'seven')", "seven"),
        ("m['content'] | trim", "(m['content'] | trim or '(nothing)')", r"\(nothing\)"),
        ("{{ bos_token }}", "{{ bos_token + strftime_now('%Y') }}", "today's date"),
        ("+ m['content'] | trim +", "+ '#' + m['content'] | trim | upper +", "conversation"),
        (
            "{% set system = messages[0]['content'] + '\n\n' %}",
            "{{ raise_exception('no system prompts') }}",
            "the chat template refuses system messages or leaves them out, but the format xml has a system prompt",
        ),
    ],
)
def test_a_template_that_go_cannot_follow_fails_the_stage(gemma, tmp_path, monkeypatch, old, new, message):
    assert old in GEMMA
    copy = shutil.copytree(gemma.model, tmp_path / "model")
    (copy / "chat_template.jinja").write_text(GEMMA.replace(old, new))
    monkeypatch.setattr(ollama_modelfile, "check_gguf", lambda *_: None)
    with pytest.raises(UserError, match=message):
        ollama_modelfile.make(RECIPE, copy, gemma.gguf, tmp_path)


# Stops


@pytest.mark.parametrize(
    ("ends", "name", "stops"),
    [
        (["<eos>", "<end_of_turn>"], "xml", ["<eos>", "<end_of_turn>"]),
        (["<|endoftext|>", "<|im_end|>"], "think", ["<|endoftext|>", "<|im_end|>"]),
        (["</s>", "</answer>"], "xml", ["</s>"]),
    ],
)
def test_the_stops_are_the_end_tokens_and_never_a_tag_of_the_answer(ends, name, stops):
    assert ollama_modelfile.stop_strings(ends, formats.get(name)) == stops


def test_a_stop_of_the_format_that_no_answer_holds_is_kept():
    answers = dataclasses.replace(formats.XML, stops=("</answer>", "\nQuestion:"))
    assert ollama_modelfile.stop_strings(["<eos>"], answers) == ["<eos>", "\nQuestion:"]


@pytest.mark.parametrize("name", formats.FORMATS)
def test_an_answer_as_ollama_cuts_it_is_still_well_formed(name):
    answers = formats.get(name)
    answer = answers.write(formats.Answer("6 * 7 = 42", "42"))
    sent = answer + "<end_of_turn>\n"
    for stop in ollama_modelfile.stop_strings(["<eos>", "<end_of_turn>"], answers):
        sent = sent.split(stop)[0]
    assert answers.read(sent) == formats.Answer("6 * 7 = 42", "42")


# A second opinion: @huggingface/ollama-utils, which turns chat templates into Go for the hub

# By chat template, the conversations without blanks at the ends and without empty contents on which its template and
# ours prompt alike. It is approximate by design: it picks a template of Ollama's library by the special tokens. Where
# it differs, the chat template itself agrees with us.
ALIKE = {
    "Bielik-11B-v3.0-Instruct": {"none", "system"},
    "LFM2-8B-A1B": {"none", "system"},
    "LFM2.5-Instruct": {"none", "system"},
    "Qwen3-Coder": {"none", "system"},
    "deepseek-ai-DeepSeek-V4": {"none", "system"},
    "ibm-granite-granite-4.0": {"none", "system"},
    "microsoft-Phi-3.5-mini-instruct": {"none", "system"},
    "openbmb-MiniCPM5-1B": {"none", "system"},
    "qwen-3 with think": {"none", "system"},
    "google-gemma-2-2b-it": {"none"},  # takes no system prompt
    "gemma-3": {"none"},  # theirs makes the system prompt a turn of its own
    "Qwen-Qwen2.5-7B-Instruct": {"system"},  # theirs leaves out the default system prompt
    "HuggingFaceTB-SmolLM3-3B": {"system"},  # the same
    "moonshotai-Kimi-K2": {"system"},  # the same
    "meta-llama-Llama-3.1-8B-Instruct": set(),  # theirs leaves out the line "Today Date: 26 Jul 2024"
    "phi-4": set(),  # theirs adds line breaks
    "Qwen-Qwen3-0.6B": set(),  # theirs begins the answer with <think>
}


@pytest.fixture(scope="session")
def converted():
    """What npm's package makes of each chat template in `ALIKE`."""
    known = {**chat_templates.llama_cpp(), **chat_templates.MADE}
    asked = {name: {"chat_template": known[name], "bos_token": "<bos>", "eos_token": "</s>"} for name in ALIKE}
    convert = ["node", "convert.js"]
    done = subprocess.run(convert, cwd=npm_folder(), input=json.dumps(asked), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return {name: (known[name], answer) for name, answer in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", ALIKE)
def test_a_second_opinion_agrees_where_it_claims_to_hold(converted, name):
    chat_template, theirs = converted[name]
    render = jinja_render(chat_template, {"bos_token": "<bos>", "eos_token": "</s>"})
    found = derive_template(render, "<bos>")
    kinds: dict[str, list] = {"none": [], "system": []}
    for conversation in CONVERSATIONS:
        plain = all(message["content"].strip() == message["content"] != "" for message in conversation)
        if plain and not rejects(render, conversation):
            kinds["system" if conversation[0]["role"] == "system" else "none"].append(conversation)
    assert [len(conversations) for conversations in kinds.values()] == [12, 10 if found.takes_system else 0]
    alike = set()
    for kind, conversations in kinds.items():
        by_us = render_by_go(found.template, conversations)
        by_them = render_by_go(theirs["template"], conversations)
        if conversations and [text.removeprefix("<bos>") for text in by_them] == by_us:
            alike.add(kind)
    assert alike == ALIKE[name]


# make ollama


def test_without_ollama_it_is_said_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    ollama.create_and_ask("tiny", Path("artifacts/tiny/ollama-modelfile"), "What's 6 * 7?")
    assert capsys.readouterr().out.splitlines() == [
        "ollama is not installed here (https://ollama.com/download). On a machine with it, run:",
        "  cd artifacts/tiny/ollama-modelfile",
        "  ollama create tiny -f Modelfile",
        "  ollama run tiny 'What'\"'\"'s 6 * 7?'",
    ]


PLAIN = [{"role": "user", "content": "6 * 7?"}]
BLANK = [{"role": "user", "content": " 6 * 7? "}]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An ollama program and server that write down what they are asked, and a model's folder; `shows` is the prompt."""
    program = tmp_path / "ollama"
    program.write_text('#!/bin/sh\necho "$(basename "$PWD"): $*"\n[ "$1" != "$FAILS" ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    known = SimpleNamespace(folder=tmp_path / "model", asked=[], shows=lambda messages: messages[-1]["content"])

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known.asked.append((self.path, request["model"], request["stream"], request["_debug_render_only"]))
            shown = known.shows(request["messages"])
            self.send_response(200 if shown is not None else 400)
            self.end_headers()
            self.wfile.write(json.dumps(shown if isinstance(shown, dict) else {
                "_debug_info": {"rendered_template": shown}, "error": "no such model"}).encode())  # fmt: skip

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"0.0.0.0:{server.server_port}")  # as a server's own setting may be
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    known.folder.mkdir()
    prompts = [{"messages": each, "prompt": each[-1]["content"]} for each in (PLAIN, BLANK)]
    (known.folder / "prompts.json").write_text(json.dumps({"bos": "<bos>", "prompts": prompts}))
    yield known
    server.shutdown()
    server.server_close()


def test_with_ollama_the_model_is_created_in_its_folder_its_prompts_compared_and_asked_once(served, capfd, monkeypatch):
    served.shows = lambda messages: "<bos>" + messages[-1]["content"]
    ollama.create_and_ask("tiny", served.folder, "6 * 7?")
    assert capfd.readouterr().out.splitlines() == [
        "model: create tiny -f Modelfile",
        "Ollama prompts as training did in 2 of 2 conversations.",
        "model: run tiny 6 * 7?",
    ]
    assert served.asked == [("/api/chat", "tiny", False, True)] * 2
    monkeypatch.setenv("FAILS", "run")
    with pytest.raises(UserError, match=r"ollama run tiny failed in .* with exit code 1. Run: ollama serve"):
        ollama.create_and_ask("tiny", served.folder, "6 * 7?")


def test_a_prompt_of_ollama_that_differs_from_training_is_shown_beside_it(served):
    served.shows = lambda messages: messages[-1]["content"].strip() + "!"
    with pytest.raises(UserError, match="tiny: Ollama prompts otherwise than training did:") as caught:
        ollama.create_and_ask("tiny", served.folder, "6 * 7?")
    assert caught.value.message.splitlines()[1:4] == [
        '  conversation: [{"role": "user", "content": "6 * 7?"}]',
        "  training:     '6 * 7?'",
        "  Ollama:       '6 * 7?!'",
    ]


def test_a_prompt_that_differs_only_in_blanks_that_no_run_asks_is_counted(served, capfd):
    served.shows = lambda messages: messages[-1]["content"].strip()
    ollama.create_and_ask("tiny", served.folder, "6 * 7?")
    assert capfd.readouterr().out.splitlines()[1] == (
        "Ollama prompts as training did in 1 of 2 conversations; the other 1 have a text with blanks at its ends, or "
        "none."
    )


def test_an_ollama_that_shows_no_prompts_is_asked_all_the_same(served, capfd):
    served.shows = lambda _: {"message": {"role": "assistant", "content": "42"}}
    ollama.create_and_ask("tiny", served.folder, "6 * 7?")
    said = capfd.readouterr().out.splitlines()
    assert said[1:] == ["This Ollama does not show its prompts, so they were not compared.", "model: run tiny 6 * 7?"]


def test_a_server_that_refuses_or_is_not_there_is_named(served, monkeypatch):
    served.shows = lambda _: None
    with pytest.raises(UserError, match=r"Ollama refused the conversation .*no such model"):
        ollama.create_and_ask("tiny", served.folder, "6 * 7?")
    monkeypatch.setenv("OLLAMA_HOST", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9: Ollama's server does not answer: .*Run: ollama serve"):
        ollama.create_and_ask("tiny", served.folder, "6 * 7?")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),  # noqa: S104  as a server's own setting may be
        ("gpu-box:8080", "http://gpu-box:8080"),
        ("https://example.org:443/", "https://example.org:443"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_ollama_host_is_read_as_ollamas_client_reads_it(monkeypatch, host, address):
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert ollama.address() == address
