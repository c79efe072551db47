"""Writing a recipe: tables as TOML."""

import json
import re
from collections.abc import Mapping
from typing import Any


def as_toml(tables: Mapping[str, Any], inside: str = "") -> str:
    """Return tables as TOML: plain keys first, then tables and lists of tables, at any depth; no comments.

    A text, number, truth value or list of these is written as JSON writes it, which TOML reads as the same value.
    """
    plain, below = "", ""
    for name, value in tables.items():
        key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else text_of(name)
        if isinstance(value, dict):
            below += f"\n[{inside}{key}]\n{as_toml(value, f'{inside}{key}.')}"
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            below += "".join(f"\n[[{inside}{key}]]\n{as_toml(each, f'{inside}{key}.')}" for each in value)
        else:
            plain += f"{key} = {text_of(value)}\n"
    return plain + below


def text_of(value: Any) -> str:
    """Return a value that is no table as TOML."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
