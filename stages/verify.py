"""Compare all finished artifacts of a recipe with their manifests: every file byte for byte, and all of one run."""

from pathlib import Path

import click

from stages.lib import options
from stages.lib.artifact.digests import sha256_of
from stages.lib.artifact.manifest import faults, read_manifest, refuse_other_run
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe

STAGES = ("prepare-data", "sft", "grpo", "infer", "merge", "gguf", "ollama-modelfile")


@click.command(help=__doc__)
@options.recipe
@click.option("--artifacts", type=options.FOLDER, required=True, help="The folder with a folder for each stage.")
@click.option("--quick", is_flag=True, help="Compare sizes only, and read no file.")
def main(recipe: Path, artifacts: Path, quick: bool) -> None:
    stages = [*(["base-model"] if read_recipe(recipe).base_model else []), *STAGES]
    stages += ["score-base"] if (artifacts / "score-base").is_dir() else []  # run by hand
    manifests, bad = {}, []
    for stage in stages:
        folder = artifacts / stage
        try:
            manifests[stage] = read_manifest(folder, stage)
            files = manifests[stage]["files"]
            # Every file is read: no digest is remembered, and two names of one inode are read twice.
            if wrong := [] if quick else list(faults(folder, files, sha256_of)):
                raise UserError(f"{'; '.join(wrong)}, as {stage} wrote it. Delete {folder} and run: make {stage}")
        except UserError as error:
            bad.append(stage)
            click.echo(f"{stage}: {error.message}", err=True)
        else:
            size = sum(entry["bytes"] for entry in files.values()) / 1e6
            verdict = "have the size" if quick else "are byte for byte what"
            click.echo(f"{stage}: {len(files)} files, {size:,.1f} MB, {verdict} the manifest states")
    if bad:
        raise UserError(f"{artifacts}: {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not whole, as said above")
    if "score-base" not in manifests["grpo"]["inputs"]:
        manifests.pop("score-base", None)  # nothing was made from it: it may be of another run
    refuse_other_run(manifests, {stage: artifacts / stage for stage in stages})
    click.echo(f"{artifacts}: whole, and all of one run")


if __name__ == "__main__":
    main()
