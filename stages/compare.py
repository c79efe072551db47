"""Compare finished runs: what differs in their recipes, accuracy on the problems they share, time and cost."""

from pathlib import Path

import click

from stages.lib import options
from stages.lib.artifact.manifest import write_whole
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.report import comparison

RECIPES = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command(help=__doc__)
@click.option("--recipes", type=RECIPES, multiple=True, required=True, help="A recipe; twice or more.")
@click.option(
    "--runs", "artifacts", type=options.FOLDER, required=True, help="The folder with a folder for each recipe."
)
@click.option("--price", type=click.FloatRange(min=0), help="What the machine costs an hour.")
def main(recipes: tuple[Path, ...], artifacts: Path, price: float | None) -> None:
    names = dict.fromkeys(path.stem for path in recipes)
    if len(names) < 2 or len(names) < len(recipes):
        raise UserError(
            f"{' '.join(path.stem for path in recipes)}: expected two or more recipes, each once. "
            'Run: make compare RECIPES="one another"'
        )
    runs = [comparison.read_run(read_recipe(path), artifacts / path.stem) for path in recipes]
    page = artifacts / "comparison.html"
    write_whole(page, comparison.write(runs, price).encode())
    click.echo(comparison.text(runs, price))
    click.echo(f"\n{page}: the same as a page. Open it in a browser; it fetches nothing")


if __name__ == "__main__":
    main()
