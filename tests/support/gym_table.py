"""The table of docs/reasoning-gym.md: `python -m tests.support.gym_table` prints what it finds of each task, as JSON.

Two processes with different PYTHONHASHSEED must print the same bytes: so the digests of the rows are among them.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from stages.lib.answers.gym import TASKS, load_task

ROWS = 40
HOSTILE = (
    "__import__('os').getpid()", "[__import__('os').getpid()]", "1+1", "(1,2)", "{'a': 1}", '{"a": [1]}', "{}",
    "nan", "inf", "-", "1/0", "1e999", "True", "a,b;c", "\n\n", "\x00", "\ud800", "\u0661", "9" * 5000, "(" * 3000,
    "[[" * 2000,
)  # fmt: skip
evaluated: list[str] = []  # what Python ran from text while scorers were at work
watches = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note each code object that starts from text: eval, exec, and SymPy's parser, which is made of them."""
    if watches and event == "exec":
        evaluated.append(str(arguments[0]))


def look_at(task: str) -> dict[str, Any]:
    """Return what the table says of a task: the least score of right answers, the mean scores of cheats, and more."""
    global watches
    dataset, settings = load_task(task)
    made = dataset(settings(seed=12345, size=ROWS))
    entries = [made[place] for place in range(ROWS)]
    rows = [json.loads(json.dumps(entry)) for entry in entries]
    scorer = dataset(settings()).score_answer
    answers = [row["answer"] for row in rows]
    [(commonest, _)] = Counter(answers).most_common(1)
    cheats: dict[str, Callable[[dict[str, Any]], str]] = {
        "`0`": lambda row: "0",
        "`1`": lambda row: "1",
        "`Yes`": lambda row: "Yes",
        "`[]`": lambda row: "[]",
        "the question": lambda row: row["question"],
        "its last word": lambda row: row["question"].split()[-1],
        "the commonest answer": lambda row: commonest,
        "many answers": lambda row: " ".join(dict.fromkeys(answers)),
    }
    evaluated.clear()
    watches = True
    found: dict[str, Any] = {
        "texts": all(isinstance(entry["answer"], str) for entry in entries),
        "right": min(scorer(entry["answer"], entry) for entry in entries),
        "right_after_json": min(scorer(row["answer"], row) for row in rows),
        "cheats": {
            name: round(sum(scorer(cheat(row), row) for row in rows) / ROWS, 3) for name, cheat in cheats.items()
        },
        "hostile": max(float(scorer(text, row)) for text in HOSTILE for row in rows[:3]),
    }
    watches = False
    return found | {"evaluated": len(evaluated), "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}


def load_patience() -> Callable[[str, str], float]:
    """Return a scorer, as a `Worker` loads it, that takes everything for right and one answer forever."""

    def grade(true: str, given: str) -> float:
        while given == "never ends":
            pass
        return 1.0

    return grade


if __name__ == "__main__":
    sys.addaudithook(watch)
    print(json.dumps({task: look_at(task) for task in sys.argv[1:] or TASKS}))
