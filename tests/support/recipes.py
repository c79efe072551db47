"""Recipes for tests: the tables of a shipped one, and the one writer of TOML."""

import json
import tomllib
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"


def read_tables(name: str = "tiny") -> dict[str, Any]:
    """Return the tables of a shipped recipe, to be changed and written."""
    return tomllib.loads((RECIPES / f"{name}.toml").read_text())


def write_tables(path: Path, tables: dict[str, Any]) -> Path:
    """Write tables as a recipe; return its path."""
    path.write_text(toml(tables))
    return path


def toml(tables: dict[str, Any], inside: str = "") -> str:
    """Return tables as TOML: plain keys first, then tables and lists of tables, at any depth."""
    plain, below = "", ""
    for key, value in tables.items():
        if isinstance(value, dict):
            below += f"\n[{inside}{key}]\n{toml(value, f'{inside}{key}.')}"
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            below += "".join(f"\n[[{inside}{key}]]\n{toml(each, f'{inside}{key}.')}" for each in value)
        else:
            plain += f"{key} = {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n"
    return plain + below
