"""Callbacks of transformers' Trainer: progress bar, an orderly stop, health, the garbage collector."""

import gc
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.lib.bars import open_bar, say, show_beside
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Health
from stages.lib.train import health, ranks
from stages.lib.train.checkpoints import collect_random_states, mark_complete


def heeded_signals() -> list[signal.Signals]:
    """Return the signals on which a run saves and stops; a signal that is ignored, as HUP under nohup, is not one."""
    ending = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    return [number for number in ending if signal.getsignal(number) != signal.SIG_IGN]


def make_callbacks(bar: Mapping[str, str], round_steps: int) -> tuple[Any, Any]:
    """Return the progress bar and the signal handler, as callbacks of transformers' Trainer.

    `bar` names metrics of the log to show beside it, by a short name. The bar's `close` is called also after an error.
    """
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """A bar with the metrics named in `bar` and the time left."""

        def __init__(self):
            self.shown: Any = None
            self.values: dict[str, str] = {}  # those of earlier steps stay: not every step measures all

        def on_train_begin(self, args, state, control, **kwargs):
            self.shown = open_bar(state.max_steps, "step", done=state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            self.shown.update(state.global_step - self.shown.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.values |= {name: f"{logs[key]:.3g}" for name, key in bar.items() if key in logs}
            show_beside(self.shown, self.values)

        def on_train_end(self, args, state, control, **kwargs):
            self.close()

        def close(self):
            if self.shown:
                self.shown.close()

    class StopOnSignal(TrainerCallback):
        """Save and stop after the round in which TERM, HUP or INT came; mark what was saved as complete."""

        signal: int | None = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.before = {number: signal.signal(number, self.note) for number in heeded_signals()}

        def note(self, number, frame):
            self.signal = number
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process at once

        def on_step_end(self, args, state, control, **kwargs):
            heard = ranks.largest(self.signal or 0)  # what one got, all heed; what comes meanwhile, a step later
            self.signal = heard or self.signal
            if heard and state.global_step % round_steps == 0:
                control.should_save = control.should_training_stop = True

        def on_save(self, args, state, control, **kwargs):
            collect_random_states(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if ranks.is_first():
                mark_complete(Path(args.output_dir), state.global_step)

        def on_train_end(self, args, state, control, **kwargs):
            for number, handler in self.before.items():
                signal.signal(number, handler)

    return Progress(), StopOnSignal()


def watch_health(knobs: Health) -> Any:
    """Return a callback that logs each step, and stops a run that wastes GPU hours or says so once, as `knobs` say.

    A log of each step depends neither on log_steps nor on the step at which a run was killed: the trainer keeps its
    sums since the last entry in memory alone.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.said: set[str] = set()

        def on_train_begin(self, args, state, control, **kwargs):
            state.logging_steps, state.save_steps = 1, args.save_steps  # not those of the checkpoint it goes on from

        def on_log(self, args, state, control, **kwargs):
            steps = replace(knobs, log_entries=knobs.log_entries * args.logging_steps)
            for check, advice in health.find(state.log_history, steps, scaled=args.fp16).items():
                if check not in knobs.warn_only:
                    raise UserError(f"stopped at step {state.global_step} by the {check} check: {advice}")
                if check not in self.said:
                    self.said.add(check)
                    say(f"step {state.global_step}, {check} check: {advice}")

    return Watch()


def reseed() -> Any:
    """Return a callback that seeds this rank by the step from which it goes on.

    It is for a checkpoint of another number of ranks, which has no random state for each: without this they would draw
    again what the first steps drew.
    """
    from transformers import TrainerCallback, set_seed

    class Reseed(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            set_seed(args.seed + 1_000_003 * state.global_step + ranks.rank())

    return Reseed()


def settle_heap() -> Any:
    """Return a callback that hides all objects alive after the first step from Python's garbage collector.

    Model, trainer and compiled code live to the end. A step's completions are many small objects, which start a
    collection over everything that lives: up to 0.7 s of a step of 12 s, measured without this callback. vLLM hides
    what there is when it starts; Unsloth would before the first step, but not after vLLM did.
    """
    from transformers import TrainerCallback

    class SettleHeap(TrainerCallback):
        settled = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.settled:
                gc.collect()
                gc.freeze()
                self.settled = True

        def on_train_end(self, args, state, control, **kwargs):
            gc.unfreeze()

    return SettleHeap()
