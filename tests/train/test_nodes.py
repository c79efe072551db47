"""Two machines, each a network namespace of this one, joined by a cable that can be cut, train as one machine does."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from stages.lib.artifact.digests import sha256_of
from stages.lib.errors import UserError
from stages.lib.train import nodes
from stages.lib.train.launch import rank_variables, run_ranks
from tests.support import micro
from tests.support.npm import require

ROOT = Path(__file__).parents[2]
MASTER = "10.99.7.1:29400"
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def cable() -> Iterator[str]:
    """Join two network namespaces, HOST0 and HOST1, by a pair of interfaces; return the names' common beginning.

    It needs root. Where this machine has none to give, the tests are skipped; in CI that is a failure.
    """
    require("ip", "iproute2")
    name = f"t{os.getpid()}h"
    with contextlib.ExitStack() as stack:
        for number in (0, 1):
            done = subprocess.run(
                ["ip", "netns", "add", f"{name}{number}"], capture_output=True, text=True, check=False
            )
            if done.returncode:
                (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no network namespace: {done.stderr.strip()}")
            stack.callback(ip, "netns", "delete", f"{name}{number}")
        ip("-n", f"{name}0", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", f"{name}1")
        for number in (0, 1):
            ip("-n", f"{name}{number}", "address", "add", f"10.99.7.{number + 1}/24", "dev", "cable")
            for each in ("lo", "cable"):
                ip("-n", f"{name}{number}", "link", "set", each, "up")
        yield name


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def start(cable: str, host: int, words: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    """Start a stage on one of the hosts; what it says goes to a file, `said`."""
    (folder / "path").mkdir(exist_ok=True)
    (folder / "notes").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests" / "support" / "watched_ranks.py", folder / "path" / "sitecustomize.py")
    variables = {
        **os.environ, "NODES": "2", "MASTER": MASTER, "NODE_RANK": str(host), "NOTES": str(folder / "notes"),
        "PYTHONPATH": str(folder / "path"), **environment,
    }  # fmt: skip
    inside = ["ip", "netns", "exec", f"{cable}{host}"] if cable else []
    with (folder / f"said{host}").open("a") as log:
        return subprocess.Popen(
            [*inside, sys.executable, "-m", *words], cwd=ROOT, env=variables, stdout=log, stderr=log
        )


@contextlib.contextmanager
def other_node(cable: str, finished: Path, folder: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Have node 1 wait for work, with a folder of its own."""
    words = ["stages.node", "--recipe", str(finished / "micro.toml"), "--folder", str(folder / "node")]
    process = start(cable, 1, words, folder, **environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run_stage(cable: str, stage: str, finished: Path, out: Path, **environment: str) -> subprocess.Popen:
    return start(cable, 0, [f"stages.{stage}", *micro.arguments(stage, finished, out)], out.parent, **environment)


def said(folder: Path, host: int) -> str:
    return (folder / f"said{host}").read_text()


def adapters(folder: Path, rank: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "notes" / f"{rank}.jsonl").read_text().splitlines()]


