"""Trackers: what a run logs, also where people watch it, SwanLab, Weights & Biases, Trackio or MLflow.

Each stage that trains is one run of a tracker, with one id over kill and resume; what was logged before is not logged
again. Without a key in the environment a tracker writes on this disk, into the folder `tracking` beside the stages. A
tracker that fails says so once, and training goes on without it. TensorBoard's files are written in any case: the page
of the run is drawn from them.
"""

import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.artifact.environment import output_of
from stages.lib.artifact.manifest import write_json
from stages.lib.bars import say
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Recipe
from stages.lib.train.rollouts import scored

OPEN_SECONDS, LOG_SECONDS, FINISH_SECONDS = 60.0, 20.0, 60.0  # after which a tracker is left, as without a network
TRACKING = "tracking"  # the folder beside the stages
TABLE_ROWS = 16  # completions of a step in a table
NO_LOGS = ("total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch")


@dataclass(frozen=True)
class Curve:
    """A run of a tracker: `number` is its id, `folder` where it may write, `config` the recipe's values."""

    project: str
    name: str
    number: str
    folder: Path
    config: dict[str, Any]
    is_resumed: bool


class Opened(NamedTuple):
    """A tracker's run that is open: how to log a step's values and its rows of completions, and how to end."""

    log: Callable[[dict[str, float], list[dict[str, Any]], int], None]
    finish: Callable[[], None]


def prepare(recipe: Recipe, artifacts: Path) -> None:
    """Set what trackers read when they are imported, which TRL does. Raises `UserError` for one that is not known."""
    if "trackio" in wanted(recipe):
        os.environ.setdefault("TRACKIO_DIR", str(artifacts.absolute() / TRACKING / "trackio"))


def wanted(recipe: Recipe) -> list[str]:
    """Return the trackers to open: those of `TRACK` in the environment, with commas between them, else the recipe's.

    Raises `UserError` for a name that is not known; `TRACK=none` asks for none.
    """
    asked = os.environ.get("TRACK", "").strip()
    names = [name.strip() for name in asked.split(",")] if asked else list(recipe.tracking.to)
    known = (*OPEN, "tensorboard", "none")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"TRACK={asked}: {unknown[0]!r} is not known; expected {', '.join(known)}, commas between them")
    return [name for name in OPEN if name in names and "none" not in names]


def curve_of(recipe: Recipe, stage: str, artifacts: Path, *, is_resumed: bool) -> Curve:
    """Return the run of a tracker for `stage`; its id is in `tracking/STAGE.json` and a resumed stage keeps it."""
    folder = artifacts.absolute() / TRACKING
    folder.mkdir(parents=True, exist_ok=True)
    state = read_state(folder, stage)
    is_resumed = is_resumed and "id" in state
    number = state["id"] if is_resumed else secrets.token_hex(10)
    if not is_resumed:
        write_json(folder / f"{stage}.json", {"id": number, "step": 0})
    commit = output_of("git", "-C", str(Path(__file__).parents[3]), "rev-parse", "--short=8", "HEAD") or "no-commit"
    config = {name: table for name, table in asdict(recipe).items() if isinstance(table, dict) and name != "tracking"}
    project = recipe.tracking.project or recipe.path.stem
    name = f"{recipe.tracking.name or recipe.path.stem}-{stage}-{commit}"
    return Curve(project, name, number, folder, config, is_resumed)


