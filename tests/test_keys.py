"""The keys of a recipe, as `docs/keys.md` lists them: made of the fields, bounds and comments in `recipe/tables.py`.

`python -m tests.test_keys` writes the page; a test asserts that it is what the tables say.
"""

import builtins
import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.lib.recipe import tables
from stages.lib.recipe.tables import Bound, Recipe, Source

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "keys.md"
HEAD = """\
# The keys of a recipe

Each table of a recipe with all of its keys: what a value may be, its default, and what it means. A key without a
default must be in the recipe. How a recipe is read, with examples: [recipes.md](recipes.md).

`python -m tests.test_keys` writes this page from `stages/lib/recipe/tables.py`. Bounds that depend on another key are
in `rules.py` beside it; their messages name both keys.
"""
FIELD = re.compile(r"    (\w+): .*")
COMMENT = re.compile(r"(?:  |^    )#(?: type: ignore\[[^]]*\])?(.*)")
TOP = ("save",)  # the keys that stand above all tables


def classes() -> Iterator[tuple[str, type]]:
    """Yield each table's head in a recipe and its class, in the order of `Recipe`; the sources after `[data]`."""
    for name, hint in typing.get_type_hints(Recipe).items():
        found = [each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)]
        if found:
            yield f"[{name}]", typing.cast(type, found[0])
        if name == "data":
            yield "[[data.sources]]", Source


def comments(table: type) -> dict[str, str]:
    """Return what the comments in `recipe/tables.py` say of each key of a table."""
    body = Path(tables.__file__).read_text().partition(f"\nclass {table.__name__}:")[2].partition("\n\n\n")[0]
    said: dict[str, str] = {}
    name = ""
    for line in body.partition("\n    def ")[0].splitlines():
        if field := FIELD.fullmatch(line):
            name = field[1]
            said[name] = ""
        if name and (comment := COMMENT.search(line)):
            said[name] = f"{said[name]} {comment[1].strip().removeprefix('# ')}".strip()
    return said


def spelled(hint: Any) -> str:
    """Return what a value of a type may be, as the page has it."""
    parts = [spelled(each) for each in typing.get_args(hint) if isinstance(each, type) or typing.get_origin(each)]
    match typing.get_origin(hint) or hint:
        case typing.Annotated:
            bounds = [each.words.partition(":")[0] for each in typing.get_args(hint) if isinstance(each, Bound)]
            return ", ".join([spelled(hint.__origin__), *bounds])
        case typing.Literal:
            return ", ".join(f"`{json.dumps(value)}`" for value in typing.get_args(hint))
        case builtins.list:
            return " of ".join(["list", *parts])
        case builtins.dict:
            return f"table of {parts[1]}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): ""}
    return names[hint] if hint in names else " or ".join(part for part in parts if part)


def default(field: dataclasses.Field[Any]) -> str:
    """Return a key's default, as the page has it: empty where there is none, `none` where it is that nothing is set."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return ""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "none" if value is None else f"`{json.dumps(value)}`"


def rows(table: type, names: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the page's table with the keys `names` of a table of the recipe."""
    hints, said = typing.get_type_hints(table, include_extras=True), comments(table)
    fields = {field.name: field for field in dataclasses.fields(table)}
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name in names:
        cells = (f"`{name}`", spelled(hints[name]), default(fields[name]), said[name])
        yield "| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |"


def page() -> str:
    """Return the page."""
    lines = [HEAD, "## Above all tables", "", *rows(Recipe, TOP), ""]
    for head, table in classes():
        about = " ".join((table.__doc__ or "").split()).partition("`: ")[2]
        names = [field.name for field in dataclasses.fields(table) if field.name != "sources"]  # a table of its own
        lines += [f"## `{head}`", "", f"{about[:1].upper()}{about[1:]}", "", *rows(table, names), ""]
    return "\n".join(lines)


def test_the_page_lists_every_key_as_the_tables_have_it() -> None:
    assert PAGE.read_text() == page(), "Run: python -m tests.test_keys"


@pytest.mark.parametrize(
    ("head", "line"),
    [
        ("Above", "| `save` | list of"),
        (
            "`[[data.sources]]`",
            '| `hub` | `""`, `"modelscope"` | `""` | which hub `name` is on; "": the Hugging Face hub,',
        ),
        (
            "`[[data.sources]]`",
            "| `shares` | list of number | `[]` | one a set in `use`, together at most 1: the hash of a",
        ),
        ("`[grpo]`", "| `epsilon_high` | number, over 0 |  | and clipped above 1 + epsilon_high |"),
        (
            "`[grpo]`",
            "| `sampled_prompts` | whole number, 1 or more | none | a step samples so many prompts and trains on",
        ),
        ("`[gguf]`", "| `max_mean_kl` | table of number, over 0 | `{}` | nats, by type,"),
        ("`[merge]`", '| `dtype` | `"bfloat16"`, `"float16"` |  |  |'),
        ("`[score_base]`", "| `completions_per_problem` | whole number, 2 or more |  |  |"),
    ],
)
def test_a_key_has_its_values_default_and_meaning(head: str, line: str) -> None:
    assert f"\n{line}" in PAGE.read_text().partition(f"## {head}")[2].partition("\n## ")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_key_of_a_recipe_stands_on_the_page(path: Path) -> None:
    sections = dict(re.findall(r"^## `(.*?)`\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
    recipe = tomllib.loads(path.read_text())
    recipe["[data.sources]"] = {key: 0 for source in recipe["data"].pop("sources") for key in source}
    used = {f"[{name}]": table for name, table in recipe.items() if isinstance(table, dict)}
    assert {
        f"{head} {key}" for head, table in used.items() for key in table if f"\n| `{key}` |" not in sections[head]
    } == set()


if __name__ == "__main__":
    PAGE.write_text(page())
