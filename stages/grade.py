"""Grade answers: read JSON lines of kind, answer and given from standard input, write each with its score."""

import json
import sys

import click

from stages.lib.answers.grade import grade
from stages.lib.errors import UserError

KEYS = ("kind", "answer", "given")


@click.command(help=__doc__)
def main() -> None:
    for number, line in enumerate(sys.stdin.buffer, 1):
        if not line.strip():
            continue
        row = read_row(number, line)
        answer = row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"], ensure_ascii=False)
        try:
            row["score"] = grade(row["kind"], answer, row["given"])
        except UserError as error:
            raise UserError(f"standard input, line {number}: {error}") from error
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def read_row(number: int, line: bytes) -> dict:
    """Return the object of one line. Raises `UserError`, naming the line, for one that lacks a key or holds no text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"standard input, line {number}: not JSON: {error}") from error
    missing = [key for key in KEYS if key not in row] if isinstance(row, dict) else list(KEYS)
    if missing:
        raise UserError(
            f"standard input, line {number}: no {', '.join(missing)}; expected an object such as "
            f'{{"kind": "number", "answer": "42", "given": "42 apples"}}'
        )
    several = row["kind"] in ("text", "choice", "python") and isinstance(row["answer"], list) and row["answer"]
    answers = row["answer"] if several else [row["answer"]]
    for key, value in (("kind", row["kind"]), ("given", row["given"]), *(("answer", each) for each in answers)):
        if not isinstance(value, str):
            raise UserError(f"standard input, line {number}: {key} is {value!r}; expected text")
    return row


if __name__ == "__main__":
    main()
