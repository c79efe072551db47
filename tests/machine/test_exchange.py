"""The exchange between several GPUs: its real processes on a CPU, and what is said of what GPUs may tell."""

import sys
import time
from typing import Any

import pytest

from stages.lib.machine.exchange import copy, findings, pair_findings, start, sum_finding

LATE = """
from stages.lib.machine import exchange
from tests.support import late_rank
exchange.add_up = late_rank.add_up
exchange.exchange()
"""


def pair(source: int, target: int, **changes: Any) -> dict[str, Any]:
    return {"pair": [source, target], "peer": True, "right": True, "gb_s": 200.0} | changes


def summed(rank: int, **changes: Any) -> dict[str, Any]:
    return {"rank": rank, "sum_right": True, "seconds": 0.01, "bytes": 100_000_000} | changes


@pytest.mark.torch
@pytest.mark.slow
def test_three_processes_on_a_cpu_come_to_the_right_sum():
    (finding,) = findings(start(3, "gloo"))
    assert finding.status == "ok", finding.line
    assert finding.found.startswith("the sum of 4 MB over 3 processes is right on each, at ")


@pytest.mark.torch
@pytest.mark.slow
def test_a_rank_that_does_not_come_is_a_finding_in_bounded_time(monkeypatch):
    monkeypatch.setattr("stages.lib.machine.exchange.PROGRAM", LATE)
    began = time.monotonic()
    (finding,) = findings(start(2, "gloo", seconds=15))
    assert time.monotonic() - began < 30
    assert (finding.status, finding.name) == ("fail", "all_reduce")
    assert "NCCL_DEBUG=INFO" in finding.remedy


@pytest.mark.torch
@pytest.mark.slow
def test_an_interface_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-card")
    (finding,) = findings(start(2, "gloo"))
    assert finding.status == "fail"
    assert "no-such-card" in finding.found


def test_a_process_that_never_ends_is_ended_and_said(monkeypatch):
    monkeypatch.setattr("stages.lib.machine.exchange.PROGRAM", "import time; time.sleep(600)")
    monkeypatch.setattr("stages.lib.machine.exchange.END_SECONDS", 0.5)
    monkeypatch.setenv("RUNTIME", "local")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (finding,) = findings(start(2, "nccl", seconds=0.5))
    assert finding.found == "0 of 2 GPUs came to a sum in 0 s"
    assert finding.status == "fail"


def test_where_stages_run_in_containers_the_exchange_does_once_the_image_is_built(monkeypatch, tmp_path):
    started: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **options: started.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("stages.lib.machine.exchange.IMAGE_FILE", tmp_path / "image-cuda")
    start(2, "nccl", in_container=True)
    (tmp_path / "image-cuda").write_text("sha256:1")
    start(2, "nccl", in_container=True)
    start(2, "nccl")
    start(2, "gloo", in_container=True)
    assert [command[0] for command in started] == [sys.executable, "docker/run", sys.executable, sys.executable]
    assert started[1][1:3] == ["python", "-c"]
    assert started[1][-3:] == ["2", "nccl", "90.0"]


def test_without_torch_nothing_is_tried_and_that_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (finding,) = findings(start(2, "gloo"))
    assert finding.status == "warn"
    assert finding.found == "not tried whether the 2 processes reach each other: there is no torch here yet"


@pytest.mark.torch
def test_a_copy_that_does_not_arrive_is_seen(monkeypatch):
    import torch

    right, rate = copy("cpu", "cpu", 100_000)
    assert right
    assert rate > 0
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)
    assert not copy("cpu", "cpu", 100_000)[0]


def test_spoilt_copies_fail_and_are_a_warning_where_nccl_makes_none(monkeypatch):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    told = [pair(0, 1), pair(1, 0, right=False)]
    (finding,) = pair_findings(told)
    assert finding.status == "fail"
    assert finding.found == "what GPU 0 received from GPU 1 is not what was sent"
    assert "NCCL_P2P_DISABLE=1" in finding.remedy
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert [each.status for each in pair_findings(told)] == ["warn"]


def test_pairs_without_peer_to_peer_are_named():
    (finding,) = pair_findings([pair(0, 1, peer=False, gb_s=9.5), pair(1, 0, peer=False, gb_s=9.25), pair(0, 2)])
    assert finding.status == "warn"
    assert finding.found == (
        "3 copies arrived as they were sent, the slowest at 9.2 GB/s (GPU 1 to GPU 0); PCIe without peer-to-peer, so "
        "through the CPU's memory: GPU 0 to 1, 1 to 0"
    )


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([summed(0), summed(1, sum_right=False)], "the sum over 2 GPUs is wrong on rank 1"),
        ([summed(0)], "1 of 2 GPUs came to a sum in 90 s (a complaint)"),
        ([summed(0), {"rank": 1, "error": "NCCL error"}], "rank 1: NCCL error"),
    ],
)
def test_a_sum_that_is_wrong_late_or_in_error_fails(told, found):
    finding = sum_finding(told, 2, "2 GPUs", 90, "a\n complaint\n")
    assert (finding.status, finding.found) == ("fail", found)


def test_the_bandwidth_is_that_of_the_slowest_rank():
    finding = sum_finding([summed(0), summed(1, seconds=0.02), summed(2), summed(3)], 4, "4 GPUs", 90, "")
    assert finding.found.startswith("the sum of 100 MB over 4 GPUs is right on each, at 7.5 GB/s")
