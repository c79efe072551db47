"""Lend this machine's GPUs to another, node 0, which runs the stages."""

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.artifact.digests import sha256_of
from stages.lib.disk import naming_disk_faults
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.train import nodes
from stages.lib.train.failures import Failure, Outcome
from stages.lib.train.launch import RANKS, process_count, rank_variables, run_ranks
from stages.lib.train.nodes import GONE, Group, Peer, receive, send, watched

TRAINING = ("sft", "grpo")
INPUTS = ("base-model", "prepare-data", "sft", "score-base")
RETRY_SECONDS = 1
CLOSING_SECONDS = 30  # for the other nodes to hear that there is no more work


@click.command(help=__doc__)
@options.recipe
@click.option("--folder", type=options.FOLDER, required=True, help="Where it keeps what node 0 hands over.")
@click.option("--end", is_flag=True, help="On node 0: tell the other machines that there is no more work.")
def main(recipe: Path, folder: Path, end: bool) -> None:
    if end:
        end_all()
        return
    read_recipe(recipe)  # what is wrong with it is said now
    number, (host, port), processes = nodes.node_rank(), nodes.master(), process_count()
    while True:
        click.echo(f"node {number}: waiting for node 0 at {host}:{port}", err=True)
        with contextlib.suppress(*GONE), connect(host, port) as connection:  # it ends with the stage
            node_0 = Peer(f"node 0 ({host})", connection, leads=True)
            send(connection, {"node": number, "processes": processes})
            work_for(node_0, number, recipe, folder)
        time.sleep(RETRY_SECONDS)


def end_all() -> None:
    """Tell the other nodes that there is no more work; say which did not come to hear it."""
    count = nodes.node_count()
    with contextlib.ExitStack() as stack:
        found = nodes.gather(count, CLOSING_SECONDS, stack)
        for node in found.values():
            with contextlib.suppress(*GONE):
                send(node.connection, {"done": True})
                node.poll(RETRY_SECONDS)  # until it has closed the connection
    if missing := [str(number) for number in range(1, count) if number not in found]:
        click.echo(f"node {', '.join(missing)} did not come to hear that there is no more work: end it there", err=True)


def connect(host: str, port: int) -> Any:
    """Return a connection to node 0, as soon as a stage that trains listens there."""
    while True:
        try:
            return watched(socket.create_connection((host, port), timeout=5))
        except OSError:
            time.sleep(RETRY_SECONDS)


def work_for(node_0: Peer, number: int, recipe: Path, folder: Path) -> None:
    """Train for node 0 as long as the connection holds.

    Raises `UserError` when node 0 refuses this node, and `SystemExit` when there is no more work, or on a signal.
    """
    while True:
        message = receive(node_0.connection)
        if "refused" in message:
            raise UserError(message["refused"])
        if "done" in message:
            click.echo(f"node {number}: node 0 has no more work", err=True)
            raise SystemExit(0)
        if "stage" not in message:
            continue  # it told this node to end what had ended by itself
        outcome = train(node_0, message, number, recipe, folder)
        said = {0: "ended", 1: "failed; node 0 says why"}.get(outcome.code, "stopped on a signal")
        click.echo(f"node {number}: {message['stage']}: {said}", err=True)
        if node_0.code is None:
            node_0.tell(outcome)
        elif node_0.failure:  # lost
            click.echo(f"node {number}: {node_0.failure.text}", err=True)
            return
        else:
            node_0.tell(Outcome(1, None))
            node_0.code = None
        if outcome.handed:
            raise SystemExit(128 + outcome.handed[0])


def train(node_0: Peer, work: Mapping[str, Any], number: int, recipe: Path, folder: Path) -> Outcome:
    """Take over what node 0 hands over, run its ranks on this machine, and return how they ended."""
    run, stage = folder / "run", work["stage"]
    with naming_disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        inputs = take_files(node_0, work["files"], folder)
    if stage not in TRAINING or not set(inputs) <= set(INPUTS):
        raise OSError(f"not work for a node: {stage}")
    if sha256_of(recipe) != work["recipe"]:
        text = (
            f"node {number}: {recipe} is not the recipe of node 0. Copy it from there, and run the same command again"
        )
        return Outcome(1, Failure("user", text))
    group = Group(**work["group"])
    click.echo(
        f"node {number}: {stage}: {group.own} of {group.size} ranks train here; their output is in {run / RANKS}",
        err=True,
    )
    given = [word for name in inputs for word in (f"--{name}", str(folder / "inputs" / name))]
    command = [sys.executable, "-m", f"stages.{stage}", "--recipe", str(recipe), *given, "--out", str(run)]
    own = nodes.own_interface(node_0.connection)
    return run_ranks(command, [rank_variables(group, place) | own for place in range(group.own)], run, [node_0])


def take_files(node_0: Peer, stated: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    """Make run and inputs in `folder` hold exactly the files that node 0 states; return the names of the inputs.

    Raises OSError when a name leads elsewhere, or a file did not arrive whole.
    """
    for name in stated:
        parts = name.split("/")
        if parts[0] not in ("run", "inputs") or len(parts) < 2 or {"", ".", ".."} & set(parts) or "\0" in name:
            raise OSError(f"not a file for a node: {name!r}")
    for path in [path for name in ("run", "inputs") for path in (folder / name).rglob("*")]:
        if path.is_file() and path.relative_to(folder).as_posix() not in stated:
            path.unlink()
    lacks = [name for name, entry in stated.items() if not has(folder / name, entry["sha256"])]
    send(node_0.connection, {"lacks": lacks})
    for name in lacks:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while file.tell() < stated[name]["bytes"]:
                file.write(node_0.connection.recv_bytes(nodes.MAX_MESSAGE))
        if not has(path, stated[name]["sha256"]):
            raise OSError(f"{path}: did not arrive whole")
    for path in folder.glob("run/checkpoints/checkpoint-*"):
        if not any(name.startswith(f"run/checkpoints/{path.name}/") for name in stated):
            shutil.rmtree(path)
    return sorted({name.split("/")[1] for name in stated if name.startswith("inputs/")})


def has(path: Path, sha256: str) -> bool:
    """Say whether there is a file with this digest."""
    return path.is_file() and sha256_of(path) == sha256


if __name__ == "__main__":
    main()
