"""Turn problems with checkable answers into the sft, grpo and eval sets: one answer form, no duplicates, no leaks.

The rows are read once. Each is checked, written to a draft of its sets and fingerprinted; what has to go for the sake
of other rows (duplicates, closeness to eval problems) is decided on the fingerprints, and the drafts are then copied
without it. So memory grows by about 100 bytes a row and by the n-grams of the eval problems, not by the length of the
texts. Where several processes share the work, each reads its lines from the file and has drafts of its own: the texts
don't go from process to process.
"""

import functools
import hashlib
import importlib
import itertools
import json
import os
import re
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import click

from stages.lib import (
    answers,
    artifact,
    formats,
    go_render,
    go_template,
    llama,
    models,
    options,
    sources,
    weights,
)
from stages.lib.errors import UserError
from stages.lib.formats import Format
from stages.lib.recipe import Recipe, Source, is_hub_name, read_recipe

SETS = ("sft", "grpo", "eval")
MEASURES = ("prompt_tokens", "example_tokens", "sft_bytes", "line_bytes")
BIT = {name: 1 << place for place, name in enumerate(SETS)}
SLACK_TOKENS = 16  # where it meets the markup, a question may be cut into other tokens than the one that was measured
# A source whose files have so many bytes is large: several processes share the work, and not all prompts are tokenized.
LARGE_BYTES = 1 << 25
MAX_PROCESSES = 4  # each takes memory, and the end of the work is one's alone
MAX_WAITING = 2 * MAX_PROCESSES  # batches on their way to and from them: bounds the memory
# Of a large source, the first batches (of 1 MB, or 2,000 rows) are tokenized for the length percentiles, and of the
# rest what may be too long: a token is at least one byte, so what has few bytes has few tokens.
MEASURED_BATCHES = 2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "vocab.json")
SURROGATE = re.compile("[\ud800-\udfff]")
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
encode = json.JSONEncoder(ensure_ascii=False).encode
quote = json.encoder.encode_basestring  # what `encode` does with a string, without what it does before
canonical = functools.lru_cache(1 << 16)(answers.canonical)


class Unusable(ValueError):
    """A row that can't go into a set, and the reason it is counted under."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(found)
        self.reason = reason


@click.command(help=__doc__.partition("\n")[0])
@options.recipe
@options.base_model
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    help="A local copy, file or folder, of what the recipe names on the hub.",
)
@options.out
def main(recipe: Path, base_model: Path | None, data: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe)
    given = run_recipe.data.sources
    if data and not any(is_hub_name(source.name) for source in given):
        raise UserError(f"--data {data}: {recipe} names nothing on the hub that it could stand in for")
    if base_model:
        artifact.read(base_model, "base-model")  # refuses one that is not finished, before its files are looked for
    located = [sources.files_of(source, base_model, data) for source in given]
    raw = {label(source, file): file for source, files in zip(given, located, strict=True) for file in files}
    room = sum((32 if file.suffix == ".parquet" else 8) * file.stat().st_size for file in raw.values()) + (1 << 26)
    model = Path(models.locate(run_recipe.model, base_model)[0])
    raw |= {f"tokenizer {name}": model / name for name in TOKENIZER_FILES if (model / name).is_file()}
    if not base_model and model.is_dir():  # all stages after this go by what it states: the weights trained are these
        raw |= {f"model {file.name}": file for file in sorted([*model.glob("*.safetensors"), model / "config.json"])}
    tables = {
        **run_recipe.tables("data", "format"),
        "model": {"name": run_recipe.model.name, "revision": run_recipe.model.revision},
        "sft": {"max_tokens": run_recipe.sft.max_tokens},
    }
    inputs = {"base-model": base_model} if base_model else {}
    with artifact.writing(out, "prepare-data", tables, inputs, sources=raw, room_bytes=room) as run:
        with helpers(located) as pool:  # they start while this process loads the tokenizer
            refuse_base(run_recipe, base_model)
            tokenizer = models.load_tokenizer(run_recipe, base_model)
            with ThreadPoolExecutor(1) as beside:  # llama.cpp's converter takes seconds to start
                checked = beside.submit(check_tokenizer, run_recipe, tokenizer, base_model)
                check_chat_template(run_recipe, tokenizer)
                check_completion(run_recipe, tokenizer)
                metrics = prepare(run_recipe, located, Ruler(tokenizer, run_recipe.format.prompt), run.folder, pool)
                checked.result()
        run.metrics.update(metrics)
        click.echo(summary(run.metrics))


def refuse_base(recipe: Recipe, base_model: Path | None) -> None:
    """Raise `UserError` if the base is stored in a few bits, which merge would refuse after all the training.

    Or, where the recipe names a folder on this disk, if its weights are no safetensors or not whole.
    """
    name, revision = models.locate(recipe.model, base_model)
    weights.refuse_quantized_base(weights.folder(name, revision), recipe.model.name)
    if base_model is None and revision is None:
        weights.shapes(Path(name))


def check_chat_template(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if ollama-modelfile would refuse the chat template after all the training.

    It is derived and compared here as it is there, by Go where the helper is installed.
    """
    name = recipe.model.name
    render, derived = go_template.of_tokenizer(tokenizer, name)
    go_template.refuse_unused_system(derived, recipe.format.prompt, recipe.format.name, name)
    go_render.compare(name, derived.template, render, derived.bos)


