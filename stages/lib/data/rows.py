"""Rows of a source, checked: drafts of the lines of each set, fingerprints, and the rows left out with the reason."""

import base64
import itertools
import json
import os
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any, NamedTuple

from stages.lib.answers import formats
from stages.lib.answers.grade import canonical, kind_of, shown_answer
from stages.lib.data.batch import Batch
from stages.lib.data.choices import shuffled, with_options
from stages.lib.data.files import Lines
from stages.lib.data.problem import SURROGATE, completion_of, parts_of, problem_of, separators_in
from stages.lib.data.shapes import Unusable, as_list, joined, question_of
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source

SETS = ("sft", "grpo", "eval")
VALIDATION = "validation"  # a fourth set where a recipe asks for it: rows out of grpo's drafts
MAX_FOUND = 300  # characters of what is said of a row that is left out
MEASURES = ("prompt_tokens", "example_tokens", "sft_bytes", "grpo_bytes", "eval_bytes")
BIT = {name: 1 << place for place, name in enumerate((*SETS, VALIDATION))}
encode = json.JSONEncoder(ensure_ascii=False).encode
quote = json.encoder.encode_basestring  # as `encode` does for a string, but faster


def label(source: Source, file: Path) -> str:
    """Return the name of a source's file in the artifact, which does not depend on where the file lies."""
    name = f"{source.name} {source.config}" if source.config else source.name
    return f"{name} ({source.split}) {file.name}"


def most_tokens(text: str) -> int:
    """Return the most tokens that `text` can have: each is at least one byte of it in some normal form."""
    if text.isascii():
        return len(text)
    return max(len(text.encode()), len(unicodedata.normalize("NFKD", text).encode()))


@dataclass(frozen=True)
class Rules:
    """What `check_batch` needs of the recipe and the tokenizer."""

    format_name: str
    system_prompt: str
    ngram_words: int
    safe_prompt: int  # a question of at most so many bytes gives a prompt that is short enough
    safe_example: int  # the same for question and completion together
    instructions: tuple[str, ...] = ()  # that questions begin or end with: they make no two alike
    whole_rows: bool = False  # the grpo set keeps each row's own columns, for rewards of the user's own


class LeftOut(NamedTuple):
    """A row that is in no set, or not in one."""

    set: str | None  # None: in no set
    id: str | None  # None where it had none yet
    reason: str  # that it is counted under
    found: str  # what is wrong with it
    number: int  # its place in the file, from 1


@dataclass
class Checked:
    """The good rows of a batch, column by column, the place of their lines for each set, and the rows left out."""

    origin: str
    rows: int  # read, good or not
    unused: int  # good, but outside the source's shares
    drafts: dict[str, tuple[Path, int]]  # of the lines of each set, and of the n-grams: the file, and where they begin
    table: dict[str, Any]  # arrays: ids, counts, bands, sets, number, and the MEASURES; tokens are filled in later
    to_measure: list[tuple[str, int, tuple[str, ...]]]  # column, row, the conversation
    removed: list["LeftOut"]
    separators: dict[str, str]  # the first answers with a "decimal comma" and that read in "two ways", and their places


