"""Reading a recipe: strictly, from TOML into the tables."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from stages.lib.answers import formats
from stages.lib.errors import UserError, nearest
from stages.lib.recipe.rules import check_recipe
from stages.lib.recipe.tables import Recipe, is_hub_name
from stages.lib.recipe.toml import tables_in


def read_recipe(path: Path, base_model: Path | None = None) -> Recipe:
    """Read a recipe. `base_model` is the artifact of the base-model stage, for one that makes its own model.

    Raises `UserError`, naming file, key and nearest match, for an unknown, missing or mistyped key, for a number out of
    its bounds, and for what contradicts itself across tables.
    """
    try:
        tables = tables_in(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such recipe. Run: make help") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    try:
        recipe: Recipe = build_table(Recipe, tables, "", given={"path": path, "model_folder": None})
        try:
            own_prompt = formats.get(recipe.format.name).system_prompt
        except UserError as error:
            raise UserError(f"[format] name: {error.message}") from error
        answer_format = dataclasses.replace(recipe.format, system_prompt=recipe.format.system_prompt or own_prompt)
        folder = folder_on_disk(recipe.model.name, base_model)
        recipe = dataclasses.replace(recipe, format=answer_format, model_folder=folder)
        check_recipe(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error.message}") from error
    return recipe


def folder_on_disk(name: str, base_model: Path | None) -> Path | None:
    """Return where the model `name` of a recipe lies on this disk; None: on the hub, or base-model has not made it."""
    if name == "base-model":
        return base_model / "model" if base_model else None
    return None if is_hub_name(name) else Path(name)


def build_table(kind: Any, table: dict[str, Any], where: str, given: dict[str, Any] | None = None) -> Any:
    """Return `kind`, a dataclass, from a TOML table; `where` is the table's dotted name, "" for the whole file."""
    given = given or {}
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in given}
    for key, value in table.items():
        if key not in fields:
            name = f"[{where}] {key}" if where else f"[{key}]" if isinstance(value, dict) else key
            raise UserError(f"{name} is not known{nearest(key, fields)}; known: {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(kind, include_extras=True)
    values = dict(given)
    for name, field in fields.items():
        spelling = f"[{where}] {name}" if where else name if name == "save" else f"[{name}]"
        if name in table:
            values[name] = convert_value(table[name], hints[name], f"{where}.{name}".lstrip("."), spelling)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{spelling} is missing")
    return kind(**values)


def convert_value(value: Any, hint: Any, where: str, spelling: str) -> Any:
    """Return `value` as the type `hint` asks for, within its bound, or raise `UserError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    message = f"{spelling} = {value!r}; expected"
    if origin is Annotated:
        kind, bound = arguments
        value = convert_value(value, kind, where, spelling)
        if not bound.holds(value):
            raise UserError(f"{message} {bound.words}")
        return value
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if len(kinds) == 1:
            return convert_value(value, kinds[0], where, spelling)
        for kind in kinds:
            if typing.get_origin(kind) is type(value):
                return convert_value(value, kind, where, spelling)
        if type(value) not in kinds:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{message} one of {names}; found {type(value).__name__}")
        return value
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{message} one of {', '.join(arguments)}{nearest(str(value), arguments)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{message} a list")
        return [convert_value(item, arguments[0], where, f"{spelling}, item {n}") for n, item in enumerate(value, 1)]
    if origin is dict or dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{message} a table [{where}]")
        if origin is not dict:
            return build_table(hint, value, where)
        return {
            key: convert_value(item, arguments[1], f"{where}.{key}", f"[{where}] {key}") for key, item in value.items()
        }
    if hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if type(value) is not hint:
        raise UserError(f"{message} {hint.__name__}, found {type(value).__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{spelling} = {value!r}; expected a finite number")
    return value
