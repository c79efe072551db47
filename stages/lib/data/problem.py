"""The problem in one row: question, answer and worked solution, or the reason that the row is left out."""

import json
import re
from decimal import Decimal
from typing import Any

from stages.lib.answers import formats
from stages.lib.answers.formats import Format
from stages.lib.answers.grade import Kind, canonical
from stages.lib.answers.sandbox import FENCED, why_unusable
from stages.lib.data.shapes import Unusable, marked_answer, question_of, reply_of, shown

SURROGATE = re.compile("[\ud800-\udfff]")
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
PROGRAM_ALONE = "The function below does what is asked."
COMMA = str(Kind("number", decimal=","))
READS_TWO_WAYS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}[.,]\d{3}(?![\d.,])")


def problem_of(question: Any, answer: Any, solution: Any, style: str, kind: str = "number") -> tuple[str, str, str]:
    """Return a row's question, its answer as written and its worked solution with its marks ("" if it has none).

    Raises `Unusable` for a row without a question or without a readable answer.
    """
    question = question_of(question)
    worked = solution if isinstance(solution, str) else ""
    if (reply := reply_of(solution)) is not None:
        worked = reply
    text = answer.strip() if isinstance(answer, str) else ""
    if (reply := reply_of(answer)) is not None:
        text, style = reply, style if style == "gsm8k" else "marked"
    elif not text:
        text = as_text(answer, kind)
    if not text:
        raise Unusable("no answer", no_answer(answer))
    if style == "gsm8k":
        worked, text = answer_after_hashes(text)
    elif style == "marked":
        worked, text = answer_within(text, worked.strip())
    if kind == "python" and (wrong := why_unusable(text)):
        raise Unusable("unusable tests", f"{wrong}: {text[:80]!r}")
    if canonical(kind, text) is None:
        raise Unusable("unreadable answer", unread(text, kind))
    if not (question.isascii() and worked.isascii() and text.isascii()) and SURROGATE.search(question + worked + text):
        raise Unusable("not Unicode", "half of a surrogate pair, which UTF-8 can't hold")
    if "\r" in question or "\r" in worked or "\r" in text:
        question, text, worked = (part.replace("\r\n", "\n").replace("\r", "\n") for part in (question, text, worked))
    return question, text, worked.strip()


def answer_after_hashes(text: str) -> tuple[str, str]:
    """Return solution and answer of a GSM8K answer."""
    worked, mark, answer = (part.strip() for part in text.rpartition("####"))
    if not mark:
        remedy = '. State style = "marked", which reads this one' if marked_answer(text) else ""
        raise Unusable("unreadable answer", f"a GSM8K answer ends with a line '#### N'; this one has no '####'{remedy}")
    return worked, answer


def answer_within(text: str, solution: str) -> tuple[str, str]:
    """Return the working and the marked answer of a text; `solution` is what else the row has of working."""
    found = marked_answer(text)
    if found is None:
        raise Unusable(
            "no marked answer",
            f"the text marks no answer; expected \\boxed{{...}}, a line '#### N', or 'the answer is N' at the end; it "
            f"ends with {text[-60:]!r}",
        )
    return found[0] if solution in ("", text) else solution, found[1]


def no_answer(value: Any) -> str:
    """Return the message on an answer's column that holds none."""
    if isinstance(value, dict) and value:
        fields = ", ".join(value)
        return f"the answer's column holds a struct with {fields}; name one after a dot: COLUMN.{next(iter(value))}"
    return f"no answer: {value!r}" if not isinstance(value, list) else f"no answer in {shown(value)}"


def as_text(value: Any, kind: str) -> str:
    """Return the text of an answer that JSON or Parquet holds as a number or as a list; "" for another.

    Of several answers of kind number or math all must be the same: whether one is right or all are, nothing says.
    """
    if isinstance(value, list):
        texts = [each.strip() if isinstance(each, str) else as_text(each, kind) for each in value]
        if not texts or not all(texts):
            return ""
        if len(texts) == 1:
            return texts[0]
        if kind.startswith(("number", "math")):
            if len({canonical(kind, each) for each in texts}) > 1:
                raise Unusable("several answers", f'{shown(value)}. Is any of them right? State answers = "text"')
            return texts[0]
        return json.dumps(texts, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value) if kind == "text" else ""
    return str(value) if isinstance(value, int | float | Decimal) else ""


def unread(text: str, kind: str) -> str:
    """Return why an answer can't be read, and what to state in the recipe for one of another kind."""
    if has_decimal_comma(text, kind):
        return f'{text[:80]!r} has a decimal comma: state decimal = ","'
    if marked := marked_answer(text):
        return f'the answer stands within a text: state style = "marked", which takes {marked[1][:80]!r} of it'
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
