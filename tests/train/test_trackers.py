"""Trackers, each for real from its package and without a network: one run, one curve over stop and resume."""

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.train import trackers
from tests.support import micro
from tests.support.recipes import read_tables, write_tables

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ALL = ["swanlab", "wandb", "trackio", "mlflow"]
KEYS = (
    "WANDB_API_KEY",
    "WANDB_MODE",
    "SWANLAB_API_KEY",
    "SWANLAB_MODE",
    "MLFLOW_TRACKING_URI",
    "TRACKIO_SPACE_ID",
    "TRACK",
)
LOSS, STEPS = "train/loss", list(range(1, 9))


def grpo(finished: Path, out: Path, recipe: Path, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name not in KEYS}
    command = [sys.executable, "-m", "stages.grpo", *micro.arguments("grpo", finished, out, recipe)]
    return subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=False)


def wandb_steps(folder: Path) -> tuple[set[str], list[int]]:
    """Return the ids of the runs on the disk, and the steps at which a loss was logged."""
    from wandb.proto import wandb_internal_pb2

    ids, steps = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        ids.add(path.stem.removeprefix("run-"))
        for content in leveldb_records(path.read_bytes()[7:], 7):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                steps += [int(values["_step"])] if LOSS in values else []
    return ids, steps


def leveldb_records(data: bytes, place: int) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, whose `data` begins at `place` of its first block of 32 KiB."""
    parts, end = b"", place + len(data)
    while place + 7 <= end:
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        start = place - end
        _, length, kind = struct.unpack("<IHB", data[start : start + 7 or None])
        parts += data[start + 7 : start + 7 + length or None]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def trackio_steps(folder: Path) -> tuple[set[str], list[int]]:
    (path,) = folder.glob("trackio/*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return {name for name, _, _ in rows}, [step for _, step, text in rows if LOSS in json.loads(text)]


def mlflow_steps(folder: Path) -> tuple[set[str], list[int]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"] * len(runs)
    assert any(Path(folder / "mlflow" / "files").rglob("completions/step-8.json"))
    return {run.info.run_id for run in runs}, [
        metric.step for run in runs for metric in client.get_metric_history(run.info.run_id, LOSS)
    ]


def swanlab_steps(folder: Path) -> tuple[set[str], list[int]]:
    """Return the ids of the runs on the disk, and the steps at which a loss was logged."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    ids, steps = set(), []
    for path in sorted((folder / "swanlab").glob("run-*/run-*.swanlab")):
        ids.add(path.stem.removeprefix("run-"))
        reader = DataStoreReader()
        reader.open(path)
        for content in reader:
            record = Record()
            record.ParseFromString(content)
            if record.HasField("scalar") and record.scalar.key == LOSS:
                steps.append(record.scalar.step)
    return ids, steps


