"""Rows of a source, checked: question, answer and solution, or the reason a row is left out."""

import itertools
import json
import os
import re
import unicodedata
import zlib
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from stages.lib.answers import formats
from stages.lib.answers.formats import Format
from stages.lib.answers.grade import Kind, canonical, kind_of, shown_answer
from stages.lib.answers.sandbox import FENCED, why_unusable
from stages.lib.data.batch import Batch
from stages.lib.data.files import Lines
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source

SETS = ("sft", "grpo", "eval")
MEASURES = ("prompt_tokens", "example_tokens", "sft_bytes", "line_bytes")
BIT = {name: 1 << place for place, name in enumerate(SETS)}
SURROGATE = re.compile("[\ud800-\udfff]")
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
encode = json.JSONEncoder(ensure_ascii=False).encode
quote = json.encoder.encode_basestring  # as `encode` does for a string, but faster
PROGRAM_ALONE = "The function below does what is asked."
COMMA = str(Kind("number", decimal=","))
READS_TWO_WAYS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}[.,]\d{3}(?![\d.,])")


class Unusable(ValueError):
    """A row that can't be in a set, with the reason that it is counted under."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(found)
        self.reason = reason


def label(source: Source, file: Path) -> str:
    """Return the name of a source's file in the artifact, which does not depend on where the file lies."""
    name = f"{source.name} {source.config}" if source.config else source.name
    return f"{name} ({source.split}) {file.name}"


def most_tokens(text: str) -> int:
    """Return the most tokens that `text` can have: each is at least one byte of it in some normal form."""
    if text.isascii():
        return len(text)
    return max(len(text.encode()), len(unicodedata.normalize("NFKD", text).encode()))


def problem_of(question: Any, answer: Any, solution: Any, style: str, kind: str = "number") -> tuple[str, str, str]:
    """Return a row's question, its answer as written and its worked solution with its marks ("" if it has none).

    Raises `Unusable` for a row without a question or without a readable answer.
    """
    question = question.strip() if isinstance(question, str) else ""
    if not question:
        raise Unusable("no question", "the question's column holds no text")
    worked = solution if isinstance(solution, str) else ""
    text = answer.strip() if isinstance(answer, str) else as_text(answer, kind)
    if not text:
        raise Unusable("no answer", f"no answer: {answer!r}")
    if style == "gsm8k":
        worked, mark, text = (part.strip() for part in text.rpartition("####"))
        if not mark:
            raise Unusable("unreadable answer", "a GSM8K answer ends with a line '#### N'; this one has no '####'")
    if kind == "python" and (wrong := why_unusable(text)):
        raise Unusable("unusable tests", f"{wrong}: {text[:80]!r}")
    if canonical(kind, text) is None:
        raise Unusable("unreadable answer", unread(text, kind))
    if not (question.isascii() and worked.isascii() and text.isascii()) and SURROGATE.search(question + worked + text):
        raise Unusable("not Unicode", "half of a surrogate pair, which UTF-8 can't hold")
    return question, text, worked.strip()


def as_text(value: Any, kind: str) -> str:
    """Return the text of an answer that JSON or Parquet holds as a number or as several texts; "" for another."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value[0].strip() if len(value) == 1 else json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value) if kind == "text" else ""
    return str(value) if isinstance(value, int | float | Decimal) else ""


def unread(text: str, kind: str) -> str:
    """Return why an answer can't be read, and what to state in the recipe for one of another kind."""
    if has_decimal_comma(text, kind):
        return f'{text[:80]!r} has a decimal comma: state decimal = ","'
    if kind.startswith("number"):
        others = 'no numbers? State answers = "math", "text" or "choice"'
        return f"can't be read as one number: {text[:80]!r} ({others})"
    return f"can't be read as an answer of kind {kind!r}: {text[:80]!r}"


def has_decimal_comma(text: str, kind: str) -> bool:
    """Return whether an answer is a number only if its decimals follow a comma."""
    return kind.startswith("number") and "," in text and canonical(kind, text) is None is not canonical(COMMA, text)


def separators_in(answer: str, kind: str) -> str:
    """Return "decimal comma" or "two ways" for an answer that has the one or reads so; "" for another."""
    text = answer.rpartition("####")[2].strip()
    if kind.startswith("number") and READS_TWO_WAYS.search(text):
        return "two ways"
    return "decimal comma" if has_decimal_comma(text, kind) else ""


def parts_of(solution: str) -> tuple[str, str]:
    """Return thought and program of a solution: the words around its one fenced block, and the block.

    A solution that is a program alone gets `PROGRAM_ALONE` for a thought: a format has no empty one.
    """
    match = FENCED.search(solution + "\n")
    if match is None or not match[1].strip():
        return PROGRAM_ALONE if solution else "", solution
    words = solution[: match.start()] + solution[match.end() :]
    return words.strip() or PROGRAM_ALONE, match[0].strip()


def completion_of(worked: str, answer: str, style: str, answer_format: Format) -> str:
    """Return the SFT completion. Raises `Unusable` without a solution, or with one that can't be written."""
    if style == "think":
        if worked and "</think>" not in worked:
            raise Unusable("unusable solution", "the thought has no end (</think>): it was truncated")
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
    """What `check_batch` needs of the recipe and the tokenizer."""

    format_name: str
    system_prompt: str
    ngram_words: int
    safe_prompt: int  # a question of at most so many bytes gives a prompt that is short enough
    safe_example: int  # the same for question and completion together


