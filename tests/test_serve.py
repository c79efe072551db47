"""`make serve`, asked by OpenAI's own client: the server runs in a process of its own on a free port."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from stages import serve
from stages.lib.serve.request import complete_chat, parse
from stages.lib.serve.setting import Setting, read_setting
from tests.support import tiny_models

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[1]
SETTING = Setting(
    Path("x.gguf"), "Be brief.", ["<end>"], 64, {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.0}
)
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def chat(**parameters: object) -> bytes:
    return json.dumps({"messages": QUESTION, "max_tokens": 4} | parameters).encode()


def schema(content: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": content}}


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
    with pytest.raises(
        openai.BadRequestError, match=r"request \(\d+ tokens\) exceeds the available context size"
    ) as raised:
        client.chat.completions.create(model="tiny", messages=long, stream=stream)
    assert raised.value.code == "context_length_exceeded"


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "I add.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ],
)
def test_a_call_of_a_tool_is_sent_back_only_to_a_model_that_is_shown_tools(message):
    request = {"messages": [*QUESTION, message, *QUESTION]}
    made = complete_chat(request, SETTING, "tiny", takes_tools=True)
    assert made["messages"][2] == message | {"content": message["content"] or ""}
    with pytest.raises(ValueError, match=r"messages\.1: is a call of a tool or its result, and"):
        complete_chat(request, SETTING, "tiny", takes_tools=False)


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
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "expected a JSON object; found '[]'"),
        (b"{}", "messages: Field required"),
        (chat(messages=None), "messages: expected a list with at least one message; found None"),
        (chat(messages=[]), "messages: expected a list with at least one message; found []"),
        (chat(messages=[{"role": "robot", "content": "x"}]), "messages.0: expected an object with a role of system,"),
        (chat(messages=["x"]), "messages.0: expected an object with a role of system,"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages.0: expected a text as content; found 5"),
        (chat(messages=[{"role": "user"}]), "messages.0: expected a text as content; found None"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
            "expected text, all that this model reads; found the part {'type': 'image_url', 'image_url': 'x'}",
        ),
        (chat(messages=[{"role": "system", "content": ["x"]}]), "expected text, all that this model reads"),
        (b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', "can't decode byte 0xff"),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "surrogates not allowed"),
        (b"[" * 100_000, "brackets in one another"),
        (b'{"messages": [], "temperature": NaN}', "expected a finite number; found NaN"),
        (b'{"messages": [], "temperature": 1e999}', "expected a finite number; found 1e999"),
        (chat(temperature="0.5"), "temperature: Input should be a valid number; found '0.5'"),
        (chat(temperature=-1), "temperature: Input should be greater than or equal to 0"),
        (chat(repeat_penalty=0), "repeat_penalty: Input should be greater than 0"),
        (chat(n=2), "n: Input should be 1; found '2'"),
        (chat(max_tokens=0), "max_tokens: Input should be greater than or equal to 1"),
        (chat(max_completion_tokens=0.5), "max_completion_tokens: Input should be a valid integer"),
        (chat(foo=1), "foo: is not supported here; leave it out"),
        (chat(grammar="root ::= ("), "grammar: is not supported here"),
        (chat(chat_template_kwargs={}), "chat_template_kwargs: is not supported here"),
        (chat(reasoning_effort="low"), "reasoning_effort: is not supported here"),
        (chat(store=True), "store: Input should be False"),
        (chat(logit_bias={"x": 1}), "logit_bias"),
        (chat(top_logprobs=3), "top_logprobs: expected logprobs = true"),
        (chat(tools=[TOOL]), "tools: this model's chat template shows no tools to it"),
        (chat(response_format={"type": "regex"}), "response_format.type: expected text, json_object or json_schema"),
        (chat(response_format={"type": "json_schema"}), "response_format.json_schema.schema: expected an object"),
        (chat(response_format=schema({"type": "string", "pattern": "^" + "(" * 200_000})), "20,000 characters"),
        (
            chat(response_format=schema({"type": "string", "pattern": "^" + "(" * 9_000 + ")" * 9_000 + "$"})),
            "patterns",
        ),
        (chat(response_format=schema({"type": "string", "pattern": "^(a$"})), "pattern"),
        (chat(response_format=schema({"$ref": "#/nowhere"})), "ref"),
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


def test_a_json_schema_is_kept_and_parsed_by_the_client(client):
    import pydantic

    class Answer(pydantic.BaseModel):
        answer: Literal[41, 42]

    kept = client.chat.completions.parse(model="tiny", messages=QUESTION, response_format=Answer, max_tokens=200)
    assert kept.choices[0].message.parsed.answer in (41, 42)


def test_the_usage_of_a_stream_comes_when_asked_for_and_only_then(client):
    def usages(**parameters: object) -> list:
        chunks = client.chat.completions.create(
            model="tiny", messages=QUESTION, stream=True, max_tokens=3, **parameters
        )
        return [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]

    assert usages(stream_options={"include_usage": True}) == [3]
    assert usages() == []


def test_an_answer_goes_on_from_what_the_assistant_has_begun(client):
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0).choices[0].message.content
    begun = {"role": "assistant", "content": whole[:20]}
    rest = client.chat.completions.create(model="tiny", messages=[*QUESTION, begun], temperature=0)
    assert rest.choices[0].message.content.endswith("</answer>")
    assert rest.usage.completion_tokens < 40


def test_a_seed_makes_the_same_answer(client):
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 1.5, "max_tokens": 20}
    first, second = (client.chat.completions.create(**asked, seed=7).choices[0].message.content for _ in range(2))
    assert first == second


def test_another_model_s_name_is_refused(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here; expected 'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.models.retrieve("gpt-4o")
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"prompt": [2, 4, 5]}, "prompt: Input should be a valid string"),
        ({"prompt": [999_999]}, "prompt: Input should be a valid string"),
        ({"prompt": ["a", "b"]}, "prompt: Input should be a valid string"),
        ({"prompt": "x", "max_tokens": 0, "echo": True}, "max_tokens: Input should be greater"),
        ({"prompt": "1 + 1 " * 3000}, "context"),
        ({"prompt": "x", "grammar": "root ::= ("}, "grammar: is not supported here"),
    ],
)
def test_raw_text_is_continued_and_what_is_none_refused(address, parameters, said):
    assert answered(f"{address}/completions", json.dumps({"prompt": "What is", "max_tokens": 3}).encode())[0] == 200
    status, error = answered(f"{address}/completions", json.dumps(parameters).encode())
    assert status == 400
    assert said in error["error"]["message"]


@pytest.mark.parametrize(
    "path", ["embeddings", "responses", "chat/completions/", "../tokenize", "../detokenize", "../slots/0"]
)
def test_no_other_address_of_llama_server_is_reached(address, path):
    status, error = answered(f"{address}/{path}", b'{"tokens": [999999999]}')
    assert status == 404
    assert "is not offered here; there are /health, /v1/models" in error["error"]["message"]


def test_a_body_of_200_mb_is_refused_and_not_kept(address):
    status, error = answered(f"{address}/chat/completions", b"[" * 200_000_000)
    assert (status, error["error"]["message"]) == (413, "expected a body of at most 8,000,000 bytes; found 200,000,000")


def test_twenty_clients_at_once_get_the_same_answer(client):
    with ThreadPoolExecutor(20) as pool:
        asked = {"model": "tiny", "messages": QUESTION, "temperature": 0}
        answers = list(
            pool.map(lambda _: client.chat.completions.create(**asked).choices[0].message.content, range(20))
        )
    assert len(set(answers)) == 1
    assert answers[0].endswith("</answer>")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(address, stream):
    port = int(address.rsplit(":", 1)[1].removesuffix("/v1"))
    body = chat(stream=stream, max_tokens=900, logit_bias={"1": -100, "5": -100}, temperature=5)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.05)
    started = time.monotonic()
    assert answered(f"{address}/chat/completions", chat())[0] == 200
    assert time.monotonic() - started < 5


def test_llama_server_is_started_again_when_it_ends():
    with running() as (process, address):
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert answered(f"{address}/chat/completions", chat())[0] == 500
        assert answered(f"{address}/chat/completions", chat())[0] == 200


def test_killed_it_leaves_no_llama_server_behind():
    with running() as (process, _):
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        until = time.monotonic() + 10
        while Path(f"/proc/{child}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{child}").exists()


def answered(address: str, body: bytes) -> tuple[int, dict]:
    """Return status and body of a request that says that it is JSON."""
    request = urllib.request.Request(address, body, {"Content-Type": "Application/JSON; charset=utf-8"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


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


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {"messages": [{"role": "system", "content": "Be brief."}, *QUESTION], "stop": ["<end>"], "top_p": 0.9}),
        ({"stop": None, "top_p": None}, {"stop": ["<end>"], "top_p": 0.9}),
        ({"stop": "x"}, {"stop": ["x", "<end>"]}),
        ({"stop": ["<end>", "x"]}, {"stop": ["<end>", "x"]}),
        ({"temperature": 0, "top_k": 5}, {"temperature": 0, "top_p": 0.9, "top_k": 5}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7, "max_tokens": 9}, {"max_tokens": 7}),
        ({"messages": [{"role": "system", "content": ""}]}, {"messages": [{"role": "system", "content": ""}]}),
        (
            {"messages": [{"role": "developer", "content": "No."}, *QUESTION]},
            {"messages": [{"role": "system", "content": "No."}, *QUESTION]},
        ),
    ],
)
def test_a_request_gets_what_it_does_not_state_from_the_modelfile(parameters, expected):
    made = complete_chat(parse(json.dumps({"messages": QUESTION} | parameters).encode()), SETTING, "tiny", False)
    assert {key: made[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier", "prompt_cache_key", "n", "tool_choice"])
def test_what_changes_no_answer_is_taken_and_not_passed_on(name):
    values = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "n": 1}
    made = complete_chat({"messages": QUESTION, name: values.get(name, "auto")}, SETTING, "tiny", False)
    assert name not in made