@pytest.mark.torch
@pytest.mark.slow
def test_two_nodes_train_what_two_processes_of_one_machine_do_and_node_0_alone_has_the_artifacts(
    cable, finished, tmp_path
):
    with other_node(cable, finished, tmp_path) as other:
        for stage in ("sft", "grpo"):
            alone = tmp_path / "alone" / stage
            alone.parent.mkdir(exist_ok=True)
            assert run_stage("", stage, finished, alone, NODES="", PROCESSES="2").wait() == 0, said(alone.parent, 0)
            out = tmp_path / stage
            assert run_stage(cable, stage, finished, out).wait() == 0, said(tmp_path, 0)
            assert adapters(tmp_path, 0) == adapters(tmp_path, 1) == adapters(alone.parent, 0)
            assert sha256_of(out / WEIGHTS) == sha256_of(alone / WEIGHTS)
            assert json.loads((out / "manifest.json").read_text())["environment"]["world_size"] == 2
        end = ["stages.node", "--recipe", str(finished / "micro.toml"), "--folder", str(tmp_path / "node"), "--end"]
        assert start(cable, 0, end, tmp_path).wait() == 0
        assert other.wait() == 0
    assert said(tmp_path, 1).count("node 1: node 0 has no more work") == 1
    assert not list((tmp_path / "node" / "run").rglob("checkpoint-*"))
    assert not list((tmp_path / "node" / "run").rglob("adapter_model.safetensors"))


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_cut_off_a_node_is_named_in_one_message_and_the_run_goes_on_with_it_or_without(
    cable, finished, tmp_path, stage
):
    whole = tmp_path / "whole" / stage
    whole.parent.mkdir()
    assert run_stage("", stage, finished, whole, NODES="", PROCESSES="2").wait() == 0, said(whole.parent, 0)
    out = tmp_path / stage
    checkpoint = tmp_path / f"{stage}.unfinished" / "checkpoints" / "checkpoint-2" / "complete"
    with other_node(cable, finished, tmp_path, PAUSE="0.3"):
        process = run_stage(cable, stage, finished, out, PAUSE="0.3")
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        ip("-n", f"{cable}1", "link", "set", "cable", "down")
        cut = time.monotonic()
        assert process.wait() == 1
        assert time.monotonic() - cut < 40
        first = said(tmp_path, 0)
        assert first.count("node 1 (10.99.7.2) is lost: it ended, or did not answer for 20 seconds") == 1
        assert first.count("it goes on from the last checkpoint") == 1
        assert "Traceback" not in first
        alone = tmp_path / "alone"
        shutil.copytree(tmp_path / f"{stage}.unfinished", alone / f"{stage}.unfinished")
        ip("-n", f"{cable}1", "link", "set", "cable", "up")
        assert run_stage(cable, stage, finished, out).wait() == 0, said(tmp_path, 0)
    assert f"{stage}: carrying on from" in said(tmp_path, 0)
    assert sha256_of(out / WEIGHTS) == sha256_of(whole / WEIGHTS)
    assert run_stage("", stage, finished, alone / stage, NODES="").wait() == 0, said(alone, 0)
    assert f"{stage}: carrying on from" in said(alone, 0)


@pytest.mark.torch
@pytest.mark.slow
def test_a_rank_killed_on_node_1_is_named_by_node_0_and_term_there_saves_one_checkpoint(cable, finished, tmp_path):
    out = tmp_path / "sft"
    folder = tmp_path / "sft.unfinished" / "checkpoints"
    with other_node(cable, finished, tmp_path, PAUSE="0.3") as other:
        process = run_stage(cable, "sft", finished, out, PAUSE="0.3")
        while not (folder / "checkpoint-2" / "complete").exists() and process.poll() is None:
            time.sleep(0.01)
        os.kill(children(other)[0], signal.SIGKILL)
        assert process.wait() == 1
        first = said(tmp_path, 0)
        assert first.count("rank 1 of 2 was ended by SIGKILL. All ranks were ended. Run the same command again") == 1
        assert "Traceback" not in first
        steps = tmp_path / "notes" / "0.jsonl"
        steps.unlink()
        process = run_stage(cable, "sft", finished, out, PAUSE="0.3")
        while not steps.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143, said(tmp_path, 0)
        assert said(tmp_path, 0).count("stopped by SIGTERM, saved at step") == 1
        assert "Traceback" not in said(tmp_path, 0)
        assert run_stage(cable, "sft", finished, out).wait() == 0, said(tmp_path, 0)


