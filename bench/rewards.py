"""Measure the rewards: how fast a suite is, and the longest that any of many fuzzed completions takes.

`python -m bench.rewards` writes bench/results/rewards.md. One process, one core; `math_correct` has its worker besides.
"""

import datetime
import os
import platform
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import click

from stages.lib.answers.formats import FORMATS, XML, Answer, Format
from stages.lib.artifact.environment import environment_now
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Rewards
from stages.lib.rewards.judge import Reward
from stages.lib.rewards.names import SUITES, load_rewards

TINY = Path(__file__).parents[1] / "recipes" / "tiny.toml"
RESULTS = Path(__file__).parent / "results" / "rewards.md"

SUITE_COMPLETIONS_PER_SECOND = 50_000
SUITE_LIMIT_SECONDS = 0.005
MATH_LIMIT_SECONDS = 1.0

BATCH = 64  # completions, as a trainer hands them over
WORDS = "so we have add take the of apples each then half gives costs dollars 17 240 3 total left is now = + x".split()
ANSWERS = ["42", "7", "-3", "1,200", "$18", "18.0", "1/2", "50%", "42 or 43", "NaN", "The answer is 18.", "forty"]
TAGS = [tag for f in FORMATS.values() for tag in (f.reasoning_open, f.reasoning_close, f.answer_open, f.answer_close)]
# fmt: off
PIECES = [
    *TAGS, "<", "<reasoning", "answer>", "</", "\n", " ", "\t", "\r\n", "0", "42", "-", "1,2", "1e999", ".", "/", "$",
    "%", "NaN", "inf", " or ", "٤", "４", "²", "½", "é", "漢", "\U0001f600", "\x00", "\u200b", "\ud800", "word ",
    "apples ",
]
MATH = [
    "\\frac{", "}{", "}", "{", "(", ")", "\\sqrt{", "^{", "^", "_", "x", "y", "1", "2", "9", "10", "999", "!", "+", "-",
    "*", "=", ",", "\\{", "\\}", "\\pi", "\\int_0^1 ", "\\sum_{n=1}^{9} ", "\\infty", "\\cup", "<", "\\%", "\\text{a}",
    "\\sin ", "|", "&", "\\begin{pmatrix}", "\\end{pmatrix}", "\\lim_{x\\to 0} ", ".",
]
# fmt: on


@click.command(help=__doc__)
@click.option("--completions", default=100_000, show_default=True, help="How many fuzzed completions.")
@click.option("--max-tokens", default=8192, show_default=True, help="Pieces in the longest of them.")
@click.option("--seed", default=0, show_default=True)
def main(completions: int, max_tokens: int, seed: int) -> None:
    lines = heading(completions, max_tokens, seed)
    for name in SUITES:
        lines.append(throughput(name, random.Random(seed)))
    columns = "fuzzed|completions|median|99.9%|longest|limit|timed again|over it|longest, processor|raised".split("|")
    lines += ["", f"| {' | '.join(columns)} |", "|---|" + "---:|" * 9]
    for name in SUITES:
        suite = list(SUITES[name].values())
        fuzzed = Fuzz(FORMATS[name], max_tokens, ANSWERS, random.Random(seed))
        lines.append(bounds(f"suite {name}", suite, fuzzed, completions, SUITE_LIMIT_SECONDS))
    math_correct = load_rewards(replace(read_recipe(TINY), rewards=Rewards(["math_correct"], [1.0])))
    fuzzed = Fuzz(XML, max_tokens, MATH, random.Random(seed))
    lines.append(bounds("math_correct", math_correct, fuzzed, completions, MATH_LIMIT_SECONDS))
    RESULTS.write_text("\n".join(lines) + "\n")
    click.echo(RESULTS.read_text())


def heading(completions: int, max_tokens: int, seed: int) -> list[str]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    command = f"python -m bench.rewards --completions {completions} --max-tokens {max_tokens} --seed {seed}"
    machine = f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}, math-verify {version('math-verify')}"
    commit = str(environment_now()["git"])[:7]
    return f"""# Rewards: speed and bounds

`{command}`, {datetime.date.today()}, {machine},
{versions}, commit {commit}; load average at the start {os.getloadavg()[0]:.1f}.

Speed: all functions of the suite on one core, in batches of {BATCH}, over completions with 300 words of reasoning (at
least 300 tokens, then), of which one in five is malformed, by processor time; best of five passes.

Bounds: wall time of one completion through all functions of the suite, nothing of it known before. A fuzzed completion
has up to {max_tokens} pieces (tags, parts of tags, numbers, Unicode, words): half are pieces at random, three in ten
are well-formed completions with some pieces thrown in, one in five has a fuzzed answer. One that takes longer than its
limit is timed up to twice more, so that what else the machine does is not held against it, and its shortest time
counts. The longest processor time is that of the first try and of this process alone.

| suite | characters a completion | completions a second a core | wanted |
|---|---:|---:|---:|""".splitlines()


