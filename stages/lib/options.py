"""The options of the stages: one function an option, so that all stages and the Makefile agree."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from stages.lib.disk import naming_disk_faults

FOLDER = click.Path(path_type=Path, file_okay=False)


def recipe(command: Callable) -> Callable:
    """Add `--recipe FILE`."""
    kind = click.Path(path_type=Path, exists=True, dir_okay=False)
    return click.option("--recipe", type=kind, required=True, help="The recipe, a TOML file in recipes/.")(command)


def out(command: Callable) -> Callable:
    """Add `--out FOLDER`, the artifact that the stage writes. A fault of its disk is a `UserError`."""

    @functools.wraps(command)
    def writing(*arguments: Any, out: Path, **named: Any) -> Any:
        with naming_disk_faults(out):
            return command(*arguments, out=out, **named)

    text = "The folder to write; it appears when whole."
    return click.option("--out", type=FOLDER, required=True, help=text)(writing)


def reads(stage: str, *, required: bool = True) -> Callable[[Callable], Callable]:
    """Add `--STAGE FOLDER`, the finished artifact of another stage."""
    text = f"The finished output of {stage}."
    return click.option(f"--{stage}", type=FOLDER, required=required, help=text)


def base_model(command: Callable) -> Callable:
    """Add `--base-model FOLDER`: only recipes with a [base_model] table have one."""
    text = "The finished output of base-model, for a recipe with a [base_model] table."
    return click.option("--base-model", type=FOLDER, help=text)(command)