def check_batch(source: Source, piece: Batch | Lines, rules: Rules, measure_all: bool, folder: Path) -> Checked:
    """Read the rows of a batch and add the good ones to this process's drafts in `folder`.

    Raises `UserError`, naming file and row, for another row, unless the source drops those.
    """
    import numpy as np

    from stages.lib.data import fingerprint

    batch = piece.parsed()
    answer_format, kind = formats.get(rules.format_name), str(kind_of(source))
    separators: dict[str, str] = {}
    removed: list[LeftOut] = []

    def leave_out(place: int, error: Unusable, name: str | None = None, row_id: str | None = None) -> None:
        if source.unreadable == "refuse":
            raise UserError(
                f'{batch.where(place)}: {error.reason}: {error}. Fix the row, or set unreadable = "drop" for '
                f"{source.name} in the recipe"
            ) from error
        removed.append(LeftOut(name, row_id, error.reason, str(error)[:MAX_FOUND], batch.numbers[place]))

    problems, places = [], []
    for place, values in enumerate(values_of_rows(source, batch)):
        try:
            problems.append(problem_in(source, kind, values))
            places.append(place)
        except Unusable as error:
            leave_out(place, error)
        answer = values[1]
        if not source.decimal and isinstance(answer, str) and (found := separators_in(answer, kind)):
            separators.setdefault(found, f"{batch.where(place)}: {answer.strip()[-40:]!r}")
    if not problems:
        return Checked(batch.origin, len(batch.numbers), 0, {}, {}, [], removed, separators)
    questions = [question for question, _, _ in problems]
    prints = fingerprint.fingerprint(without(questions, rules.instructions), rules.ngram_words)
    ids = [f"{number:016x}" for number in prints.ids.tolist()]
    sets = sets_of(source, prints.ids)
    unused = int((sets == 0).sum())

    completions: dict[int, str] = {}
    for row in np.flatnonzero(sets & BIT["sft"]).tolist():
        _, answer, worked = problems[row]
        try:
            completions[row] = taught(source, kind, answer, worked, answer_format)
        except Unusable as error:
            leave_out(places[row], error, "sft", ids[row])
            sets[row] -= BIT["sft"]
    answers = [f'"answer": {quote(answer)}, "kind": "{kind}"' for _, answer, _ in problems]
    parts = list(zip(questions, answers, own_columns(batch, places), strict=True))
    lines, table, to_measure = lines_of(parts, completions, ids, sets, rules, measure_all)
    table |= {"ids": prints.ids, "counts": prints.counts, "bands": prints.bands, "sets": sets}
    table["answers"] = np.array([zlib.crc32(canonical(kind, answer).encode()) for _, answer, _ in problems], np.uint32)
    table["number"] = np.array([batch.numbers[place] for place in places], np.uint32)
    drafts = {name: add_to_draft(folder, name, b"".join(texts)) for name, texts in lines.items()}
    drafts["grams"] = add_to_draft(folder, "grams", prints.grams)
    return Checked(batch.origin, len(batch.numbers), unused, drafts, table, to_measure, removed, separators)


def problem_in(source: Source, kind: str, values: tuple[Any, Any, Any, Sequence[Any]]) -> tuple[str, str, str]:
    """Return question, answer and worked solution of a row of `source`, whose `values` are those of `values_of_rows`.

    Raises `Unusable` for a row without a question or a readable answer.
    """
    question, answer, solution, options = values
    if source.choices:
        names, by = as_list(source.choices), source.chosen_by
        question = question_of(question)
        if source.answer in names:  # the right option has a column of its own: by place it would always be A
            options, names, by = shuffled(question, options), [""] * len(names), "text"
        question, answer = with_options(question, answer, options, names, by)
    style = "marked" if source.style == "plain" and source.answer == source.solution else source.style
    return problem_of(question, answer, solution, style, kind)


def taught(source: Source, kind: str, answer: str, worked: str, answer_format: formats.Format) -> str:
    """Return the SFT completion of a row. Raises `Unusable` without a solution, or with one that can't be written."""
    thought, shown = parts_of(worked) if kind == "python" else (worked, shown_answer(kind, answer))
    return completion_of(thought, shown, source.style, answer_format)


def without(questions: list[str], instructions: Sequence[str]) -> list[str]:
    """Return `questions` less those of `instructions` that they begin or end with, if anything is left."""
    for text in instructions:
        questions = [question.removeprefix(text).removesuffix(text).strip() or question for question in questions]
    return questions


def values_of_rows(source: Source, batch: Batch) -> Iterator[tuple[Any, Any, Any, Sequence[Any]]]:
    """Yield each row's question, a text where several columns make it up, its answer, its solution and its options."""
    columns, none = batch.columns, itertools.repeat(None)
    questions: Iterable[Any]
    if isinstance(source.question, str):
        questions = columns[source.question]
    else:
        questions = map(joined, zip(*(columns[name] for name in source.question), strict=True))
    solutions = columns[source.solution] if source.solution else none
    names = as_list(source.choices)
    options: Iterable[Any] = zip(*(columns[name] for name in names), strict=True) if names else none
    return zip(questions, columns[source.answer], solutions, options, strict=False)


