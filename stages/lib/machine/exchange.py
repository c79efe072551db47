"""Findings on several GPUs: are they alike, do copies between each two arrive, is a sum over all of them right.

Processes of their own make the copies and the sum: a hanging NCCL ends in a finding, in bounded time.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

from stages.lib.machine.findings import Finding
from stages.lib.machine.gpu import Card

ROOT = Path(__file__).parents[3]
IMAGE_FILE = Path("data/cache/image-cuda")
PROGRAM = "from stages.lib.machine.exchange import exchange; exchange()"
EXCHANGE_SECONDS = 90.0  # from the start of Python to the last sum
END_SECONDS = 10.0  # more, for a container to end
COPIED_NUMBERS = {"nccl": 1 << 26, "gloo": 1 << 20}  # int32 or float32: 268 MB between GPUs, 4 MB on a CPU
REPEATS = 5
LAST_CHARACTERS = 300
PERIOD = 1000  # sums of numbers below it, times a rank, are exact in float32
HANGS = "NCCL_DEBUG=INFO make doctor ... tells more; try NCCL_NVLS_ENABLE=0, then NCCL_P2P_DISABLE=1"
NO_PEER = "set NCCL_P2P_DISABLE=1 for make, and have the provider turn off PCIe access control (ACS) and the IOMMU"


@dataclass(frozen=True)
class Started:
    """An exchange at work: its process, or why there is none; how many take part, and when its time is over."""

    process: subprocess.Popen | None
    count: int
    backend: str
    seconds: float
    ends: float
    why: str = ""


def cards_finding(cards: Sequence[Card]) -> Finding:
    """Return the memory of each GPU, and whether they are alike."""
    numbers = os.environ.get("GPUS", "").split(",")
    named = numbers if len(numbers) == len(cards) else [str(number) for number in range(len(cards))]
    each = "; ".join(f"GPU {number}: {card.name}, {card.room}" for number, card in zip(named, cards, strict=True))
    if len({(card.name, card.total) for card in cards}) == 1:
        return Finding("ok", "GPUs", f"{len(cards)} alike ({each})")
    found = f"{each}. They are not alike: the slowest sets the pace of each step, and the smallest how much fits"
    return Finding("warn", "GPUs", found, "name GPUs of one kind, as in GPUS=0,1")


def start(count: int, backend: str, *, in_container: bool = False, seconds: float = EXCHANGE_SECONDS) -> Started:
    """Start the exchange between `count` GPUs (`backend` "nccl") or processes on a CPU ("gloo").

    It works in the CUDA image, where stages run in containers and the image is built; else here, where torch is.
    """
    ends = time.monotonic() + seconds + END_SECONDS
    environment, command = dict(os.environ), [sys.executable]
    if backend == "nccl" and in_container and IMAGE_FILE.is_file():
        environment |= {"IMAGE_FILE": str(IMAGE_FILE)}
        command = ["docker/run", "python"]
    elif importlib.util.find_spec("torch") is None:
        return Started(None, count, backend, seconds, ends, "there is no torch here yet")
    elif os.environ.get("GPUS", "").replace(",", "").isdigit():
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["GPUS"]
    command += ["-c", PROGRAM, str(count), backend, str(seconds)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    return Started(process, count, backend, seconds, ends)


def findings(started: Started) -> Iterator[Finding]:
    """Wait for the exchange, in bounded time, and yield what came of it."""
    who = f"{started.count} {'GPUs' if started.backend == 'nccl' else 'processes'}"
    output, errors, why = "", "", started.why
    if started.process is not None:
        try:
            output, errors = started.process.communicate(timeout=max(0.1, started.ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(started.process.pid, signal.SIGKILL)
            output, errors = started.process.communicate()
    told = [json.loads(line) for line in output.splitlines() if line.startswith('{"')]
    why = why or next((line["without"] for line in told if "without" in line), "")
    if why:
        remedy = "make setup on a machine with CUDA's packages, or make image IMAGE=cuda; then make doctor again"
        yield Finding("warn", "all_reduce", f"not tried whether the {who} reach each other: {why}", remedy)
        return
    pairs = [line for line in told if "pair" in line]
    if pairs:
        yield from pair_findings(pairs)
    yield sum_finding(told, started.count, who, started.seconds, errors)


def pair_findings(pairs: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Yield whether the copies between each two GPUs arrived as they were sent, how fast, and by which way."""
    spoilt = [pair for pair in pairs if not pair["right"]]
    for pair in spoilt:
        found = f"what GPU {pair['pair'][1]} received from GPU {pair['pair'][0]} is not what was sent"
        yield Finding("warn" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "fail", "peer-to-peer", found, NO_PEER)
    if spoilt:
        return
    slow = min(pairs, key=lambda pair: pair["gb_s"])
    found = f"{len(pairs)} copies arrived as they were sent, the slowest at {slow['gb_s']:.1f} GB/s"
    found += f" (GPU {slow['pair'][0]} to GPU {slow['pair'][1]})"
    apart = [pair["pair"] for pair in pairs if not pair["peer"]]
    if apart:
        names = ", ".join(f"{source} to {target}" for source, target in apart)
        found += f"; PCIe without peer-to-peer, so through the CPU's memory: GPU {names}"
        yield Finding(
            "warn", "peer-to-peer", found, "nothing, or GPUs with NVLink: gradients are exchanged more slowly"
        )
    else:
        yield Finding("ok", "peer-to-peer", found)