def check_completion(recipe: Recipe, tokenizer: Any) -> None:
    """Raise `UserError` if the chat template puts something between the generation prompt and a completion.

    Qwen3's own puts an empty thought there: SFT would teach the model to write it first, in every completion, and none
    would be well formed.
    """
    turns = [{"role": "system", "content": recipe.format.prompt}, {"role": "user", "content": "1 + 1?"}]
    written = formats.get(recipe.format.name).write(formats.Answer("1 + 1 = 2", "2")).strip()
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    told = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": written}], tokenize=False)
    if not told.startswith(asked + written):
        at = len(asked) if told.startswith(asked) else len(os.path.commonprefix([told, asked]))
        raise UserError(
            f"{recipe.path}: the chat template of {recipe.model.name} shows a completion otherwise than the model is "
            f"to write it: after {told[:at][-30:]!r} it has {told[at : at + 40]!r}, expected "
            f"{(asked + written)[at : at + 40]!r}. SFT would teach to write that first. Choose a model without it, or "
            f"[format] name = 'think', which brings a template"
        )


def check_tokenizer(recipe: Recipe, tokenizer: Any, base_model: Path | None) -> None:
    """Raise `UserError` if llama.cpp's converter would refuse or misread the tokenizer, after all the training."""
    name, revision = models.locate(recipe.model, base_model)
    llama.check_tokenizer(tokenizer, weights.folder(name, revision), recipe.model.name)


def label(source: Source, file: Path) -> str:
    """Return what a source's file is called in the artifact: by what it is, not by where it lies."""
    name = f"{source.name} {source.config}" if source.config else source.name
    return f"{name} ({source.split}) {file.name}"


class Ruler:
    """Measures conversations in tokens of the model, as its chat template renders them."""

    def __init__(self, tokenizer: Any, system_prompt: str) -> None:
        self.tokenizer, self.system_prompt = tokenizer, system_prompt

    def tokens(self, conversations: list[tuple[str, ...]]) -> list[int]:
        """Return the tokens of each (question,), with the generation prompt, and of each (question, completion)."""
        texts = [
            self.tokenizer.apply_chat_template(
                [
                    {"role": role, "content": content}
                    for role, content in zip(
                        ("system", "user", "assistant"), (self.system_prompt, *texts), strict=False
                    )
                ],
                tokenize=False,
                add_generation_prompt=len(texts) == 1,
            )
            for texts in conversations
        ]
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]


