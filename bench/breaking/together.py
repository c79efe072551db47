"""Several at once on one artifacts folder, and an input that is replaced while a stage reads it."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.breaking.checkout import RECIPE, end_all, held, make_checkout, stage_process, start, write_recipe
from bench.breaking.kills import RUN_SECONDS, differences, to_the_end

REFUSED = "another process is running"
Found = Callable[..., None]


def both(first: subprocess.Popen, second: subprocess.Popen) -> list[int]:
    """Return the exit codes of two."""
    return [process.wait(RUN_SECONDS) for process in (first, second)]


def said(checkout: Path) -> str:
    """Return what was said by all of a checkout's runs so far."""
    return checkout.with_name(f"{checkout.name}.log").read_text(errors="replace")


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Do the first `count` of the four; return the lines of the report. There is no chance in it: no `seed` is used."""
    mark = f"together-{os.getpid()}"
    checkout = make_checkout(folder / "together")
    faults = [each for each in [to_the_end(checkout, mark)] if each]
    expected = held(checkout / "artifacts" / RECIPE)
    lines: list[str] = []

    def found(what: str, codes: list[int], words: str, *, is_whole: bool = True) -> None:
        """Run make to its end, and note what came of it."""
        faults.extend(each for each in [to_the_end(checkout, mark)] if each)
        now = held(checkout / "artifacts" / RECIPE)
        if not is_whole:  # made by two checkouts: `outside` holds the paths of one of them
            now |= {name: expected[name] for name in now.keys() & expected.keys() if name.endswith("/outside")}
        differing = differences(expected, now)
        lines.append(f"- {what}: exit codes {codes}; {'OTHER BYTES' if differing else 'the same bytes'}; {words}.")
        print(lines[-1], flush=True)
        if differing or "NOT SAID" in words:
            faults.append(f"{what}: {differing or words}")

    for each in (replaced_input, two_makes, two_recipes, two_checkouts)[:count]:
        each(checkout, mark, found)
    traces = sum(path.read_text(errors="replace").count("Traceback") for path in folder.glob("*.log"))
    faults += [f"{traces} tracebacks"] if traces else []
    return [*lines, "", f"Wrong: {'; '.join(faults) if faults else 'nothing'}."]


def two_makes(checkout: Path, mark: str, found: Found) -> None:
    """Run make twice at once on one recipe."""
    before = said(checkout).count(REFUSED)
    shutil.rmtree(checkout / "artifacts" / RECIPE)
    codes = both(start(checkout, mark), start(checkout, mark))
    found("Two `make all` of one recipe", codes, f"{said(checkout).count(REFUSED) - before} refused in one line")


def two_recipes(checkout: Path, mark: str, found: Found) -> None:
    """Run make on two recipes at once."""
    shutil.rmtree(checkout / "artifacts" / RECIPE)
    write_recipe(checkout, "other", grpo={"seed": 5})
    codes = both(start(checkout, mark), start(checkout, mark, recipe="other"))
    found("`make all` of two recipes", codes, "both at once")


def two_checkouts(checkout: Path, mark: str, found: Found) -> None:
    """Run make at once in two checkouts with one artifacts folder."""
    before = said(checkout).count(REFUSED)
    second = make_checkout(checkout.with_name("second"))
    shutil.rmtree(second / "artifacts", ignore_errors=True)
    (second / "artifacts").symlink_to(checkout / "artifacts")
    shutil.rmtree(checkout / "artifacts" / RECIPE)
    codes = both(start(checkout, mark), start(second, mark))
    refused = said(second).count(REFUSED) + said(checkout).count(REFUSED) - before
    found("Two checkouts on one artifacts folder", codes, f"{refused} refused in one line", is_whole=False)


def replaced_input(checkout: Path, mark: str, found: Found) -> None:
    """Put other rows in place of sft.jsonl while sft trains, and the first ones back when make has ended."""
    artifacts = checkout / "artifacts" / RECIPE
    for name in ("sft", "grpo", "infer", "merge", "gguf", "ollama-modelfile"):
        shutil.rmtree(artifacts / name)
    rows = artifacts / "prepare-data" / "sft.jsonl"
    good = rows.read_bytes()
    process = start(checkout, mark)
    while (running := stage_process(mark)) is None or running[1] != "sft":
        time.sleep(0.1)
    while not (artifacts / "sft.unfinished" / "identity.json").exists():
        time.sleep(0.02)
    other = rows.with_name("other")
    other.write_bytes(good[: len(good) // 2])
    other.replace(rows)
    code = process.wait(RUN_SECONDS)
    end_all(mark, 5.0)
    other.write_bytes(good)
    other.replace(rows)
    told = "sft.jsonl: was replaced while sft read it" in said(checkout)
    words = "said so" if told else "NOT SAID"
    found("An input replaced while `sft` reads it, then `make all`", [code], words)
