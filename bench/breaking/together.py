"""Several at once on one artifacts folder, and an input that is replaced while a stage reads it."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from bench.breaking.checkout import RECIPE, end_all, held, make_checkout, stage_process, start, write_recipe
from bench.breaking.kills import RUN_SECONDS, differences, to_the_end


def both(first: subprocess.Popen, second: subprocess.Popen) -> list[int]:
    """Return the exit codes of two."""
    return [process.wait(RUN_SECONDS) for process in (first, second)]


def said(checkout: Path) -> str:
    """Return what was said by all of a checkout's runs so far."""
    return checkout.with_name(f"{checkout.name}.log").read_text(errors="replace")


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Do each once; return the lines of the report. There is no chance in it, so `seed` and `count` are not used."""
    mark = f"together-{os.getpid()}"
    checkout = make_checkout(folder / "together")
    artifacts = checkout / "artifacts"
    faults = [each for each in [to_the_end(checkout, mark)] if each]
    expected = held(artifacts / RECIPE)
    lines = []

    def found(what: str, codes: object, *, same: bool, words: str) -> None:
        lines.append(f"- {what}: exit codes {codes}; {'the same bytes' if same else 'OTHER BYTES'}; {words}.")
        print(lines[-1], flush=True)

    shutil.rmtree(artifacts / RECIPE)
    codes = both(start(checkout, mark), start(checkout, mark))
    refused = said(checkout).count("another process is running")
    faults += [each for each in [to_the_end(checkout, mark)] if each]
    same = not differences(expected, held(artifacts / RECIPE))
    found("Two `make all` of one recipe", codes, same=same, words=f"{refused} refused in one line")

    shutil.rmtree(artifacts / RECIPE)
    write_recipe(checkout, "other", grpo={"seed": 5})
    codes = both(start(checkout, mark), start(checkout, mark, recipe="other"))
    same = not differences(expected, held(artifacts / RECIPE))
    found("`make all` of two recipes", codes, same=same, words="both at once")

    second = make_checkout(folder / "second")
    shutil.rmtree(second / "artifacts", ignore_errors=True)
    (second / "artifacts").symlink_to(artifacts)
    shutil.rmtree(artifacts / RECIPE)
    codes = both(start(checkout, mark), start(second, mark))
    refused = said(second).count("another process is running") + said(checkout).count("another process is running")
    faults += [each for each in [to_the_end(checkout, mark)] if each]
    names = {name for name in expected if not name.endswith("/outside")}  # which holds the checkout's own paths
    now = held(artifacts / RECIPE)
    same = not differences({name: expected[name] for name in names}, {n: h for n, h in now.items() if n in names})
    found("Two checkouts on one artifacts folder", codes, same=same, words=f"{refused} refused in one line so far")

    code, words = replaced_input(checkout, mark)
    faults += [each for each in [to_the_end(checkout, mark)] if each]
    same = not differences(expected, held(artifacts / RECIPE))
    found("An input replaced while `sft` reads it, then `make all`", [code], same=same, words=words)
    traces = said(checkout).count("Traceback") + said(second).count("Traceback")
    return [*lines, "", f"Tracebacks: {traces}. Wrong: {'; '.join(faults) if faults else 'nothing'}."]


def replaced_input(checkout: Path, mark: str) -> tuple[int, str]:
    """Put other rows in place of sft.jsonl while sft trains; return make's exit code and whether it was said."""
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
    return code, "said so" if told else "NOT SAID"
