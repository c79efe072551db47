"""Nodes: machines that train together. Node 0 runs the stages and has the artifacts; the others lend it their GPUs.

`make node` on another machine (stages/node.py) connects to node 0. A stage that trains hands it what its ranks read
(inputs, identity, checkpoint), by digest, so that nothing is sent twice. The ranks then find each other as those of
torchrun do. Only the supervisors of the machines speak over these connections. Each message is a JSON object; TCP
finds out that a machine is gone.
"""

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

from stages.lib.artifact.digests import digest_of
from stages.lib.artifact.folder import Run
from stages.lib.artifact.manifest import IDENTITY, MANIFEST, object_in
from stages.lib.errors import UserError
from stages.lib.train import ladder
from stages.lib.train.failures import Failure, Outcome, is_partners

WAIT_SECONDS = 900  # for all nodes, which may still build their image
LOST_SECONDS = 20  # without an answer a machine counts as lost
GRACE_SECONDS = 2  # for another machine to tell its own cause, before it is told to end
MAX_MESSAGE = 1 << 26  # bytes
CHUNK = 1 << 22  # bytes of a file in one message
SIOCGIFADDR = 0x8915  # asks Linux for the address of an interface
GONE = (OSError, EOFError)


@dataclass
class Peer:
    """The supervisor of another machine: its name, how to reach it, and how its ranks ended, once it has said so."""

    name: str
    connection: Connection
    processes: int = 0
    leads: bool = False  # it is node 0
    code: int | None = None
    failure: Failure | None = None

    def poll(self, seconds: float = 0.0) -> int | None:
        """Return how its ranks ended, if that is known within `seconds`: an exit code. A lost machine ended with 1."""
        try:
            if self.code is None and self.connection.poll(seconds):
                told = receive(self.connection)
                self.code = int(told["code"])
                self.failure = Failure(**told["failure"]) if told["failure"] else None
        except GONE:
            self.code, self.failure = 1, Failure("ended", lost(self.name))
        return self.code

    def settle(self, *, failed: bool) -> None:
        """Wait until its ranks have ended. Where some `failed`, tell it so, and heed only a cause of its own."""
        if self.leads:
            return
        if self.poll(GRACE_SECONDS if failed else LOST_SECONDS) is None:
            self.tell(Outcome(1, None))
            self.poll(2 * LOST_SECONDS)
            if self.failure is None or is_partners(self.failure):
                self.code, self.failure = None, None
        elif failed and self.failure and is_partners(self.failure):
            self.code, self.failure = None, None

    def tell(self, outcome: Outcome) -> None:
        """Say how the ranks here ended; the ranks there then end, too."""
        failure = asdict(outcome.failure) if outcome.failure else None
        with contextlib.suppress(*GONE):  # which `poll` finds out as well
            send(self.connection, {"code": outcome.code, "failure": failure})


@dataclass
class Group:
    """The ranks of one machine among all: the number of its first, how many it has, and how many there are in all.

    `address` and `port` are where rank 0 waits for the others.
    """

    first: int
    own: int
    size: int
    address: str
    port: int


