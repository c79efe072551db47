"""A recipe's file as tables of TOML, read within bounds. Needs nothing but Python: make asks before there is more."""

import tomllib
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 18  # the longest recipe here has 3 KB
MAX_DOTS = 200  # in a line: Python's reader takes memory by the square of the parts of a dotted key


def tables_in(path: Path) -> dict[str, Any]:
    """Return the tables of the TOML file `path`.

    Raises `ValueError`, which says what is wrong with the file, and `OSError` for one that can't be read.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for, and /dev/zero has no end
        raise ValueError("is no file; expected a recipe in TOML")
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES:,} bytes; expected a recipe in TOML")
    for number, line in enumerate(raw.split(b"\n"), 1):
        if (dots := line.count(b".")) > MAX_DOTS:
            raise ValueError(f"line {number} has {dots:,} dots; expected at most {MAX_DOTS}. Break the line")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: TOML's own, UTF-8's, a number of 5,000 digits
        raise ValueError(f"not TOML: {error}") from error
