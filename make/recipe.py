"""Tell make and docker/run what they have to know of a recipe; needs Python 3.11 and nothing else.

recipe.py base-model FILE   "yes" if the recipe has a [base_model] table, else "no"
recipe.py paths FILE        what it may name on this disk, model, data and rewards of one's own with what these
                            import: absolute paths, each ended by NUL. A hub's name is among them; nothing lies there.

A recipe that is not TOML, or has other tables than it should, names nothing here: the stage says what is wrong with it.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from stages.lib.recipe.toml import tables_in
from stages.lib.rewards.local import own_reward_files


def main(what: str, file: Path) -> None:
    """Print what is asked for."""
    try:
        recipe = tables_in(file)
    except (OSError, ValueError):
        recipe = {}
    if what == "base-model":
        print("yes" if "base_model" in recipe else "no")
    else:
        paths = [path.absolute() for path in named(recipe, file.parent)]
        sys.stdout.buffer.write(b"".join(os.fsencode(path) + b"\0" for path in paths))


def named(recipe: dict[str, Any], folder: Path) -> list[Path]:
    """Return what the recipe names, as paths: rewards from the recipe's folder, the rest from the one make runs in."""
    models = [recipe.get("model"), *listed(table(recipe.get("data")).get("sources"))]
    names = [(Path(), table(each).get("name")) for each in models]
    rewards = [each for each in listed(table(recipe.get("rewards")).get("functions")) if isinstance(each, str)]
    rewards = [each for each in rewards if "\0" not in each]
    names += [(folder, name.rpartition(":")[0]) for name in rewards]
    found = [start / name for start, name in names if isinstance(name, str) and name and "\0" not in name]
    imported = own_reward_files(rewards, folder).values()
    return found + [path for path in imported if path not in {each.resolve() for each in found}]


def table(value: Any) -> dict[str, Any]:
    """Return `value` if it is a table, else an empty one."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """Return `value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