def node_count(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many machines train together: NODES. Raises `UserError` for what is no number."""
    return whole_number(environment, "NODES", 1, "the number of machines, such as 2") if environment.get("NODES") else 1


def node_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this machine, from 1: NODE_RANK. Raises `UserError` for what is no number."""
    return whole_number(environment, "NODE_RANK", 1, "the number of this machine, from 1; node 0 runs the stages")


def whole_number(environment: Mapping[str, str], name: str, least: int, expected: str) -> int:
    """Return a number in the environment. Raises `UserError` when there is none, or one below `least`."""
    asked = environment.get(name, "")
    if not asked.isdecimal() or int(asked) < least:
        raise UserError(f"{name}={asked} is not known. Expected {expected}")
    return int(asked)


def master(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return the address and port of node 0: MASTER. Raises `UserError` for another form."""
    host, _, port = environment.get("MASTER", "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        asked = environment.get("MASTER", "")
        raise UserError(f"MASTER={asked} is not known. Expected address and port of node 0, such as 10.0.0.1:29400")
    return host, int(port)


def send(connection: Connection, message: Mapping[str, Any]) -> None:
    """Send a JSON object."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """Return the next JSON object. Raises OSError for anything else, and where the connection broke."""
    try:
        message = json.loads(connection.recv_bytes(MAX_MESSAGE))
    except ValueError as error:
        raise OSError("not a message of Temper") from error
    if not isinstance(message, dict):
        raise OSError("not a message of Temper")
    return message


def watched(opened: socket.socket) -> Connection:
    """Return the connection over a socket, which breaks when the other machine has not answered for `LOST_SECONDS`."""
    opened.settimeout(None)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, LOST_SECONDS // 4),
        (socket.TCP_KEEPINTVL, LOST_SECONDS // 4),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 1000 * LOST_SECONDS),
    ):
        opened.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(opened.detach())


def lost(name: str) -> str:
    """Return what is to be said of a machine that is gone."""
    return f"{name} is lost: it ended, or did not answer for {LOST_SECONDS} seconds"


@contextlib.contextmanager
def gathered(stage: str) -> Iterator[list[Peer]]:
    """Yield the other nodes, in order, when all are there; none where NODES is 1 or left out.

    Raises `UserError` when one has not come within `WAIT_SECONDS`.
    """
    count = node_count()
    if count == 1:
        yield []
        return
    host, port = master()
    wanted = ", ".join(map(str, range(1, count)))
    click.echo(f"{stage}: waiting at {host}:{port} for node {wanted}. There, run: make node", err=True)
    with contextlib.ExitStack() as stack:
        found = gather(count, WAIT_SECONDS, stack)
        if missing := [number for number in range(1, count) if number not in found]:
            raise UserError(
                f"node {', '.join(map(str, missing))} of {count} did not come to {host}:{port} within {WAIT_SECONDS} "
                f"seconds. Run there: make node NODE_RANK={missing[0]} MASTER={host}:{port}, with the same recipe"
            )
        yield [found[number] for number in sorted(found)]


def gather(count: int, seconds: float, stack: contextlib.ExitStack) -> dict[int, Peer]:
    """Return the nodes, by number, that came within `seconds`; at once when all are there. `stack` closes them."""
    host, port = master()
    try:
        server = stack.enter_context(socket.create_server((host, port)))
    except OSError as error:
        raise UserError(
            f"MASTER={host}:{port}: this machine can't listen there ({error.strerror}). Expected an address of node 0, "
            f"which the other nodes reach, and a free port"
        ) from error
    server.settimeout(0.5)
    found: dict[int, Peer] = {}
    deadline = time.monotonic() + seconds
    while len(found) < count - 1 and time.monotonic() < deadline:
        try:
            opened, (address, *_) = server.accept()
        except TimeoutError:
            continue
        connection = stack.enter_context(watched(opened))
        with contextlib.suppress(*GONE, KeyError, TypeError, ValueError):  # somebody else's
            hello = receive(connection) if connection.poll(5) else {}
            number, processes = int(hello["node"]), int(hello["processes"])
            if not 0 < number < count:
                send(connection, {"refused": f"NODE_RANK={number}: NODES={count} on node 0. Expected 1 to {count - 1}"})
            elif number in found and found[number].poll() is None:
                send(connection, {"refused": f"NODE_RANK={number}: another machine has this number. Choose another"})
            else:
                found[number] = Peer(f"node {number} ({address})", connection, processes)
    return found


def files_to_hand_over(run: Run, checkpoint: str | None) -> dict[str, Path]:
    """Return the files that ranks on another machine read, by the name that they get there."""
    names = [IDENTITY, *([f"checkpoints/{ladder.FILE}"] if (run.checkpoints / ladder.FILE).is_file() else [])]
    if checkpoint:
        inside = [path for path in Path(checkpoint).rglob("*") if path.is_file()]
        names += [path.relative_to(run.folder).as_posix() for path in inside]
    files = {f"run/{name}": run.folder / name for name in names}
    for stage, folder in run.inputs.items():
        for name in (MANIFEST, *object_in(folder / MANIFEST)["files"]):
            files[f"inputs/{stage}/{name}"] = folder / name
    return files


def hand_over(work: Mapping[str, Any], group: Group, files: Mapping[str, Path], others: Sequence[Peer]) -> None:
    """Hand `work` to the other nodes, with those of `files` that each lacks; `group` are the ranks of node 0.

    Raises `UserError` when a machine is lost.
    """
    sizes = {name: path.stat().st_size for name, path in files.items()}
    stated = {name: {"bytes": sizes[name], "sha256": digest_of(path)} for name, path in files.items()}
    first = group.own
    for node in others:
        own = replace(group, first=first, own=node.processes)
        first += node.processes
        node.code, node.failure = None, None
        try:
            send(node.connection, {**work, "group": asdict(own), "files": stated})
            for name in receive(node.connection)["lacks"]:
                with files[name].open("rb") as file:
                    for _ in range(0, sizes[name], CHUNK):
                        node.connection.send_bytes(file.read(CHUNK))
        except GONE as error:
            raise UserError(f"{lost(node.name)}. Run the same command again") from error


def own_interface(connection: Connection) -> dict[str, str]:
    """Return GLOO_SOCKET_IFNAME, unless it is set: the interface of this connection.

    By itself, gloo takes the address of the machine's name, which on many is that of loopback.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        address = own.getsockname()[0]
        for _, name in [] if "GLOO_SOCKET_IFNAME" in os.environ else socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                asked = fcntl.ioctl(own.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(asked[20:24]) == address:
                    return {"GLOO_SOCKET_IFNAME": name}
    return {}