def most_tokens(text: str) -> int:
    """Return more tokens than `text` can have: each is at least one byte of it, however the tokenizer normalizes it."""
    if text.isascii():
        return len(text)
    return max(len(text.encode()), len(unicodedata.normalize("NFKD", text).encode()))


def problem_of(question: Any, answer: Any, solution: Any, style: str) -> tuple[str, str, str]:
    """Return question, canonical answer and worked solution ("" if there is none; its marks still in it) of a row.

    Raises `Unusable` when there is no question, or no answer that can be read.
    """
    question = question.strip() if isinstance(question, str) else ""
    if not question:
        raise Unusable("no question", "no text in the column of the question")
    worked = solution if isinstance(solution, str) else ""
    text = answer.strip() if isinstance(answer, str) else as_text(answer)
    if not text:
        raise Unusable("no answer", f"no answer: {answer!r}")
    if style == "gsm8k":
        worked = text.rpartition("####")[0]
        try:
            text = answers.gsm8k_final(text)
        except ValueError as error:
            raise Unusable("unreadable answer", str(error)) from error
    final = canonical(text)
    if final is None:
        raise Unusable("unreadable answer", f"can't be read as one number: {text[:80]!r}")
    if not (question.isascii() and worked.isascii()) and SURROGATE.search(question + worked):
        raise Unusable("not Unicode", "half of a surrogate pair, which no file can hold as UTF-8")
    return question, final, worked.strip()


def as_text(value: Any) -> str:
    """Return a number, which is one in JSON and Parquet, as text; "" for what is none."""
    return str(value) if isinstance(value, int | float | Decimal) and not isinstance(value, bool) else ""


def completion_of(worked: str, answer: str, style: str, answer_format: Format) -> str:
    """Return the SFT completion. Raises `Unusable` without a solution, or with one that can't be written."""
    if style == "think":
        if worked and "</think>" not in worked:
            raise Unusable("unusable solution", "the thought has no end (</think>): it was cut off")
        worked = worked.replace("<think>", "").replace("</think>", "").strip()
    elif style == "gsm8k":
        worked = CALCULATOR_MARK.sub("", worked).strip()
    if not worked:
        raise Unusable("no solution", "no worked solution, which sft needs")
    try:
        return answer_format.write(formats.Answer(worked, answer))
    except ValueError as error:
        raise Unusable("unusable solution", str(error)) from error


@dataclass(frozen=True)
class Rules:
    """What `check` needs to know of the recipe and the tokenizer."""

    format_name: str
    system_prompt: str
    ngram_words: int
    safe_prompt: int  # a question of at most so many bytes makes a prompt that is short enough
    safe_example: int  # the same for question and completion together


@dataclass
class Checked:
    """The good rows of a batch, column by column, where their lines for each set are, and what was left out."""

    origin: str
    rows: int  # read, good or not
    unused: int  # good, but outside the source's shares
    drafts: dict[str, tuple[Path, int]]  # of the lines of each set, and of the n-grams: the file, and where they begin
    table: dict[str, Any]  # arrays: ids, counts, bands, sets, number, and the MEASURES; tokens are filled in later
    to_measure: list[tuple[str, int, tuple[str, ...]]]  # column, row, the conversation
    removed: list[tuple[str | None, str | None, str, int]]  # set, id, reason, number; None where it had none yet


def is_large(files: list[Path]) -> bool:
    """Say whether a source's files, none for one from the hub, are worth several processes."""
    return sum(file.stat().st_size for file in files) >= LARGE_BYTES


