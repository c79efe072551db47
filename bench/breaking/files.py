"""Broken and hostile files of every kind that Temper reads, each given to what reads it, in a process of its own."""

import importlib
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.breaking.child import Outcome, call_apart
from tests.support import disks, hostile_files, micro, recipes

MAX_SECONDS, MAX_MEGABYTES = 10.0, 1000.0
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "chat_template.jinja", "model.safetensors", "special_tokens_map.json",
)  # fmt: skip
Case = tuple[str, Callable[[], object]]


def stage(name: str, *arguments: object) -> None:
    """Run a stage's command, as from a shell."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # no case may come so far as to need it
    importlib.import_module(f"stages.{name}").main([str(each) for each in arguments])


def data_cases(folder: Path, count: int, chance: random.Random) -> Iterator[Case]:
    """Yield broken data files, each to be read whole."""
    from stages.lib.data.files import read_batches
    from stages.lib.recipe.tables import Source

    source = Source(name="rows", split="train", use=["sft"], question="question", answer="answer", solution="solution")

    def read(path: Path) -> int:
        return sum(len(piece.parsed().numbers) for piece in read_batches(source, [path]))

    for number in range(count):
        suffix, change = hostile_files.DATA[number % len(hostile_files.DATA)], chance.choice([*hostile_files.CHANGES])
        (place := folder / f"data-{number}").mkdir()
        path = hostile_files.write_data(place, suffix, change, chance.randrange(10**9))
        yield f"data {suffix}", lambda path=path: read(path)
    bombs = {
        "bomb.parquet": hostile_files.parquet_bomb(), "zeros.jsonl.gz": hostile_files.zeros_packed(2000),
        "zeros.csv.gz": hostile_files.zeros_packed(2000), "zeros.json.gz": hostile_files.zeros_packed(2000),
    }  # fmt: skip
    for name, content in bombs.items():
        (folder / name).write_bytes(content)
        yield f"bomb {name}", lambda path=folder / name: read(path)


def local_recipe(folder: Path, model: Path) -> Path:
    """Write a recipe for a model's folder and data files on this disk."""
    tables = recipes.read_tables()
    for name, numbers in micro.NUMBERS.items():
        tables[name] |= numbers
    del tables["base_model"]
    tables |= {"rewards": {"functions": ["correctness"], "weights": [1.0]}}
    tables["model"] |= {"name": str(model), "rehearsal": False}
    tables["merge"] |= {"prompts": 6}
    tables["gguf"] |= {"prompts": 6}
    source = {"split": "train", "question": "question", "answer": "answer", "solution": "solution"}
    numbers = {"train": range(40), "eval": range(1000, 1030)}
    tables["data"]["sources"] = []
    for name, use in (("train", ["sft", "grpo"]), ("eval", ["eval"])):
        rows = [{"question": f"Add {n} and {n * 7}.", "answer": str(n * 8), "solution": "so"} for n in numbers[name]]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tables["data"]["sources"].append({**source, "name": str(folder / f"{name}.jsonl"), "use": use})
    return recipes.write_tables(folder / "local.toml", tables)


def model_cases(folder: Path, finished: Path, count: int, chance: random.Random) -> Iterator[Case]:
    """Yield models of which one file is broken, each given to prepare-data."""
    good = finished / "base-model" / "model"
    names = [name for name in MODEL_FILES if (good / name).is_file()]
    for number in range(count + 1):
        (place := folder / f"model-{number}").mkdir()
        shutil.copytree(good, place / "model")
        kind = "model as it was made"
        if number:
            name = names[number % len(names)]
            kind = f"model {name}"
            change = hostile_files.CHANGES[chance.choice([*hostile_files.CHANGES])]
            path = place / "model" / name
            if name == "chat_template.jinja" and chance.random() < 0.7:
                path.write_text(chance.choice(hostile_files.BAD_TEMPLATES))
            else:
                path.write_bytes(change(path.read_bytes(), chance))
        recipe = local_recipe(place, place / "model")
        yield kind, lambda recipe=recipe, place=place: stage("prepare_data", "--recipe", recipe, "--out", place / "out")


