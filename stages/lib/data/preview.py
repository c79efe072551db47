"""What the first rows of a source show before all are read: some of them, a shared instruction, a column left out."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from stages.lib.answers import formats
from stages.lib.answers.grade import kind_of, shown_answer
from stages.lib.data.batch import Batch
from stages.lib.data.files import read_batches
from stages.lib.data.rows import problem_in, taught, values_of_rows
from stages.lib.data.shapes import Unusable, as_list, joined, question_of
from stages.lib.recipe.tables import GYM, Source

COLUMNS = 80  # of a terminal
ROWS = 3  # shown in all, and at least one of each source
ALIKE_ROWS = 8  # different questions that begin or end alike, before that counts as an instruction
INSTRUCTION_WORDS = 5
# The ends of a sentence, the full-width ones too, which no blank follows.
AFTER_INSTRUCTION = re.compile("\n|[.?!:;]\\s+|[\u3002\uff01\uff1a\uff1b\uff1f]\\s*")
BEFORE_INSTRUCTION = re.compile("\n|(?:^|[.?!:;])\\s+|[\u3002\uff01\uff1a\uff1b\uff1f]\\s*")
# Columns by the names that datasets give to a part of the question: SVAMP's Body, SQuAD's context, Alpaca's input.
PARTS = {
    "article", "background", "body", "context", "dialogue", "fact", "input", "paragraph", "passage", "premise",
    "scenario", "schema", "story", "table",
}  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """One row: what its columns hold, and the question, answer and completion read from them, or why it is left out."""

    where: str
    columns: dict[str, str]
    question: str = ""
    answer: str = ""
    completion: str = ""  # "": the row is not in the sft set
    left_out: str = ""


@dataclass(frozen=True)
class Preview:
    """What the first batch of a source shows. `instructions`: texts that all questions begin or end with."""

    rows: list[Shown]
    instructions: tuple[str, ...]
    lost_columns: list[str]


def preview(source: Source, files: list[Path], format_name: str, rows: int) -> Preview:
    """Return what the first batch of a source shows, with its first `rows` rows.

    Raises `UserError` for files that can't be read and for a column that is missing.
    """
    batch = next(iter(read_batches(source, files, whole=source.name != GYM))).parsed()
    values = list(values_of_rows(source, batch))
    shown = [read_row(source, batch, place, each, format_name) for place, each in enumerate(islice(values, rows))]
    return Preview(shown, instructions_of([question for question, *_ in values]), lost_columns(source, batch))


def rows_each(sources: int) -> int:
    """Return how many rows to show of each of so many sources."""
    return -(-ROWS // sources)


def read_row(source: Source, batch: Batch, place: int, values: tuple[Any, ...], format_name: str) -> Shown:
    """Return the batch's row `place` before and after it is read."""
    kind, names = str(kind_of(source)), [*as_list(source.question), source.answer, source.solution]
    columns = {
        name: "" if (value := batch.columns[name][place]) is None else str(value)
        for name in dict.fromkeys([*names, *as_list(source.choices)])
        if name
    }
    shown = Shown(batch.where(place), columns)
    try:
        question, answer, worked = problem_in(source, kind, values)
        completion = taught(source, kind, answer, worked, formats.get(format_name)) if "sft" in source.use else ""
    except Unusable as error:
        return dataclasses.replace(shown, left_out=f"{error.reason}: {error}")
    return dataclasses.replace(shown, question=question, answer=shown_answer(kind, answer), completion=completion)


def instructions_of(values: Sequence[Any]) -> tuple[str, ...]:
    """Return the instruction that all questions begin with and the one that all end with, if there are any.

    An instruction ends at the end of a line or a sentence, has `INSTRUCTION_WORDS` words and leaves every question
    something of its own. It is found in `ALIKE_ROWS` different questions or more.
    """
    questions = set()
    for value in values:
        try:
            questions.add(question_of(value))
        except Unusable:
            continue
    if len(questions) < ALIKE_ROWS:
        return ()
    head = commonprefix(list(questions))
    head = head[: max((match.end() for match in AFTER_INSTRUCTION.finditer(head)), default=0)]
    rest = [question[len(head) :] for question in questions]
    tail = commonprefix([text[::-1] for text in rest])[::-1]
    match = BEFORE_INSTRUCTION.search(tail)
    tail = tail[match.end() :] if match else ""
    return tuple(text.strip() for text in (head, tail) if len(text.split()) >= INSTRUCTION_WORDS)


def lost_columns(source: Source, batch: Batch) -> list[str]:
    """Return the columns whose name says that they are a part of the question, and that the recipe does not name."""
    named = {name.partition(".")[0] for name in (*as_list(source.question), source.answer, source.solution)}
    named |= set(as_list(source.choices))
    rows = batch.rows or []
    parts = [name for row in rows[:1] for name in row if name not in named and name.lower() in PARTS]
    return [name for name in parts if 2 * sum(bool(joined([row.get(name)])) for row in rows) > len(rows)]


def cut(text: str, columns: int) -> str:
    """Return the beginning and the end of a text on one line of `columns` columns, with escapes for control signs."""
    plain = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    if wide(plain) <= columns:
        return plain
    begin = end = ""
    for sign in plain:
        if wide(begin + sign) > (columns - 5) * 3 // 5:
            break
        begin += sign
    for sign in reversed(plain):
        if wide(begin + end + sign) > columns - 5:
            break
        end = sign + end
    return f"{begin} ... {end}"


def wide(text: str) -> int:
    """Return the columns of a terminal that a text takes."""
    return sum(2 if east_asian_width(sign) in "WF" else 1 for sign in text)


def rows_as_read(previews: Sequence[Preview]) -> Iterator[str]:
    """Yield the first rows of each source, before and after they are read, and what all rows of it share or lack."""
    for seen in previews:
        for row in seen.rows:
            yield cut(row.where, COLUMNS)
            before = [(f"column {cut(name, 24)}", value) for name, value in row.columns.items()]
            after = [("question", row.question), ("answer", row.answer), ("sft completion", row.completion)]
            if row.left_out:
                after = [("left out", row.left_out)]
            lines = [*before, *((f"read: {name}", value) for name, value in after if value)]
            width = max(wide(name) for name, _ in lines)
            for name, value in lines:
                yield f"  {name}{' ' * (width - wide(name))}  {cut(value, COLUMNS - width - 4)}"
        for text in seen.instructions:
            yield f"the same in every question, so it makes no two alike: {cut(text, COLUMNS - 54)}"
