"""The one exception for what a user can cause; everything else keeps its traceback."""

import difflib
from collections.abc import Iterable, Iterator

import click


class UserError(click.ClickException):
    """A mistake that the user can fix: says where, what was found, what was expected and what to run. Exit code 1."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known word most like `word`, or "" when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def says(error: BaseException, texts: Iterable[str]) -> bool:
    """Say whether one of `texts` is in the message of `error` or of what caused it."""
    return any(text in str(each) for each in chain(error) for text in texts)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error`, what caused it, what caused that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
