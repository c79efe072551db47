"""The options of the stages: one function an option, so that all stages and the Makefile agree."""

from collections.abc import Callable
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path, file_okay=False)


def recipe(command: Callable) -> Callable:
    """Add `--recipe FILE`."""
    kind = click.Path(path_type=Path, exists=True, dir_okay=False)
    return click.option("--recipe", type=kind, required=True, help="The recipe, a TOML file in recipes/.")(command)


def out(command: Callable) -> Callable:
    """Add `--out FOLDER`, the artifact that the stage writes."""
    text = "The folder to write; it appears when whole."
    return click.option("--out", type=FOLDER, required=True, help=text)(command)


def reads(stage: str, *, required: bool = True) -> Callable[[Callable], Callable]:
    """Add `--STAGE FOLDER`, the finished artifact of another stage."""
    text = f"The finished output of {stage}."
    return click.option(f"--{stage}", type=FOLDER, required=required, help=text)


def base_model(command: Callable) -> Callable:
    """Add `--base-model FOLDER`: only recipes with a [base_model] table have one."""
    text = "The finished output of base-model, for a recipe with a [base_model] table."
    return click.option("--base-model", type=FOLDER, help=text)(command)