def helpers(located: list[list[Path]]) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Return the processes that share the work on large sources; None if there is none, or one processor alone."""
    processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    if processes == 1 or not any(is_large(files) for files in located):
        return nullcontext()
    pool = ProcessPoolExecutor(processes, get_context("spawn"), importlib.import_module, ("stages.lib.dedup",))
    for _ in range(processes):
        pool.submit(os.getpid)  # each starts when there is work for it
    return pool


def check_all(
    source: Source, files: list[Path], rules: Rules, content: Any, folder: Path, pool: ProcessPoolExecutor | None
) -> Iterator[Checked]:
    """Yield every batch of a source, checked, in order; where it is large, `pool` shares the work.

    `content` is a hash that is fed what comes from the hub; a file has a digest of its own.
    """
    large = is_large(files)
    waiting: deque[Future[Checked]] = deque()
    for number, batch in enumerate(sources.batches(source, files)):
        if not files:
            content.update(repr(batch.columns).encode())
        job = (source, batch, rules, not large or number < MEASURED_BATCHES, folder)
        if pool and large:
            waiting.append(pool.submit(check, *job))
            if len(waiting) == MAX_WAITING:
                yield waiting.popleft().result()
        else:
            yield check(*job)
    while waiting:
        yield waiting.popleft().result()


def check(
    source: Source, piece: sources.Batch | sources.Lines, rules: Rules, measure_all: bool, folder: Path
) -> Checked:
    """Read the rows of a batch and add those that are good to this process's drafts in `folder`.

    Raises `UserError`, naming file and row, for a row that is not good, unless the source has them dropped.
    """
    import numpy as np

    from stages.lib import dedup

    batch = piece.parsed()
    answer_format = formats.get(rules.format_name)
    removed: list[tuple[str | None, str | None, str, int]] = []

    def leave_out(place: int, error: Unusable, name: str | None = None, row_id: str | None = None) -> None:
        if source.unreadable == "refuse":
            raise UserError(
                f'{batch.where(place)}: {error.reason}: {error}. Mend the row, or set unreadable = "drop" for '
                f"{source.name} in the recipe"
            ) from error
        removed.append((name, row_id, error.reason, batch.numbers[place]))

    problems, places = [], []
    solutions = batch.columns[source.solution] if source.solution else itertools.repeat(None)
    columns = zip(batch.columns[source.question], batch.columns[source.answer], solutions, strict=False)
    for place, (question, answer, solution) in enumerate(columns):
        try:
            problems.append(problem_of(question, answer, solution, source.style))
            places.append(place)
        except Unusable as error:
            leave_out(place, error)
    if not problems:
        return Checked(batch.origin, len(batch.numbers), 0, {}, {}, [], removed)
    questions = [question for question, _, _ in problems]
    prints = dedup.fingerprint(questions, rules.ngram_words)
    ids = [f"{number:016x}" for number in prints.ids.tolist()]
    sets = sets_of(source, prints.ids)
    unused = int((sets == 0).sum())

    head = f'"prompt": [{{"role": "system", "content": {encode(rules.system_prompt)}}}, {{"role": "user", "content": '
    lines: dict[str, list[bytes]] = {name: [] for name in SETS}
    table = {name: np.zeros(len(ids), np.uint32) for name in MEASURES}
    to_measure: list[tuple[str, int, tuple[str, ...]]] = []
    for row, bits in enumerate(sets.tolist()):
        question, answer, worked = problems[row]
        line = f'{{"id": "{ids[row]}", {head}{quote(question)}}}], "answer": "{answer}"'
        length = most_tokens(question)
        if bits & BIT["sft"]:
            try:
                completion = completion_of(worked, answer, source.style, answer_format)
            except Unusable as error:
                leave_out(places[row], error, "sft", ids[row])
                sets[row] = bits = bits & ~BIT["sft"]
            else:
                written = (
                    f'{line}, "completion": [{{"role": "assistant", "content": {quote(completion)}}}]}}\n'.encode()
                )
                lines["sft"].append(written)
                table["sft_bytes"][row] = len(written)
                if measure_all or length + most_tokens(completion) > rules.safe_example:
                    to_measure.append(("example_tokens", row, (question, completion)))
        written = f"{line}}}\n".encode()
        table["line_bytes"][row] = len(written)
        for name in ("grpo", "eval"):
            if bits & BIT[name]:
                lines[name].append(written)
        if bits and (measure_all or length > rules.safe_prompt):
            to_measure.append(("prompt_tokens", row, (question,)))
    table |= {"ids": prints.ids, "counts": prints.counts, "bands": prints.bands, "sets": sets}
    table["number"] = np.array([batch.numbers[place] for place in places], np.uint32)
    drafts = {}
    for name, content in (*((name, b"".join(texts)) for name, texts in lines.items()), ("grams", prints.grams)):
        path = folder / f"{name}.{os.getpid()}.draft"
        with path.open("ab") as file:
            drafts[name] = (path, file.tell())
            file.write(content)
    return Checked(batch.origin, len(batch.numbers), unused, drafts, table, to_measure, removed)


class Draft:
    """The sets before anything goes for the sake of other rows: files of their lines, and a table of all rows."""

    def __init__(self, folder: Path, ruler: Ruler, recipe: Recipe) -> None:
        self.folder, self.ruler, self.recipe = folder, ruler, recipe
        self.removed = (folder / "removed.jsonl").open("w", encoding="utf-8")
        self.origins: list[str] = []  # the files, as they are called in the artifact
        self.parts: dict[str, list[Any]] = {}  # the table's columns, an array a batch
        self.batches: list[tuple[int, dict[str, tuple[Path, int]]]] = []  # rows in the table, and where the drafts are
        self.dropped = {name: Counter[str]() for name in SETS}
        (prompt,), (example,) = ruler.tokens([("0",)]), ruler.tokens([("0", "0")])
        self.rules = Rules(
            recipe.format.name,
            ruler.system_prompt,
            recipe.data.ngram_words,
            recipe.data.max_prompt_tokens - prompt - SLACK_TOKENS,
            recipe.sft.max_tokens - example - SLACK_TOKENS,
        )

    def add_source(self, source: Source, files: list[Path], pool: ProcessPoolExecutor | None) -> dict[str, Any]:
        """Read a source to its end. Return what the manifest says about it. Raises `UserError` for a row to refuse."""
        dropped, content, origin = Counter[str](), hashlib.sha256(), ""
        rows = unused = 0
        for checked in check_all(source, files, self.rules, content, self.folder, pool):
            if checked.origin != origin:
                origin = checked.origin
                self.origins.append(label(source, Path(origin)) if files else origin)
            rows += checked.rows
            unused += checked.unused
            dropped.update(reason for name, _, reason, _ in checked.removed if name is None)
            self.add(checked)
        read = {"name": source.name, "split": source.split, "use": source.use, "rows": rows, "dropped": dict(dropped)}
        read |= {"outside_shares": unused} if source.shares else {}
        return read if files else {**read, "revision": source.revision, "sha256": content.hexdigest()}

    def add(self, checked: Checked) -> None:
        """Measure what has to be in a batch, and append it to the table."""
        import numpy as np

        for name, row_id, reason, number in checked.removed:
            if name:
                self.dropped[name][reason] += 1
            line = {"id": row_id, "set": name, "reason": reason, "where": f"{self.origins[-1]}:{number}"}
            self.removed.write(encode(line) + "\n")
        if not checked.table:
            return
        measured = self.ruler.tokens([texts for _, _, texts in checked.to_measure])
        for (column, row, _), tokens in zip(checked.to_measure, measured, strict=True):
            checked.table[column][row] = tokens
        rows = len(checked.table["ids"])
        origin = np.full(rows, len(self.origins) - 1, np.uint16)
        for name, values in {**checked.table, "origin": origin}.items():
            self.parts.setdefault(name, []).append(values)
        self.batches.append((rows, checked.drafts))

    @contextmanager
    def pieces(self, name: str) -> Iterator[list[tuple[BinaryIO, int, int]]]:
        """Give, for each batch in order, (draft `name`, where the batch begins, its rows). Delete the drafts then."""
        paths = {drafts[name][0] for _, drafts in self.batches}
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in paths}
            yield [(files[drafts[name][0]], drafts[name][1], rows) for rows, drafts in self.batches]
        for path in paths:
            path.unlink()

    def finish(self) -> dict[str, Any]:
        """Write the sets without what has to go, list that, return the manifest's part on the sets.

        Raises `UserError` when a set has no rows left.
        """
        import numpy as np

        from stages.lib import dedup

        if not self.batches:
            raise UserError("no source has a row that can be used; nothing to train on")
        data = self.recipe.data
        table = {name: np.concatenate(self.parts.pop(name)) for name in list(self.parts)}
        drafted = table["sets"].copy()

        def rows_in(*names: str) -> Any:
            return np.flatnonzero(table["sets"] & sum(BIT[name] for name in names))

        def remove(name: str, reason: str, rows: Any, others: Any = None, likeness: Any = None) -> None:
            table["sets"][rows] &= 255 - BIT[name]
            self.list_removed(table, name, reason, rows, others, likeness)

        with self.removed, self.pieces("grams") as pieces:
            grams = dedup.Grams(pieces, table["counts"])
            for name in SETS:
                rows = rows_in(name)
                remove(name, "long prompt", rows[table["prompt_tokens"][rows] > data.max_prompt_tokens])
                if name == "sft":
                    rows = rows_in(name)
                    remove(name, "long example", rows[table["example_tokens"][rows] > self.recipe.sft.max_tokens])
                rows = rows_in(name)
                first = dedup.exact_duplicates(table["ids"][rows])
                again = np.flatnonzero(first < np.arange(len(rows)))
                remove(name, "exact duplicate", rows[again], rows[first[again]], np.ones(len(again)))
                if data.near_duplicate_jaccard < 1:
                    found = dedup.near_duplicates(rows_in(name), table["bands"], grams, data.near_duplicate_jaccard)
                    remove(name, "near duplicate", *found)
            evaluated, trained = rows_in("eval"), rows_in("sft", "grpo")
            if len(evaluated) and len(trained):
                row, like, overlap = dedup.contaminated(evaluated, trained, grams, data.contamination_overlap)
                for name in ("sft", "grpo"):
                    hit = (table["sets"][row] & BIT[name]) > 0
                    remove(name, "too close to eval", row[hit], like[hit], overlap[hit])
        return {name: self.finish_set(name, table, drafted) for name in SETS}

    def finish_set(self, name: str, table: dict[str, Any], drafted: Any) -> dict[str, Any]:
        """Copy what is left of a set out of its drafts; return what the manifest says.

        `drafted` are the sets that each row was drafted for, as `table["sets"]` has those that it is left in.
        """
        import numpy as np

        rows = np.flatnonzero(table["sets"] & BIT[name])
        if not len(rows):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped[name].items()) or "no row came in"
            raise UserError(f"the {name} set is empty: {reasons}. See [data] in {self.recipe.path}")
        size = table["sft_bytes" if name == "sft" else "line_bytes"]
        first = 0
        with self.pieces(name) as pieces, (self.folder / f"{name}.jsonl").open("wb") as file:
            for draft, begin, count in pieces:
                there = first + np.flatnonzero(drafted[first : first + count] & BIT[name])
                stays = (table["sets"][there] & BIT[name]) > 0
                ends = begin + np.append(0, np.cumsum(size[there], dtype=np.int64))
                edges = ends[np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]]).astype(np.int8)))]
                for start, stop in edges.reshape(-1, 2).tolist():  # from the first of a run of rows to its end
                    draft.seek(start)
                    file.write(draft.read(stop - start))
                first += count
        lengths = {"prompt_tokens": percentiles(table["prompt_tokens"][rows])}
        if name == "sft":
            lengths["example_tokens"] = percentiles(table["example_tokens"][rows])
        return {"rows": len(rows), "dropped": dict(sorted(self.dropped[name].items())), **lengths}

    def list_removed(
        self, table: dict[str, Any], name: str, reason: str, rows: Any, others: Any, likeness: Any
    ) -> None:
        """Count and list `rows` of a set that go; `others` are the rows they are too like, if that is why."""

        def place(row: int) -> str:
            return f"{self.origins[table['origin'][row]]}:{table['number'][row]}"

        if len(rows):
            self.dropped[name][reason] += len(rows)
        for index, row in enumerate(rows.tolist()):
            line = {"id": f"{table['ids'][row]:016x}", "set": name, "reason": reason, "where": place(row)}
            if others is not None:
                other = int(others[index])
                line |= {
                    "like": f"{table['ids'][other]:016x}",
                    "like_where": place(other),
                    "likeness": round(float(likeness[index]), 4),
                }
            self.removed.write(encode(line) + "\n")


def sets_of(source: Source, ids: Any) -> Any:
    """Return, for each question's 64-bit hash, the sets it goes to as bits: all in `use`, or one by its share."""
    import numpy as np

    bits = np.array([BIT[name] for name in source.use] + [0], np.uint8)
    if not source.shares:
        return np.full(len(ids), bits.sum(), np.uint8)
    return bits[np.searchsorted(np.cumsum(source.shares), ids / 2.0**64, side="right")]


