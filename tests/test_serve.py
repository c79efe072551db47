"""`make serve`, asked by OpenAI's own client: the server runs in a process of its own on a free port."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from stages import serve
from stages.lib.serve.server import AsModelfile, application, complete_request
from stages.lib.serve.setting import Setting, read_setting
from tests.support import tiny_models

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[1]
SETTING = Setting(
    Path("x.gguf"), "Be brief.", ["<end>"], 64, {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.0}
)
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


def arguments(port: int) -> list[str]:
    folder = tiny_models.modelfile()
    recipe = tiny_models.made() / "tiny.toml"
    return ["--recipe", str(recipe), "--ollama-modelfile", str(folder), "--port", str(port)]


@contextmanager
def running() -> Iterator[tuple[subprocess.Popen, str]]:
    """Give the server's process and address."""
    command = [sys.executable, "-m", "stages.serve", *arguments(0)]
    environment = {"PATH": "/usr/bin", "N_CTX": "7", "MODEL_ALIAS": "other", "CONFIG_FILE": "/nothing", "API_KEY": "x"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        yield process, re.search(r"http://127\.0\.0\.1:\d+/v1", line)[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as (_, address):
        yield address


@pytest.fixture
def client(address):
    import openai

    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def test_the_models_are_the_one_that_the_recipe_made(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_chat_is_answered_in_the_format_and_ends_at_the_end_token(client):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content.endswith("</answer>")


def test_without_a_system_message_the_prompt_is_that_of_training(client):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models.merged() / "model")
    system = read_setting(tiny_models.modelfile()).system
    conversation = [{"role": "system", "content": system}, *QUESTION]
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    plain = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert plain.usage.prompt_tokens == len(expected)
    stated = client.chat.completions.create(model="tiny", messages=conversation)
    assert stated.choices[0].message.content == plain.choices[0].message.content
    other = client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "No."}, *QUESTION])
    assert other.usage.prompt_tokens < len(expected)


def test_a_stream_gives_the_same_text_in_pieces(client):
    whole = client.chat.completions.create(model="tiny", messages=QUESTION).choices[0]
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.message.content
    assert sum(piece != "" for piece in pieces) > 3
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_two_streams_at_once_are_both_whole(client):
    texts = []

    def ask() -> None:
        chunks = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
        texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts)) == 1
    assert texts[0].endswith("</answer>")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_is_kept(client, name):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, **{name: 3})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_a_clients_own_stop_comes_on_top(client):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, stop="</answer>")
    assert answer.choices[0].finish_reason == "stop"
    assert "<answer>" in answer.choices[0].message.content
    assert "</answer>" not in answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_longer_than_the_context_of_the_recipe_is_refused(client, stream):
    import openai

    long = [{"role": "user", "content": "What is 1 + 1? " * 400}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens") as raised:
        client.chat.completions.create(model="tiny", messages=long, stream=stream)
    assert raised.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_llama_cpp_can_not_take_ends_the_request_and_not_the_server(client, stream):
    import openai

    day = {"type": "object", "properties": {"day": {"type": "string", "pattern": r"^\d{4}$"}}, "required": ["day"]}
    for refused in (
        {"response_format": {"type": "json_object", "schema": day}},
        {"extra_body": {"grammar": "root ::= ("}},
        {"logprobs": True, "top_logprobs": 2},
    ):
        with pytest.raises(openai.BadRequestError, match=r"grammar|logprobs"):
            client.chat.completions.create(model="tiny", messages=QUESTION, stream=stream, **refused)
    with pytest.raises(openai.BadRequestError, match="grammar"):
        client.completions.create(model="tiny", prompt="1", stream=stream, extra_body={"grammar": "root ::= ("})
    number = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    taken = {"response_format": {"type": "json_object", "schema": number}, "max_tokens": 20}
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, **taken)
    assert re.match(r'\{\s*"n"', answer.choices[0].message.content)


def test_an_answer_without_text_may_be_sent_back(client):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = client.chat.completions.create(model="tiny", messages=[*QUESTION, said, *QUESTION], max_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_a_request_that_does_not_say_that_it_is_json_is_told_to(address):
    request = urllib.request.Request(f"{address}/chat/completions", b'{"messages": []}')  # as a form, unless told
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=30)
    assert raised.value.code == 400
    assert "Content-Type: application/json" in json.load(raised.value)["error"]["message"]


