"""GGUF files with a changed header, each loaded by llama.cpp in a process of its own."""

import os
import random
from collections import Counter
from pathlib import Path

from bench.breaking.child import Outcome, call_apart
from tests.support import disks, hostile_files

HEADS = (64, 400, 4000)  # bytes at the beginning of which one is changed
HOW = ("cut", "flipped", "spliced", "numbered", "zeros", "noise")


def run(folder: Path, seed: int, count: int) -> list[str]:
    """Load `count` files; return the lines of the report."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from stages.lib.gguf.tokens import Vocabulary, llama_library

    good = (disks.all_stages() / "gguf" / "model.q8_0.gguf").read_bytes()
    llama_library()
    chance, ends, worst, ended = random.Random(seed), Counter(), Outcome("", "", 0.0, 0.0), []
    path = folder / "model.gguf"

    def load() -> None:
        file = Vocabulary(path, with_weights=True)
        file.tokenize("What is 17 + 25?")
        file.close()

    for number in range(count):
        size, how = chance.choice((*HEADS, len(good))), chance.choice(HOW)
        path.write_bytes(hostile_files.CHANGES[how](good[:size], chance) + good[size:] * (how != "cut"))
        outcome = call_apart(load)
        ends[outcome.how] += 1
        worst = max(worst, outcome, key=lambda one: one.seconds)
        if outcome.how == "broken":
            ended.append(
                f"file {number} ({how} in its first {size:,} bytes): exit code {outcome.said.partition(':')[0]}"
            )
    return [
        f"{count} GGUF files with a change in the header or anywhere, seed {seed}: refused {ends['refused']}, "
        f"loaded {ends['fine']} and ended the process on {ends['broken']}; {worst.seconds:.1f} s of processor time at "
        f"most. Temper gives llama.cpp only files that it made and whose digest it wrote down (SECURITY.md).",
        "",
        f"Ended: {'; '.join(ended) or 'none'}.",
    ]