def read_state(folder: Path, stage: str) -> dict[str, Any]:
    """Return the `id` of a stage's run and the last `step` that was logged; empty where there is none."""
    try:
        state: dict[str, Any] = json.loads((folder / f"{stage}.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


class Trackers:
    """The open trackers of a stage."""

    def __init__(self, names: Sequence[str], curve: Curve):
        self.curve = curve
        self.opened: dict[str, Opened] = {}
        for name in names:
            if (opened := self.tried(name, partial(OPEN[name], curve), "open", OPEN_SECONDS)) is not None:
                self.opened[name] = opened

    def tried(self, name: str, call: Callable[[], Any], what: str, seconds: float) -> Any:
        """Return what `call` returns; when it fails or takes over `seconds`, say so, leave the tracker, return None."""
        before = signal.signal(signal.SIGALRM, too_slow)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return call()
        except Exception as error:  # whatever a tracker's own code or its server does
            self.opened.pop(name, None)
            said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            say(f"tracking: {name} failed ({what}; {said}); the stage goes on without it")
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def log(self, values: dict[str, float], rows: list[dict[str, Any]], step: int) -> None:
        """Log a step's values, and rows of completions where there are any."""
        for name, opened in list(self.opened.items()):
            self.tried(name, partial(opened.log, values, rows, step), f"step {step}", LOG_SECONDS)

    def finish(self) -> None:
        """End all runs."""
        for name, opened in list(self.opened.items()):
            self.tried(name, opened.finish, "end", FINISH_SECONDS)


def too_slow(number: int, frame: Any) -> None:
    """Raise `TimeoutError`: a call of a tracker took too long."""
    raise TimeoutError("it took too long")


def follow(recipe: Recipe, stage: str, artifacts: Path, trainer: Any, table_steps: int = 0) -> list[Any]:
    """Return a callback for `trainer` that logs each step to the trackers of `recipe`; none without any.

    `artifacts` is the folder with a folder for each stage. With `table_steps`, a table of completions goes with every
    so many steps of GRPO. Raises `UserError` for a tracker that is not known.
    """
    names = wanted(recipe)
    if not names:
        return []
    import torch
    from transformers import TrainerCallback

    class Follow(TrainerCallback):
        trackers: Trackers | None = None

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                curve = curve_of(recipe, stage, artifacts, is_resumed=state.global_step > 0)
                self.logged = read_state(curve.folder, stage)["step"]
                self.trackers, self.before, self.tokens = Trackers(names, curve), time.monotonic(), None

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not self.trackers or state.global_step <= self.logged or "train_runtime" in logs:
                return
            now, tokens = time.monotonic(), logs.get("num_tokens")
            values = {f"train/{key}": float(logs[key]) for key in logs if key not in NO_LOGS}
            values["machine/seconds_per_step"] = now - self.before
            if tokens is not None and self.tokens is not None:
                values["machine/tokens_per_second"] = (tokens - self.tokens) / (now - self.before)
            if torch.cuda.is_available():
                values["machine/gpu_memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
            rows = sampled(trainer) if table_steps and state.global_step % table_steps == 0 else []
            self.trackers.log(values, rows, state.global_step)
            self.logged, self.before, self.tokens = state.global_step, now, tokens
            write_json(self.trackers.curve.folder / f"{stage}.json",
                       {"id": self.trackers.curve.number, "step": state.global_step})  # fmt: skip

        def on_train_end(self, args, state, control, **kwargs):
            if self.trackers:
                self.trackers.finish()

    return [Follow()]


def sampled(trainer: Any) -> list[dict[str, Any]]:
    """Return completions of GRPO's last step with their rewards: those of the highest and of the lowest advantage."""
    logs = trainer._logs  # as in rollouts.py
    columns = {"completion": logs["completion"], "advantage": list(logs["advantages"]), **scored(logs["rewards"])}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows.sort(key=lambda row: row["advantage"])
    return rows if len(rows) <= TABLE_ROWS else [*rows[: TABLE_ROWS // 2], *rows[-TABLE_ROWS // 2 :]]


def add_result(recipe: Recipe, artifacts: Path, values: dict[str, float]) -> None:
    """Log the figures of a later stage to GRPO's run, at the step after its last."""
    prepare(recipe, artifacts)
    names = wanted(recipe)
    if names and read_state(artifacts / TRACKING, "grpo"):
        trackers = Trackers(names, curve_of(recipe, "grpo", artifacts, is_resumed=True))
        trackers.log(values, [], recipe.grpo.steps + 1)
        trackers.finish()


def open_wandb(curve: Curve) -> Opened:
    """Open a run of Weights & Biases: offline where there is no WANDB_API_KEY."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    run = wandb.init(
        project=curve.project, name=curve.name, id=curve.number, resume="allow", mode=mode, dir=str(curve.folder),
        config=curve.config, settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=30),
    )  # fmt: skip

    def log(values: dict[str, float], rows: list[dict[str, Any]], step: int) -> None:
        columns: list[Any] = list(rows[0]) if rows else []
        table = wandb.Table(columns=columns, data=[[row[key] for key in columns] for row in rows])
        run.log({**values, **({"completions": table} if rows else {})}, step=step)

    return Opened(log, run.finish)


def open_swanlab(curve: Curve) -> Opened:
    """Open a run of SwanLab: offline where there is no SWANLAB_API_KEY."""
    import swanlab

    mode = os.environ.get("SWANLAB_MODE") or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")
    run = swanlab.init(
        project=curve.project, name=curve.name, id=curve.number, resume="allow", mode=mode,
        log_dir=str(curve.folder / "swanlab"), config=curve.config,
    )  # fmt: skip

    def log(values: dict[str, float], rows: list[dict[str, Any]], step: int) -> None:
        texts = [swanlab.Text(json.dumps(row, ensure_ascii=False, indent=1)) for row in rows]
        run.log({**values, **({"completions": texts} if rows else {})}, step=step)

    return Opened(log, swanlab.finish)


def open_trackio(curve: Curve) -> Opened:
    """Open a run of Trackio: in SQLite files on this disk where there is no TRACKIO_SPACE_ID."""
    import pandas
    import trackio

    run = trackio.init(
        project=curve.project, name=f"{curve.name}-{curve.number[:6]}", config=curve.config, embed=False,
        resume="allow", space_id=os.environ.get("TRACKIO_SPACE_ID"), auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip

    def log(values: dict[str, float], rows: list[dict[str, Any]], step: int) -> None:
        table = {"completions": trackio.Table(dataframe=pandas.DataFrame(rows))} if rows else {}
        run.log({**values, **table}, step=step)

    return Opened(log, run.finish)


def open_mlflow(curve: Curve) -> Opened:
    """Open a run of MLflow: in an SQLite file on this disk where there is no MLFLOW_TRACKING_URI."""
    import logging

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    local = curve.folder / "mlflow"
    local.mkdir(exist_ok=True)
    server = os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(server or f"sqlite:///{local / 'mlflow.db'}")
    found = client.get_experiment_by_name(curve.project)
    where = None if server else (local / "files").as_uri()
    experiment = found.experiment_id if found else client.create_experiment(curve.project, artifact_location=where)
    runs = client.search_runs([experiment], f"tags.temper = '{curve.number}'")
    if runs:
        number = runs[0].info.run_id
        client.update_run(number, status="RUNNING")
    else:
        number = client.create_run(experiment, run_name=curve.name, tags={"temper": curve.number}).info.run_id
        texts = {f"{table}.{key}": str(value) for table, own in curve.config.items() for key, value in own.items()}
        client.log_batch(number, params=[Param(key, text[:500]) for key, text in texts.items()])

    def log(values: dict[str, float], rows: list[dict[str, Any]], step: int) -> None:
        now = int(1000 * time.time())
        client.log_batch(number, [Metric(key, value, now, step) for key, value in values.items()])
        if rows:
            client.log_dict(number, {"rows": rows}, f"completions/step-{step}.json")

    return Opened(log, lambda: client.set_terminated(number))


OPEN: dict[str, Callable[[Curve], Opened]] = {
    "swanlab": open_swanlab, "wandb": open_wandb, "trackio": open_trackio, "mlflow": open_mlflow,
}  # fmt: skip