def throughput(name: str, generator: random.Random) -> str:
    """Give the table row of a suite's speed."""
    format = FORMATS[name]
    completions, true = [], []
    for number in range(20_000):
        reasoning = " ".join(generator.choices(WORDS, k=300)) + f" {number}"
        completion = format.write(Answer(reasoning, generator.choice([str(generator.randrange(1000)), *ANSWERS])))
        if number % 5 == 0:
            completion = generator.choice([completion[:-20], completion + " That is it.", reasoning])
        completions.append([{"role": "assistant", "content": completion}])
        true.append(str(generator.randrange(1000)))
    best = 0.0
    for _ in range(5):
        # New strings each time: the suite must not know them, nor Python their hashes.
        fresh = [[{"role": "assistant", "content": c[0]["content"][:-1] + c[0]["content"][-1:]}] for c in completions]
        start = time.process_time()
        for first in range(0, len(fresh), BATCH):
            for reward in SUITES[name].values():
                reward(fresh[first : first + BATCH], answer=true[first : first + BATCH])
        best = max(best, len(fresh) / (time.process_time() - start))
    characters = sum(len(c[0]["content"]) for c in completions) / len(completions)
    return f"| {name} | {characters:,.0f} | {best:,.0f} | {SUITE_COMPLETIONS_PER_SECOND:,} |"


@dataclass(frozen=True)
class Fuzz:
    """Makes fuzzed completions; `parts` are what fuzzed answers are made of."""

    format: Format
    max_tokens: int
    parts: list[str]
    generator: random.Random

    def completion(self) -> str:
        kind = self.generator.random()
        length = self.generator.randrange(self.max_tokens)
        if kind < 0.5:
            return "".join(self.generator.choices(PIECES, k=length))
        answer = self.generator.choice(ANSWERS)
        if kind >= 0.8:
            answer = "".join(self.generator.choices(self.parts, k=self.generator.randint(1, 30)))
        reasoning = " ".join(self.generator.choices(WORDS, k=max(length, 1)))
        completion = self.format.write(Answer(reasoning, answer if answer.strip() else "?"))
        return self.disturbed(completion) if kind < 0.8 else completion

    def disturbed(self, completion: str) -> str:
        for _ in range(self.generator.randrange(4)):
            anywhere = self.generator.randrange(len(completion) + 1)
            near_the_end = len(completion) - self.generator.randrange(30)
            place = self.generator.choice([anywhere, near_the_end])
            completion = completion[:place] + self.generator.choice(PIECES) + completion[place:]
        return completion


def bounds(what: str, suite: list[Reward], fuzzed: Fuzz, count: int, limit: float) -> str:
    """Give the table row of how long fuzzed completions take."""
    times, raised, again, longest_processor = [], Counter(), 0, 0.0
    for _ in range(count):
        completion = fuzzed.completion()
        start = time.process_time()
        seconds = timed(suite, completion, raised)
        longest_processor = max(longest_processor, time.process_time() - start)
        again += seconds > limit
        for blanks in (" ", "  "):  # which make it another completion
            if seconds > limit:
                seconds = min(seconds, timed(suite, completion + blanks, raised))
        times.append(seconds)
    times.sort()
    over = sum(seconds > limit for seconds in times)
    shown = [milliseconds(t) for t in (times[count // 2], times[int(count * 0.999)], times[-1], limit)]
    shown += [str(again), str(over), milliseconds(longest_processor), str(dict(raised) or 0)]
    return f"| {what} | {count:,} | {' | '.join(shown)} |"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.3f} ms"


def timed(suite: list[Reward], completion: str, raised: Counter) -> float:
    start = time.perf_counter()
    for reward in suite:
        try:
            reward([completion], answer=["42"])
        except Exception as error:  # that there is none is what is measured
            raised[f"{type(error).__name__} in {reward.__name__}"] += 1
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
