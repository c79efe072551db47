"""The tasks of reasoning-gym that Temper takes, and their scores, from 0, wrong, to 1, right.

A row's answer is JSON: an entry as the task made it (`question`, `answer`, `metadata`) with the task's name as `task`.
The scorer is the task's own. It runs in a process with limits of time and memory (`worker.py`). A task is in `TASKS` if
its scorer passed the table of docs/reasoning-gym.md: among other things it does not evaluate what a model wrote.
"""

import functools
import importlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from stages.lib.answers.worker import Worker
from stages.lib.errors import UserError

MAX_CHARACTERS = 10_000  # of an answer; a longer one is wrong
# By the folder of the package that has them; a file is named like its task.
_FOLDERS = {
    "algebra": "simple_equations".split(),
    "algorithmic": """
        ab base_conversion caesar_cipher count_primes cryptarithm group_anagrams jugs letter_jumble
        number_filtering palindrome_generation palindrome_partitioning pool_matrix rotate_matrix
        sentence_reordering string_splitting string_synthesis word_sequence_reversal word_sorting
    """.split(),
    "arc": "arc_1d".split(),
    "arithmetic": """
        basic_arithmetic chain_sum decimal_arithmetic decimal_chain_sum dice fraction_simplification
        leg_counting products
    """.split(),
    "cognition": "modulo_grid needle_haystack".split(),
    "games": "emoji_mystery kakurasu survo tsumego".split(),
    "geometry": "advanced_geometry simple_geometry".split(),
    "graphs": "path_star quantum_lock".split(),
    "logic": "knights_knaves".split(),
}
TASKS = {task: f"reasoning_gym.{folder}.{task}" for folder, names in _FOLDERS.items() for task in names}


def load_task(task: str) -> tuple[Any, Any]:
    """Return the dataset class of a task of `TASKS` and the dataclass of its settings.

    Raises `UserError` if reasoning-gym is not installed.
    """
    if "reasoning_gym" not in sys.modules:
        # The packages' own __init__ import all tasks, and with them packages that no lock has: two have no wheel.
        for name in ("reasoning_gym", *(f"reasoning_gym.{folder}" for folder in _FOLDERS)):
            spec = find_spec(name)
            if spec is None:
                raise UserError("the package reasoning-gym is not installed. Run: make setup")
            package = ModuleType(name)
            package.__path__ = list(spec.submodule_search_locations or [])
            sys.modules[name] = package
        importlib.import_module("reasoning_gym.coaching")
    importlib.import_module(TASKS[task])
    from reasoning_gym.factory import DATASETS

    dataset: tuple[Any, Any] = DATASETS[task]
    return dataset


def right_answer(row_answer: str) -> str:
    """Return the right answer of a row of reasoning-gym; a text that is no such row, as it is."""
    try:
        entry = json.loads(row_answer)
        return str(entry["answer"]) if "task" in entry else row_answer
    except (ValueError, TypeError, KeyError, RecursionError):
        return row_answer


def score(row_answer: str, given: str) -> float:
    """Return the score of `given` by the task's scorer; 0.0 if it fails or needs more time or memory than allowed."""
    return _WORKER.ask(row_answer, given) if len(given) <= MAX_CHARACTERS else 0.0


def _load_scorers() -> Callable[[str, str], float]:
    """Return the function that scores, in the worker."""
    scorers = functools.cache(_scorer)

    def grade(row_answer: str, given: str) -> float:
        try:
            entry = json.loads(row_answer)
            return float(scorers(entry["task"])(given, entry))
        except Exception:  # of what a model wrote, by code that is not ours: whatever it raises, the answer is wrong
            return 0.0

    return grade


def _scorer(task: str) -> Any:
    """Return the method of a task that scores an answer."""
    dataset, settings = load_task(task)
    return dataset(settings()).score_answer


_WORKER = Worker("reasoning-gym", _load_scorers)
