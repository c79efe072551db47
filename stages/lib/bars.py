"""Progress bars: on a terminal one line as wide as it is, in a pipe or a file a line now and then.

tqdm is imported where a bar is opened. A bar is a context manager: it is closed however its body ends, so that no
error is written onto its line.
"""

import sys
from typing import Any, TextIO

import click

LINE_SECONDS = 20.0  # between two lines in a pipe or a file
LINE = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Lines:
    """A text stream that writes each state of a bar as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        """Write a state of the bar, unless it is the one before."""
        line = text.strip("\r\n ")
        if line and line != self.last:
            self.stream.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


def open_bar(total: int, unit: str, desc: str | None = None, *, done: int = 0) -> Any:
    """Return a bar of `total` units, `done` of them done, on standard error; `update(n)` moves it."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, initial=done, unit=unit, desc=desc, dynamic_ncols=True)
    return tqdm(
        total=total, initial=done, unit=unit, desc=f"{desc}: " if desc else None, file=Lines(sys.stderr),
        mininterval=LINE_SECONDS, bar_format=LINE,
    )  # fmt: skip


def show_beside(bar: Any, values: dict[str, str]) -> None:
    """Show named values beside the bar, from the next time on that it is drawn."""
    bar.set_postfix(values, refresh=sys.stderr.isatty())


def say(text: str) -> None:
    """Write a line to standard error; where a bar is open, it goes above the bar and not onto its line."""
    if "tqdm" in sys.modules and sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        click.echo(text, err=True)