def text_cases(folder: Path, finished: Path, count: int, chance: random.Random) -> Iterator[Case]:
    """Yield broken manifests of inputs and of one's own, recipes, rewards and kept completions."""
    kinds = ("manifest of an input", "manifest of its own", "identity", "recipe", "reward", "completions.jsonl")
    for number in range(count):
        kind, place = kinds[number % len(kinds)], folder / f"text-{number}"
        change = hostile_files.CHANGES[chance.choice([*hostile_files.CHANGES])]
        shutil.copytree(finished, place)
        path = {
            "manifest of an input": place / "prepare-data" / "manifest.json",
            "manifest of its own": place / "infer" / "manifest.json",
            "identity": place / "infer.unfinished" / "identity.json",
            "recipe": place / "micro.toml",
            "reward": place / "own.py",
            "completions.jsonl": place / "grpo.unfinished" / "checkpoints" / "completions.jsonl",
        }[kind]
        source = place / "grpo" / "completions.jsonl" if kind == "completions.jsonl" else path
        source = place / "base-model" / "manifest.json" if kind == "identity" else source
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(change(source.read_bytes(), chance))
        words = disks.command("infer", place)[3:]
        yield kind, lambda words=words, place=place, kind=kind: text_case(kind, place, words)


def text_case(kind: str, place: Path, words: list[str]) -> None:
    """Do with a broken text what reads it."""
    from stages.lib.rewards.own import load_own
    from stages.lib.train.rollouts import lines_until

    if kind == "reward":
        load_own(["own.py:variety"], place)
    elif kind == "completions.jsonl":
        lines_until(place / "grpo.unfinished" / "checkpoints" / "completions.jsonl", 4)
        stage("report", "--recipe", place / "micro.toml", "--artifacts", place)
    else:
        # up to the moment at which the stage would work: what it needs for that is not loaded here
        from stages import infer

        infer.answer = lambda *given: sys.exit(0)  # type: ignore[assignment]  # the file was read; no model is needed
        stage("infer", *words, place / "infer")


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Give `count` broken files to what reads them; return the lines of the report."""
    chance = random.Random(seed)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    finished = disks.all_stages()
    load()
    cases: list[Callable[[], Iterator[Case]]] = [
        lambda: data_cases(folder, count * 6 // 10, chance),
        lambda: text_cases(folder, finished, count * 2 // 10, chance),
        lambda: model_cases(folder, finished, count * 2 // 10, chance),
    ]
    counts, worst, wrong, began = Counter(), Outcome("", "", 0.0, 0.0), [], time.monotonic()
    kinds = Counter()
    largest = 0.0
    for each in cases:
        for kind, call in each():
            outcome = call_apart(call)
            counts[outcome.how] += 1
            kinds[kind] += 1
            worst = max(worst, outcome, key=lambda one: one.seconds)
            largest = max(largest, outcome.megabytes)
            over = outcome.seconds > MAX_SECONDS or outcome.megabytes > MAX_MEGABYTES
            if outcome.how == "broken" or over or (kind == "model as it was made" and outcome.how != "fine"):
                wrong.append(
                    f"{kind}: {outcome.how}, {outcome.last}, {outcome.seconds:.1f} s, {outcome.megabytes:.0f} MB"
                )
                print(f"{kind}: {outcome}", flush=True)
        print(f"{sum(counts.values())} files, {time.monotonic() - began:.0f} s: {dict(counts)}", flush=True)
    listed = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
    return [
        f"{sum(counts.values())} files, seed {seed}: {counts['refused']} refused with one message, {counts['fine']} "
        f"read (a change may leave a file good), {counts['broken']} ended otherwise. The longest took "
        f"{worst.seconds:.1f} s of processor time (bound {MAX_SECONDS:.0f}), the largest {largest:,.0f} MB of memory, "
        f"Python and what it had loaded counted in (bound {MAX_MEGABYTES:,.0f}). By kind: {listed}.",
        "",
        f"Wrong: {'; '.join(wrong) if wrong else 'nothing'}.",
    ]


def load() -> None:
    """Load what the cases need, once, before they are forked."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's sign for a module that can't be imported
    import pyarrow.parquet
    import transformers

    from stages.lib.gguf import tokens
    from stages.lib.model import tokenizer

    assert all((pyarrow.parquet, transformers.AutoTokenizer, tokens, tokenizer))