def percentiles(tokens: Any) -> dict[str, int]:
    """Return percentiles of the lengths that were measured, and of how many those are."""
    import numpy as np

    tokens = tokens[tokens > 0]
    values = np.percentile(tokens, (50, 90, 99, 100), method="higher").tolist() if len(tokens) else [0] * 4
    return {"measured": len(tokens), **dict(zip(("p50", "p90", "p99", "max"), map(int, values), strict=True))}


def prepare(
    recipe: Recipe, located: list[list[Path]], ruler: Ruler, folder: Path, pool: ProcessPoolExecutor | None
) -> dict[str, Any]:
    """Write sft.jsonl, grpo.jsonl, eval.jsonl and removed.jsonl under `folder`; return the metrics.

    `located` are the files of each source, none for one from the hub; `pool` are their `helpers`. Raises `UserError` as
    the parts do.
    """
    draft = Draft(folder, ruler, recipe)
    read = [draft.add_source(source, files, pool) for source, files in zip(recipe.data.sources, located, strict=True)]
    sets = draft.finish()
    refuse_small(recipe, sets)
    return {"sources": read, "sets": sets}


def refuse_small(recipe: Recipe, sets: dict[str, Any]) -> None:
    """Raise `UserError` when a set has fewer rows than a later stage would ask for, after training or amid it."""
    asked = {
        "[grpo] prompts_per_step": ("grpo", recipe.grpo.prompts_per_step),
        "[merge] prompts": ("eval", recipe.merge.prompts),
        "[gguf] prompts": ("eval", recipe.gguf.prompts),
        "[gguf] importance_prompts": ("sft", recipe.gguf.importance_prompts),
    }
    lines = "".join(
        f"\n  {knob} = {count}, and the {name} set has {sets[name]['rows']} rows"
        for knob, (name, count) in asked.items()
        if count > sets[name]["rows"]
    )
    if lines:
        raise UserError(
            f"{recipe.path}: too few rows for what later stages take at once:{lines}\nLower these, or give that set "
            f"more rows: another file, larger shares"
        )


def summary(metrics: dict[str, Any]) -> str:
    """Return a table of the sets for the terminal."""
    lines = [f"{'':6}{'rows':>9}  {'prompt tokens':>20}  dropped"]
    for name, made in metrics["sets"].items():
        tokens = made["prompt_tokens"]
        dropped = ", ".join(f"{count} {reason}" for reason, count in made["dropped"].items()) or "none"
        lines.append(f"{name:6}{made['rows']:>9}  {tokens['p50']:>6} (max {tokens['max']:>5})  {dropped}")
    for source in metrics["sources"]:
        dropped = "".join(f", {count} {reason}" for reason, count in source["dropped"].items())
        lines.append(f"from {source['name']} ({source['split']}): {source['rows']} rows{dropped}")
    return "\n".join(lines)


if __name__ == "__main__":
    # transformers imports torch where it finds it, which takes longer than most datasets do; tokenizers work without.
    sys.modules["torch"] = None
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    main()