def test_text_in_parts_is_the_same_text(client):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "17 + 25?"}]
    whole = client.chat.completions.create(model="tiny", messages=QUESTION)
    system = [{"type": "text", "text": read_setting(tiny_models.modelfile()).system}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tiny", messages=messages)
    assert answer.usage.prompt_tokens == whole.usage.prompt_tokens
    assert answer.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "Expecting property name"),
        (b"[]", "expected a JSON object with a list of messages; found '[]'"),
        (b"{}", "expected a JSON object with a list of messages"),
        (b'{"messages": null}', "expected a JSON object with a list of messages"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', "temperature"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
            "expected text, all that this model reads; found the part {'type': 'image_url', 'image_url': 'x'}",
        ),
        (b'{"messages": [{"role": "system", "content": ["x"]}]}', "expected text, all that this model reads"),
        (b'{"messages": [], "max_completion_tokens": 0.5}', "max_tokens"),
        (b"[" * 100_000, "recursion"),
        (b'{"messages": [], "temperature": NaN}', "expected a finite number; found NaN"),
        (b'{"messages": [], "temperature": 1e999}', "expected a finite number; found 1e999"),
        (b'{"messages": [], "repeat_penalty": 0}', "repeat_penalty over 0"),
    ],
)
def test_what_is_no_request_gets_400_and_what_is_wrong(address, body, message):
    headers = {"Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(f"{address}/chat/completions", body, headers), timeout=30)
    assert raised.value.code == 400
    error = json.load(raised.value)["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


def got(address: str, **headers: str) -> tuple[int, dict[str, str]]:
    """Return status and headers of a request for the models."""
    request = urllib.request.Request(f"{address}/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


def test_a_page_in_a_browser_gets_nothing(address):
    assert got(address, Host="attacker.example")[0] == 400
    question = urllib.request.Request(f"{address}/chat/completions", b"{", {"Host": "attacker.example"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(question, timeout=30)
    assert raised.value.read() == b"Invalid host header"
    status, headers = got(address, Origin="https://attacker.example")
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("access-control-")]


def test_only_this_machines_own_address_is_listened_on(address):
    port = int(address.rsplit(":", 1)[1].removesuffix("/v1"))
    assert listeners(port) == {"0100007F"}  # 127.0.0.1, as Linux writes it


def listeners(port: int) -> set[str]:
    """Return the addresses on which `port` is listened on, over IPv4 and IPv6, from Linux's tables."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            place, state = line.split()[1], line.split()[3]
            host, number = place.split(":")
            if state == "0A" and int(number, 16) == port:
                found.add(host)
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_0_when_told_to_even_while_it_answers(how):
    import openai

    with running() as (process, address), openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, temperature=5.0)
        next(iter(chunks))
        started = time.monotonic()
        process.send_signal(how)
        assert process.wait(timeout=60) == 0
        assert time.monotonic() - started < 30
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1].removesuffix("/v1"))), timeout=5)


def test_all_addresses_are_listened_on_in_a_container_only(monkeypatch):
    monkeypatch.delenv("TEMPER_IMAGE_ID", raising=False)
    result = CliRunner().invoke(serve.main, [*arguments(0), "--host", "0.0.0.0"])
    assert result.exit_code == 1
    assert "--host 0.0.0.0: would offer the model to the whole network" in result.output
    monkeypatch.setenv("TEMPER_IMAGE_ID", "sha256:0")
    monkeypatch.setattr(serve, "serve_app", lambda setting, name, listener: print(listener.getsockname()[0]))
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    assert CliRunner().invoke(serve.main, [*arguments(0), "--host", "0.0.0.0"]).output == "0.0.0.0\n"


def test_a_port_that_is_taken_is_refused_with_another():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(serve.main, arguments(port))
    assert result.exit_code == 1
    assert f"--port {port}: Address already in use on 127.0.0.1" in result.output
    assert f"Run: make serve PORT={port + 1}" in result.output


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "model.q8_0.gguf"
    path.write_bytes((tiny_models.quantized() / "model.q8_0.gguf").read_bytes()[:100_000])
    setting = Setting(path, "", [], 64, {})
    with pytest.raises(serve.UserError, match=r"llama.cpp can't load it. Delete its folder and run: make gguf"):
        application(setting, "tiny")


@pytest.mark.parametrize(
    ("request_body", "expected"),
    [
        ({"messages": []}, {"messages": [{"role": "system", "content": "Be brief."}], "stop": ["<end>"]}),
        ({"messages": [], "stop": None, "top_p": None}, {"stop": ["<end>"], "top_p": 0.9}),
        ({"messages": [], "stop": "x"}, {"stop": ["x", "<end>"]}),
        ({"messages": [], "stop": ["<end>", "x"]}, {"stop": ["<end>", "x"]}),
        ({"messages": [], "temperature": 0, "top_k": 5}, {"temperature": 0, "top_p": 0.9, "top_k": 5}),
        ({"messages": [], "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"messages": [], "max_completion_tokens": 7, "max_tokens": 9}, {"max_tokens": 9}),
        (
            {"messages": [{"role": "system", "content": ""}]},
            {"messages": [{"role": "system", "content": ""}]},
        ),
    ],
)
def test_a_request_gets_what_it_does_not_state_from_the_modelfile(request_body, expected):
    made = complete_request(json.dumps(request_body).encode(), SETTING)
    assert {key: made[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "expected a JSON object with a list of messages"),
        (b"3", "expected a JSON object with a list of messages"),
        (b"{}", "expected a JSON object with a list of messages"),
        (b'{"messages": 3}', "expected a JSON object with a list of messages"),
        (b'{"messages": ["x"]}', "validation error"),
        (b"\xff", "can't decode byte 0xff"),
    ],
)
def test_what_is_no_request_is_refused(body, said):
    with pytest.raises(ValueError, match=said):
        complete_request(body, SETTING)


def test_messages_that_the_chat_template_can_not_render_are_refused():
    class Think:
        def render(self, messages):
            return "<user>" + messages[0]["content"]  # as a template does that adds texts

    middleware = AsModelfile(None, SETTING, Think())
    with pytest.raises(ValueError, match="the model's chat template can't render these messages"):
        middleware.check_room([{"role": "user", "content": None}])
