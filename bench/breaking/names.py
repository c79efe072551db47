"""Hostile names: of a recipe, of data, of a model, of a reward's file, and questions."""

import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.breaking.checkout import make_checkout
from bench.breaking.child import call_apart
from bench.breaking.files import load, stage
from tests.support import disks, hostile_files

NAMES = [
    "with blank", " leading", "trailing ", "it's", 'double"quote', "$(touch made)", "`touch made`", "; touch made;",
    "| touch made", "&& touch made", "$HOME", "--help", "-rf", "-", "*", "?[a-z]*", "{a,b}", "~", "#hash", "!x",
    "%s%n%d", "a\\b", "a\tb", "a\nb", "\r", "\x01\x7f", "\u202egnp", "日本語", "e\u0301", "a:b", "a=b", "a,b", "a;b",
    "CON", "..a", ".hidden", "x" * 200, "é" * 100, "@file", "$(shell touch made)", "$$", "a%b", "a+b", "<script>",
    "null", "..", "a\udcffb", "::x::", "http:x", "hf:x", "zip::x",
]  # fmt: skip
KINDS = ("recipe", "data", "model", "reward", "question")


def usable(name: str) -> bool:
    """Say whether a file system takes the name."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and len(os.fsencode(name)) <= 240


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run make on a checkout whose Python notes its arguments and does nothing."""
    return subprocess.run(["make", "--old-file", ".venv/installed", *arguments], cwd=checkout, capture_output=True,
                          check=False, env=os.environ | {"RUNTIME": "local"})  # fmt: skip


def noting_checkout(folder: Path) -> Path:
    """Make a checkout whose `python` writes each argument, ended by NUL, to the file `log`, and finishes the stage."""
    checkout = make_checkout(folder / "checkout")
    (checkout / ".venv").unlink()
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (checkout / ".venv" / "installed").touch()
    python.write_text(
        '#!/bin/bash\nprintf "%s\\0" "$@" >> "$(dirname "$0")/log"\n'
        'while (($#)); do [[ $1 != --out ]] || { mkdir -p "$2"; echo "{}" > "$2/manifest.json"; }; shift; done\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return checkout


def by_make(kind: str, name: str, checkout: Path) -> None:
    """Give make a recipe or data of this name: it hands it on as it is, or refuses it in one line."""
    from stages.lib.errors import UserError

    log = checkout / ".venv" / "bin" / "log"
    log.unlink(missing_ok=True)
    word = name.replace("$", "$$")  # as on make's command line, where one $ is make's own
    shutil.rmtree(checkout / "artifacts", ignore_errors=True)
    if kind == "recipe":
        (checkout / "recipes" / f"{name}.toml").write_bytes((checkout / "recipes" / "breaks.toml").read_bytes())
        done, wanted = make(checkout, "base-model", f"RECIPE={word}"), f"recipes/{name}.toml"
        (checkout / "recipes" / f"{name}.toml").unlink()
    else:
        (checkout / name).mkdir(exist_ok=True)
        done, wanted = make(checkout, "prepare-data", "RECIPE=tiny-gsm8k", f"DATA={word}"), name
    if list(checkout.rglob("made")):
        raise RuntimeError("a name was run as a command")
    if done.returncode:
        raise UserError((done.stderr or b"").decode(errors="replace")[-300:])
    handed = log.read_bytes().split(b"\0")
    if os.fsencode(wanted) not in handed and os.fsencode(f"./{wanted}") not in handed:
        raise RuntimeError(f"handed on as {handed}")


def cases(folder: Path, chance: random.Random) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield kind, name and what is to be done with each, in an order of chance."""
    finished = disks.all_stages()
    load()
    checkout = noting_checkout(folder)
    order = [(kind, name) for kind in KINDS for name in NAMES if kind == "question" or usable(name)]
    chance.shuffle(order)
    for number, (kind, name) in enumerate(order):
        place = folder / str(number)
        place.mkdir()
        yield kind, name, lambda kind=kind, name=name, place=place: act(kind, name, place, finished, checkout)


def act(kind: str, name: str, place: Path, finished: Path, checkout: Path) -> None:
    """Do with a name what Temper does with it."""
    if kind == "question":
        words = ["--recipe", finished / "micro.toml", "--ollama-modelfile", finished / "ollama-modelfile"]
        stage("ask", *words, "--question", name)
        return
    if kind in ("recipe", "data"):
        by_make(kind, name, checkout)
    if kind == "data":
        from stages.lib.data.files import read_batches
        from stages.lib.data.place import files_in
        from stages.lib.recipe.tables import Source

        (place / name).mkdir()
        (place / name / "train.jsonl").write_bytes(hostile_files.good_rows(".jsonl"))
        source = Source(name=name, split="train", use=["sft"], question="question", answer="answer")
        pieces = list(read_batches(source, files_in(place / name, source)))
        if sum(len(piece.parsed().numbers) for piece in pieces) != len(hostile_files.ROWS):
            raise RuntimeError("not all rows were read")
    if kind == "reward":
        from stages.lib.rewards.own import check_own, load_own

        (place / f"{name}.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
        check_own(f"{name}.py:f", place)
        if load_own([f"{name}.py:f"], place)[f"{name}.py:f"](["a", "b"]) != [1.0, 1.0]:
            raise RuntimeError("another reward was called")
    if kind == "model":
        from bench.breaking.files import local_recipe

        shutil.copytree(finished / "base-model" / "model", place / name / "m")
        recipe = local_recipe(place, place / name / "m")
        stage("prepare_data", "--recipe", recipe, "--out", place / "out")


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Try `count` names; return the lines of the report."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    ends: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    wrong, began = [], time.monotonic()
    for number, (kind, name, call) in enumerate(cases(folder, random.Random(seed)), 1):
        if number > count:
            break
        outcome = call_apart(call)
        ends[kind][outcome.how] += 1
        if outcome.how == "broken":
            wrong.append(f"{kind} {name!a}: {outcome.last}")
            print(wrong[-1], flush=True)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    rows = [f"| {kind} | {each['fine']} | {each['refused']} | {each['broken']} |" for kind, each in ends.items()]
    return [
        f"{count} hostile names, seed {seed}. A recipe's and data's name goes by `make`; a model's to prepare-data.",
        "",
        "| what | taken as it is | refused with one message | otherwise |",
        "|---|--:|--:|--:|",
        *rows,
        "",
        f"Wrong: {'; '.join(wrong) if wrong else 'nothing'}.",
    ]