def children(process: subprocess.Popen) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.torch
@pytest.mark.slow
def test_a_node_with_another_recipe_or_another_reward_is_refused_by_name(cable, finished, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(finished, other, dirs_exist_ok=True)
    (other / "own.py").write_text((other / "own.py").read_text() + "\nLIMIT = 1\n")
    with other_node(cable, other, tmp_path):
        assert run_stage(cable, "grpo", finished, tmp_path / "grpo").wait() == 1
    assert "this machine would train on something else than node 0; different here: own.py" in said(tmp_path, 0)
    (other / "micro.toml").write_text((other / "micro.toml").read_text() + "\n# another\n")
    with other_node(cable, other, tmp_path):
        assert run_stage(cable, "sft", finished, tmp_path / "sft").wait() == 1
    assert f"Error: node 1: {other}/micro.toml is not the recipe of node 0" in said(tmp_path, 0)
    assert "Traceback" not in said(tmp_path, 0) + said(tmp_path, 1)


PARTNER_GONE = {"kind": "crash", "text": "RuntimeError: Connection closed by peer", "rank": 0}
TELL = "import json, os; os.write(int(os.environ['TEMPER_FAILURE']), json.dumps({}).encode()); os._exit(1)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "at_once", "told", "code", "text"),
    [
        ("", True, (0, None), 0, None),
        ("raise SystemExit(143)", True, (143, None), 143, None),
        (TELL.format(PARTNER_GONE), True, (1, {"kind": "user", "text": "no such answer"}), 1, "no such answer"),
        (TELL.format(PARTNER_GONE), False, (1, None), 1, "RuntimeError: Connection closed by peer"),
        (TELL.format({"kind": "user", "text": "full"}), False, (1, PARTNER_GONE | {"rank": 1}), 1, "full"),
        ("import os; os.kill(os.getpid(), 9)", False, (1, PARTNER_GONE), 1, "rank 0 of 2 was ended by SIGKILL"),
        ("import time; time.sleep(600)", True, (1, {"kind": "memory", "text": "out", "step": 3}), 1, "out"),
        ("import time; time.sleep(600)", True, None, 1, "node 1 is lost: it ended, or did not answer for 20 seconds"),
    ],
)
def test_of_all_that_ranks_here_and_there_tell_the_cause_is_said(tmp_path, program, at_once, told, code, text):
    """`told` is what node 1 reports, at once or when it is told to end; None: it is gone."""
    here, there = (Connection(each.detach()) for each in socket.socketpair())

    def answer() -> None:
        if not at_once:
            assert nodes.receive(there) == {"code": 1, "failure": None}
        if told:
            nodes.send(there, {"code": told[0], "failure": told[1]})
        else:
            there.close()

    with here:
        thread = threading.Thread(target=answer)
        thread.start()
        command = [sys.executable, "-c", program]
        variables = rank_variables(nodes.Group(0, 1, 2, "127.0.0.1", 1), 0)
        outcome = run_ranks(command, [variables], tmp_path, [nodes.Peer("node 1", here)])
        thread.join()
        there.close()
    assert (outcome.code, outcome.failure and outcome.failure.text) == (code, text)


@pytest.mark.parametrize("asked", ["", "10.0.0.1", ":29400", "10.0.0.1:port", "10.0.0.1:0", "10.0.0.1:70000"])
def test_another_form_of_master_is_refused(asked):
    with pytest.raises(UserError, match="MASTER="):
        nodes.master({"MASTER": asked})


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_another_word_than_a_number_of_machines_is_refused(asked):
    with pytest.raises(UserError, match="NODES="):
        nodes.node_count({"NODES": asked})
    with pytest.raises(UserError, match="NODE_RANK="):
        nodes.node_rank({"NODE_RANK": asked})


@pytest.mark.slow
def test_two_machines_of_one_number_and_one_of_a_number_too_high_are_refused_and_noise_is_passed_over(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER", f"127.0.0.1:{port}")
    with contextlib.ExitStack() as stack:
        answers = []
        server = socket.create_server
        monkeypatch.setattr(nodes.socket, "create_server", lambda place: knock(server(place), stack, answers))
        found = nodes.gather(3, 2, stack)
        assert list(found) == [1]
        assert [nodes.receive(each)["refused"] for each in answers] == [
            "NODE_RANK=1: another machine has this number. Choose another",
            "NODE_RANK=3: NODES=3 on node 0. Expected 1 to 2",
        ]


def knock(server: socket.socket, stack: contextlib.ExitStack, answers: list) -> socket.socket:
    """Have five machines at the door of `server`: noise, node 1 twice, one too many, and one that has gone."""
    opened = [stack.enter_context(nodes.watched(socket.create_connection(server.getsockname()))) for _ in range(5)]
    opened[0].send_bytes(b"GET / HTTP/1.1")
    nodes.send(opened[1], {"node": 1, "processes": 1})
    nodes.send(opened[2], {"node": 1, "processes": 1})
    nodes.send(opened[3], {"node": 3, "processes": 1})
    opened[4].close()
    answers += opened[2:4]
    return server
