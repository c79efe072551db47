"""Draw the page of a run, report.html, and sum it up: what was made, how well it answers, where it is."""

import os
from pathlib import Path

import click

from stages.lib import options
from stages.lib.artifact.manifest import write_whole
from stages.lib.disk import naming_disk_faults
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.report import page
from stages.lib.report.summary import summary


@click.command(help=__doc__)
@options.recipe
@click.option("--artifacts", type=options.FOLDER, required=True, help="The folder with a folder for each stage.")
@click.option("--price", type=click.FloatRange(min=0), help="What the machine costs an hour.")
def main(recipe: Path, artifacts: Path, price: float | None) -> None:
    run_recipe = read_recipe(recipe)
    if not artifacts.is_dir():
        raise UserError(f"{artifacts}: there is no such folder, so nothing of this recipe was made yet. Run: make all")
    path = artifacts / "report.html"
    text = page.write(run_recipe, artifacts, price)
    with naming_disk_faults(path):
        write_whole(path, text.encode())
    color = False if os.environ.get("NO_COLOR") else None  # None: on a terminal
    for heading, lines in summary(run_recipe, artifacts):
        click.echo(click.style(heading, bold=True), color=color)
        click.echo("\n".join(f"  {line}" for line in lines))


if __name__ == "__main__":
    main()
