"""The judge of docs/rewards.md, its very text, against a server on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.rewards.own import load_own
from tests.support.loopback import serving

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


@pytest.fixture
def server():
    """Give a server that replies with `server.replies` in turn, the last one for ever: a status, or a message."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                listening.asked.append((self.path, self.headers["Authorization"], body["messages"][1]["content"]))
                reply = listening.replies.pop(0) if len(listening.replies) > 1 else listening.replies[0]
            status, text = (reply, "") if isinstance(reply, int) else (200, reply)
            answer = {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 60}}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    lock = threading.Lock()
    with serving(Handler) as listening:
        listening.asked, listening.replies = [], []
        yield listening


@pytest.fixture
def judge(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_ADDRESS", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setenv("JUDGE_MAX_TOKENS", "200")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    text = PAGE.read_text().partition("<!-- judge -->\n```python\n")[2].partition("```\n")[0]
    (tmp_path / "judge.py").write_text(text)
    return load_own(["judge.py:judge"], tmp_path)["judge.py:judge"]


def rewards(judge, *texts: str) -> list[float]:
    prompts = [[{"role": "user", "content": "What is 6 x 7?"}]] * len(texts)
    return judge(
        prompts=prompts, completions=[[{"role": "assistant", "content": text}] for text in texts], answer=["42"]
    )


@pytest.mark.parametrize(
    ("reply", "worth"),
    [
        ('{"score": 7}', 0.7),
        ('{"score": 99}', 1.0),
        ('{"score": -1}', 0.0),
        ("Well done!", 0.0),
        ('{"score": null}', 0.0),
    ],
)
def test_the_score_of_a_reply_is_from_0_to_1(server, judge, reply, worth):
    server.replies = [reply]
    assert rewards(judge, "42") == [worth]
    assert server.asked == [
        (
            "/v1/chat/completions", "Bearer secret",
            "<question>What is 6 x 7?</question><completion>42</completion>",
        )
    ]  # fmt: skip


def test_a_completion_is_asked_about_once(server, judge):
    server.replies = ['{"score": 7}']
    assert rewards(judge, "42") == rewards(judge, "42") == [0.7]
    assert len(server.asked) == 1


def test_a_server_that_stumbles_is_asked_again_and_one_that_refuses_the_key_is_not(server, judge):
    server.replies = [503, 500, '{"score": 7}']
    assert rewards(judge, "42") == [0.7]
    server.replies = [401]
    with pytest.raises(UserError, match=r"judge.py, line \d+: RuntimeError: the judge at http://127.* 401"):
        rewards(judge, "43")
    assert len(server.asked) == 4


def test_the_run_ends_when_the_tokens_are_spent(server, judge):
    server.replies = ['{"score": 7}']
    for number in range(4):
        assert rewards(judge, str(number)) == [0.7]
    with pytest.raises(UserError, match="the judge has cost 240 tokens; JUDGE_MAX_TOKENS is 200"):
        rewards(judge, "4")
    assert len(server.asked) == 4