def sum_finding(told: Sequence[Mapping[str, Any]], count: int, who: str, seconds: float, errors: str) -> Finding:
    """Return whether all ranks came to the right sum in `seconds`; `errors` is what their process said."""
    failed = [line for line in told if "error" in line]
    sums = [line for line in told if "sum_right" in line]
    wrong = [str(line["rank"]) for line in sums if not line["sum_right"]]
    if failed:
        found = f"rank {failed[0]['rank']}: {failed[0]['error']}"
    elif wrong:
        found = f"the sum over {who} is wrong on rank {', '.join(wrong)}"
    elif len(sums) < count:
        found = f"{len(sums)} of {who} came to a sum in {seconds:.0f} s"
        said = " ".join(errors.split())[-LAST_CHARACTERS:]
        found += f" ({said})" if said else ""
    else:
        size = sums[0]["bytes"]
        rate = 2 * (count - 1) / count * size / max(line["seconds"] for line in sums) / 1e9
        found = f"the sum of {size / 1e6:.0f} MB over {who} is right on each, at {rate:.1f} GB/s"
        return Finding("ok", "all_reduce", f"{found} (bus bandwidth, as nccl-tests counts it)")
    return Finding("fail", "all_reduce", found, HANGS)


# ---- in a process of its own ----------------------------------------------------------------------------------------


def exchange() -> None:
    """Copy between each two GPUs, then sum over all, in the time given; a JSON line on standard output for each."""
    count, backend, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    ends = time.monotonic() + seconds
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    copies = [(copy_between_all, (count,))] if backend == "nccl" else []
    sums = [(add_up, (rank, count, backend, port, seconds)) for rank in range(count)]
    for jobs in (copies, sums):
        context = multiprocessing.get_context("spawn")
        started = [context.Process(target=work, args=given, daemon=True) for work, given in jobs]
        for process in started:
            process.start()
        for process in started:
            process.join(max(0.1, ends - time.monotonic()))
        for process in started:
            process.kill()
            process.join()
        if any(process.exitcode for process in started):
            return


def tell(line: Mapping[str, Any]) -> None:
    """Write one line to standard output at once: shorter than a pipe takes in one piece."""
    os.write(1, (json.dumps(line) + "\n").encode())


def copy_between_all(count: int) -> None:
    """Copy from each GPU to each other, and compare what arrived."""
    import torch

    if torch.cuda.device_count() < count:
        tell({"without": f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"})
        sys.exit(1)
    for source, target in permutations(range(count), 2):
        right, rate = copy(f"cuda:{source}", f"cuda:{target}", COPIED_NUMBERS["nccl"])
        peer = torch.cuda.can_device_access_peer(target, source)
        tell({"pair": [source, target], "peer": peer, "right": right, "gb_s": rate})


def copy(source: str, target: str, numbers: int) -> tuple[bool, float]:
    """Return whether `numbers` int32 arrive at device `target` as they are on `source`, and the GB/s of the fastest."""
    import torch

    sent = torch.arange(numbers, dtype=torch.int32, device=source)
    received = torch.empty(numbers, dtype=torch.int32, device=target)
    best = float("inf")
    for _ in range(REPEATS):
        received.fill_(-1)
        wait_for(source, target)
        begun = time.perf_counter()
        received.copy_(sent)
        wait_for(source, target)
        best = min(best, time.perf_counter() - begun)
    return bool(torch.equal(received.cpu(), torch.arange(numbers, dtype=torch.int32))), numbers * 4 / best / 1e9


def wait_for(*devices: str) -> None:
    """Wait until these devices have done what they were given."""
    import torch

    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def add_up(rank: int, count: int, backend: str, port: int, seconds: float) -> None:
    """Be one rank of an all_reduce, and compare the sum with what it has to be."""
    try:
        import torch
        from torch import distributed

        device = f"cuda:{rank}" if backend == "nccl" else "cpu"
        if backend == "nccl":
            torch.cuda.set_device(rank)
        address = f"tcp://127.0.0.1:{port}"
        bound = timedelta(seconds=seconds)
        distributed.init_process_group(backend, init_method=address, rank=rank, world_size=count, timeout=bound)
        pattern = torch.arange(COPIED_NUMBERS[backend], device=device) % PERIOD
        right, best = True, float("inf")
        for _ in range(REPEATS):
            own = (pattern * (rank + 1)).float()
            distributed.barrier()
            wait_for(device)
            begun = time.perf_counter()
            distributed.all_reduce(own)
            wait_for(device)
            best = min(best, time.perf_counter() - begun)
            right = right and bool(torch.equal(own, (pattern * (count * (count + 1) // 2)).float()))
        tell({"rank": rank, "sum_right": right, "seconds": best, "bytes": own.nbytes})
        with contextlib.suppress(Exception):  # a partner that has its sum may be gone
            distributed.barrier()
    except Exception as error:  # of torch, NCCL or the driver, each with errors of its own: the finding says it
        tell({"rank": rank, "error": " ".join(str(error).split())[:300]})
    os._exit(0)  # NCCL waits at exit for partners that may be gone
