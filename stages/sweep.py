"""Write the recipes of a sweep: one for each combination of the values that are asked for. Print their names."""

import copy
import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.artifact.manifest import write_whole
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.toml import tables_in
from stages.lib.recipe.write import as_toml, text_of

MAX_RECIPES = 100
MAX_NAME = 200  # of the 255 bytes that a file name may have: artifacts, logs and models are named after a recipe
MARK = "# Written by a sweep"  # how a recipe begins that may be written again


@click.command(help=__doc__)
@options.recipe
@click.option("--set", "wanted", required=True, help='Keys and values: "grpo.learning_rate=1e-5,5e-5 grpo.seed=0,1,2".')
def main(recipe: Path, wanted: str) -> None:
    read_recipe(recipe)
    tables = tables_in(recipe)
    keys = read_set(wanted)
    combinations = list(itertools.islice(itertools.product(*keys.values()), MAX_RECIPES + 1))
    if len(combinations) > MAX_RECIPES:
        raise UserError(f"SET={wanted}: gives more than {MAX_RECIPES} recipes; expected fewer")
    variants = {}
    for values in combinations:
        changes = dict(zip(keys, values, strict=True))
        name = variant_name(recipe.stem, changes)
        if len(name) > MAX_NAME:
            raise UserError(
                f"SET={wanted}: makes a recipe name of {len(name)} characters; expected at most {MAX_NAME}. Copy the "
                f"recipe, set in the copy the keys that have one value, and sweep the others"
            )
        variants[recipe.with_name(f"{name}.toml")] = changes
    if len(variants) < len(combinations):
        raise UserError(f"SET={wanted}: some values make the same recipe name; expected each value once")
    written: list[Path] = []
    try:
        for path, changes in variants.items():
            is_new = not path.exists()
            write_variant(path, recipe.stem, tables, changes)
            written += [path] if is_new else []
            read_recipe(path)  # so that a wrong value shows before the first run
    except UserError:
        for path in written:
            path.unlink()
        raise
    for path in variants:
        click.echo(path.stem)


def read_set(text: str) -> dict[str, list[Any]]:
    """Return the values by dotted key of `text`, "table.key=value,value table.key=value".

    Values are TOML, or plain words. Raises `UserError` where a part has another form.
    """
    keys: dict[str, list[Any]] = {}
    for part in re.split(r"\s+(?=[\w.\[\]-]+=)", text.strip()):
        match = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+|\[\d+\])*)=(.+)", part, re.DOTALL)
        if not match or match[1] in keys:
            found = f"{match[1]} is there twice" if match else repr(part)
            raise UserError(f'SET={text}: {found}; expected keys once each, as in SET="grpo.learning_rate=1e-5,5e-5"')
        try:
            keys[match[1]] = tomllib.loads(f"values = [{match[2]}]")["values"]
        except tomllib.TOMLDecodeError:
            keys[match[1]] = [value.strip() for value in match[2].split(",")]
    return keys


def variant_name(stem: str, changes: dict[str, Any]) -> str:
    """Return the name of a variant, which make and a shell take as a word: tiny+learning_rate-1e-05+seed-0."""
    last = [key.rpartition(".")[2] for key in changes]
    short = [name if last.count(name) == 1 else key for key, name in zip(changes, last, strict=True)]
    values = [re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-") for value in changes.values()]
    names = [re.sub(r"\W+", ".", name) for name in short]
    return "+".join([stem, *(f"{name}-{value}" for name, value in zip(names, values, strict=True))])


def write_variant(path: Path, stem: str, tables: dict[str, Any], changes: dict[str, Any]) -> None:
    """Write the recipe `stem` with `changes` by dotted key to `path`. Raises `UserError` where a file is in the way."""
    changed = copy.deepcopy(tables)
    for key, value in changes.items():
        *inside, name = re.findall(r"\w+", key)
        table: Any = changed
        for part in inside:
            place = int(part) if isinstance(table, list) and part.isdigit() else part
            try:
                table = table[place]
            except (KeyError, IndexError, TypeError):
                table = table.setdefault(place, {}) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            raise UserError(f"SET: {key}: there is no such key in a recipe; expected one as in grpo.learning_rate")
        table[name] = value
    if path.exists() and not path.read_text(encoding="utf-8").startswith(MARK):
        raise UserError(f"{path}: this recipe is not of a sweep and would be overwritten. Rename it")
    words = ", ".join(f"{key} = {text_of(value)}" for key, value in changes.items())
    write_whole(path, f"{MARK}: {stem} with {words}\n{as_toml(changed)}".encode())


if __name__ == "__main__":
    main()