@dataclass
class Checked:
    """The good rows of a batch, column by column, the place of their lines for each set, and the rows left out."""

    origin: str
    rows: int  # read, good or not
    unused: int  # good, but outside the source's shares
    drafts: dict[str, tuple[Path, int]]  # of the lines of each set, and of the n-grams: the file, and where they begin
    table: dict[str, Any]  # arrays: ids, counts, bands, sets, number, and the MEASURES; tokens are filled in later
    to_measure: list[tuple[str, int, tuple[str, ...]]]  # column, row, the conversation
    removed: list[tuple[str | None, str | None, str, int]]  # set, id, reason, number; None where it had none yet
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
    removed: list[tuple[str | None, str | None, str, int]] = []

    def leave_out(place: int, error: Unusable, name: str | None = None, row_id: str | None = None) -> None:
        if source.unreadable == "refuse":
            raise UserError(
                f'{batch.where(place)}: {error.reason}: {error}. Fix the row, or set unreadable = "drop" for '
                f"{source.name} in the recipe"
            ) from error
        removed.append((name, row_id, error.reason, batch.numbers[place]))

    problems, places = [], []
    solutions = batch.columns[source.solution] if source.solution else itertools.repeat(None)
    columns = zip(batch.columns[source.question], batch.columns[source.answer], solutions, strict=False)
    for place, (question, answer, solution) in enumerate(columns):
        try:
            problems.append(problem_of(question, answer, solution, source.style, kind))
            places.append(place)
        except Unusable as error:
            leave_out(place, error)
        if not source.decimal and isinstance(answer, str) and (found := separators_in(answer, kind)):
            separators.setdefault(found, f"{batch.where(place)}: {answer.strip()[-40:]!r}")
    if not problems:
        return Checked(batch.origin, len(batch.numbers), 0, {}, {}, [], removed, separators)
    questions = [question for question, _, _ in problems]
    prints = fingerprint.fingerprint(questions, rules.ngram_words)
    ids = [f"{number:016x}" for number in prints.ids.tolist()]
    sets = sets_of(source, prints.ids)
    unused = int((sets == 0).sum())

    completions: dict[int, str] = {}
    for row in np.flatnonzero(sets & BIT["sft"]).tolist():
        _, answer, worked = problems[row]
        try:
            thought, taught = parts_of(worked) if kind == "python" else (worked, shown_answer(kind, answer))
            completions[row] = completion_of(thought, taught, source.style, answer_format)
        except Unusable as error:
            leave_out(places[row], error, "sft", ids[row])
            sets[row] -= BIT["sft"]
    answer_parts = [(question, f'"answer": {quote(answer)}, "kind": "{kind}"') for question, answer, _ in problems]
    lines, table, to_measure = lines_of(answer_parts, completions, ids, sets, rules, measure_all)
    table |= {"ids": prints.ids, "counts": prints.counts, "bands": prints.bands, "sets": sets}
    table["answers"] = np.array([zlib.crc32(canonical(kind, answer).encode()) for _, answer, _ in problems], np.uint32)
    table["number"] = np.array([batch.numbers[place] for place in places], np.uint32)
    drafts = {name: add_to_draft(folder, name, b"".join(texts)) for name, texts in lines.items()}
    drafts["grams"] = add_to_draft(folder, "grams", prints.grams)
    return Checked(batch.origin, len(batch.numbers), unused, drafts, table, to_measure, removed, separators)


def add_to_draft(folder: Path, name: str, content: Any) -> tuple[Path, int]:
    """Append `content` to this process's draft `name` in `folder`; return the file and where the content begins."""
    path = folder / f"{name}.{os.getpid()}.draft"
    with path.open("ab") as file:
        begin = file.tell()
        file.write(content)
    return path, begin


def lines_of(
    problems: list[tuple[str, str]], completions: dict[int, str], ids: list[str], sets: Any, rules: Rules,
    measure_all: bool,
) -> tuple[dict[str, list[bytes]], dict[str, Any], list[tuple[str, int, tuple[str, ...]]]]:  # fmt: skip
    """Return the lines of each set, and of a `Checked` the MEASURES, with the bytes filled in, and `to_measure`.

    `problems` are questions, each with its answer and kind as JSON; `completions` are those of the sft set, by row.
    """
    import numpy as np

    head = f'"prompt": [{{"role": "system", "content": {encode(rules.system_prompt)}}}, {{"role": "user", "content": '
    lines: dict[str, list[bytes]] = {name: [] for name in SETS}
    table = {name: np.zeros(len(ids), np.uint32) for name in MEASURES}
    to_measure: list[tuple[str, int, tuple[str, ...]]] = []
    for row, bits in enumerate(sets.tolist()):
        question, answer = problems[row]
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
        table["line_bytes"][row] = len(line_bytes)
        for name in ("grpo", "eval"):
            if bits & BIT[name]:
                lines[name].append(line_bytes)
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