def add_to_draft(folder: Path, name: str, content: Any) -> tuple[Path, int]:
    """Append `content` to this process's draft `name` in `folder`; return the file and where the content begins."""
    path = folder / f"{name}.{os.getpid()}.draft"
    with path.open("ab") as file:
        begin = file.tell()
        file.write(content)
    return path, begin


def own_columns(batch: Batch, places: list[int]) -> list[str]:
    """Return the `row_text` of the batch's rows at `places`; "" for each where no reward needs it."""
    return [row_text(batch.rows[place]) if batch.rows else "" for place in places]


def row_text(row: dict[str, Any]) -> str:
    """Return a row's own columns as JSON; what that has no form for is text: a date, a decimal, bytes in base64.

    As text, rows of any columns make one column of a set, and a reward gets them back as they were.
    """
    text = encode_row(row)
    return json.dumps(row, default=plain_value) if SURROGATE.search(text) else text


def plain_value(value: Any) -> Any:
    """Return what stands in JSON for a value that it has no form for."""
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    if isinstance(value, date | time):
        return value.isoformat()
    return list(value) if isinstance(value, set | tuple) else str(value)


encode_row = json.JSONEncoder(ensure_ascii=False, default=plain_value).encode


def lines_of(
    problems: list[tuple[str, str, str]], completions: dict[int, str], ids: list[str], sets: Any, rules: Rules,
    measure_all: bool,
) -> tuple[dict[str, list[bytes]], dict[str, Any], list[tuple[str, int, tuple[str, ...]]]]:  # fmt: skip
    """Return the lines of each set, and of a `Checked` the MEASURES, with the bytes filled in, and `to_measure`.

    `problems` are questions, each with its answer and kind as JSON, and with its `row_text`, "" to keep none;
    `completions` are those of the sft set, by row.
    """
    import numpy as np

    head = f'"prompt": [{{"role": "system", "content": {encode(rules.system_prompt)}}}, {{"role": "user", "content": '
    lines: dict[str, list[bytes]] = {name: [] for name in SETS}
    table = {name: np.zeros(len(ids), np.uint32) for name in MEASURES}
    to_measure: list[tuple[str, int, tuple[str, ...]]] = []
    for row, bits in enumerate(sets.tolist()):
        question, answer, whole = problems[row]
        line = f'{{"id": "{ids[row]}", {head}{quote(question)}}}], {answer}'
        length = most_tokens(question)
        if row in completions:
            completion = completions[row]
            line_bytes = f'{line}, "completion": [{{"role": "assistant", "content": {quote(completion)}}}]}}\n'.encode()
            lines["sft"].append(line_bytes)
            table["sft_bytes"][row] = len(line_bytes)
            if measure_all or length + most_tokens(completion) > rules.safe_example:
                to_measure.append(("example_tokens", row, (question, completion)))
        line_bytes = f"{line}}}\n".encode()
        grpo_bytes = f'{line}, "row": {quote(whole)}}}\n'.encode() if whole else line_bytes
        for name, text in (("grpo", grpo_bytes), ("eval", line_bytes)):
            if bits & BIT[name]:
                lines[name].append(text)
                table[f"{name}_bytes"][row] = len(text)
        if bits and (measure_all or length > rules.safe_prompt):
            to_measure.append(("prompt_tokens", row, (question,)))
    return lines, table, to_measure


def sets_of(source: Source, ids: Any) -> Any:
    """Return, for each question's 64-bit hash, the bits of its sets: all in `use`, or one by its share."""
    import numpy as np

    bits = np.array([BIT[name] for name in source.use] + [0], np.uint8)
    if not source.shares:
        return np.full(len(ids), bits.sum(), np.uint8)
    return bits[np.searchsorted(np.cumsum(source.shares), ids / 2.0**64, side="right")]
