"""Recipes for tests: the tables of a shipped one, written with changes."""

import tomllib
from pathlib import Path
from typing import Any

from stages.lib.recipe.write import as_toml

RECIPES = Path(__file__).parents[2] / "recipes"


def read_tables(name: str = "tiny") -> dict[str, Any]:
    """Return the tables of a shipped recipe, to be changed and written."""
    return tomllib.loads((RECIPES / f"{name}.toml").read_text())


def write_tables(path: Path, tables: dict[str, Any]) -> Path:
    """Write tables as a recipe; return its path."""
    path.write_text(as_toml(tables))
    return path