def test_each_tracker_has_one_run_and_one_curve_over_stop_and_resume(finished: Path, tmp_path: Path) -> None:
    tables = read_tables()
    for name, numbers in micro.NUMBERS.items():
        tables[name] |= numbers
    tables["tracking"] = {"to": [*ALL, "tensorboard"], "project": "held"}
    (tmp_path / "own.py").write_text(micro.OWN)
    recipe = write_tables(tmp_path / "micro.toml", tables)
    out = tmp_path / "run" / "grpo"
    stopped = grpo(finished, out, recipe, TERM_AT_CALL="5")
    assert stopped.returncode == 143, stopped.stderr
    done = grpo(finished, out, recipe)
    assert done.returncode == 0, done.stderr
    assert "tracking:" not in stopped.stderr + done.stderr
    folder = tmp_path / "run" / "tracking"
    state = json.loads((folder / "grpo.json").read_text())
    assert state["step"] == 8
    for read in (wandb_steps, trackio_steps, mlflow_steps, swanlab_steps):
        ids, steps = read(folder)
        assert (len(ids), steps) == (1, STEPS), read.__name__
    assert wandb_steps(folder)[0] == swanlab_steps(folder)[0] == {state["id"]}
    # What infer finds goes to GRPO's run.
    given = {name: str(finished / name) for name in ("base-model", "prepare-data", "sft")} | {"grpo": str(out)}
    options = [word for name, path in given.items() for word in (f"--{name}", path)]
    command = [
        sys.executable,
        "-m",
        "stages.infer",
        "--recipe",
        str(recipe),
        *options,
        "--out",
        str(out.parent / "infer"),
    ]
    kept = {name: value for name, value in os.environ.items() if name not in KEYS} | {"TRACK": "trackio"}
    infer = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert infer.returncode == 0, infer.stderr
    with sqlite3.connect(folder / "trackio" / "held.db") as base:
        rows = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert rows[-1][:2] == (rows[0][0], 9)
    figures = json.loads((out.parent / "infer" / "manifest.json").read_text())["metrics"]
    assert json.loads(rows[-1][2])["evaluation/grpo/accuracy"] == figures["grpo"]["accuracy"]
    # The same bytes as without a tracker, and the identity of before: nothing is made again.
    adapter = "adapter/adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (finished / "grpo" / adapter).read_bytes()
    again = grpo(finished, out, finished / "micro.toml")
    assert "up to date" in again.stdout


CURVE = ("p", "n", "0" * 20, Path(), {}, False)


def fails(*arguments: object) -> None:
    raise ConnectionError("no route to host\nand a second line")


def hangs(*arguments: object) -> None:
    time.sleep(60)


@pytest.mark.parametrize(("broken", "at"), [("open", "open"), ("log", "step 3"), ("finish", "end")])
@pytest.mark.parametrize(
    ("how", "said"), [(fails, "ConnectionError: no route to host"), (hangs, "TimeoutError: it took too long")]
)
def test_a_tracker_that_fails_or_hangs_says_so_once_and_the_others_go_on(monkeypatch, capsys, broken, at, how, said):
    seen: list[tuple[str, object]] = []

    def working(curve: trackers.Curve) -> trackers.Opened:
        return trackers.Opened(lambda *values: seen.append(("log", values)), lambda: seen.append(("finish", None)))

    def other(curve: trackers.Curve) -> trackers.Opened:
        if broken == "open":
            how()
        return working(curve)._replace(**({} if broken == "open" else {broken: how}))

    monkeypatch.setattr(trackers, "OPEN", {"one": other, "two": working})
    for name in ("OPEN_SECONDS", "LOG_SECONDS", "FINISH_SECONDS"):
        monkeypatch.setattr(trackers, name, 0.2)
    run = trackers.Trackers(["one", "two"], trackers.Curve(*CURVE))
    run.log({"a": 1.0}, [], 3)
    run.log({"a": 2.0}, [], 4)
    run.finish()
    assert capsys.readouterr().err == f"tracking: one failed ({at}; {said}); the stage goes on without it\n"
    mine = 2 if broken in ("open", "log") else 4  # the broken one's own entries come before it broke
    assert [what for what, _ in seen].count("log") == mine
    assert [what for what, _ in seen][-1] == "finish"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(("asked", "expected"), [
    ("", ["wandb"]), ("none", []), ("tensorboard", []), ("mlflow,wandb", ["wandb", "mlflow"]),
    (" trackio ", ["trackio"]),
])  # fmt: skip
def test_the_environment_comes_before_the_recipe(monkeypatch, tmp_path, asked, expected):
    monkeypatch.setenv("TRACK", asked)
    recipe = read_recipe(write_tables(tmp_path / "r.toml", read_tables() | {"tracking": {"to": ["wandb"]}}))
    assert trackers.wanted(recipe) == expected


def test_a_tracker_that_is_not_known_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACK", "wandb,commet")
    recipe = read_recipe(write_tables(tmp_path / "r.toml", read_tables()))
    with pytest.raises(UserError, match="'commet' is not known; expected swanlab, wandb, trackio, mlflow, tensorboard"):
        trackers.wanted(recipe)
