"""Look whether this machine can carry a recipe to its end, before the run is paid for, and say what to do if not."""

import concurrent.futures
import os
import time
from collections.abc import Iterator
from pathlib import Path

import click

from stages.lib import options
from stages.lib.machine.containers import docker_findings, docker_info, shared_memory_finding, system_memory_finding
from stages.lib.machine.copies import (
    TOKENIZER_SECONDS,
    hub_cache,
    local_model,
    shape_of_model,
    start_tokenizer_check,
    tokenizer_finding,
)
from stages.lib.machine.disk import disk_findings, image_room
from stages.lib.machine.findings import Finding
from stages.lib.machine.gpu import WATCH, ask_devices, gpu_findings
from stages.lib.machine.hub import (
    ask_hub,
    clock_finding,
    data_places,
    endpoint,
    hub_finding,
    model_finding,
    token_finding,
    unpinned_finding,
)
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe, is_hub_name


@click.command(help=__doc__)
@options.recipe
def main(recipe: Path) -> None:
    failed = 0
    for finding in examine(read_recipe(recipe)):
        failed += finding.status == "fail"
        click.echo(finding.line)
    if failed:
        click.echo(f"doctor: {failed} thing{'s' if failed > 1 else ''} to mend before make all RECIPE={recipe.stem}")
        raise SystemExit(1)
    click.echo(f"doctor: nothing stands in the way of make all RECIPE={recipe.stem}")


def examine(recipe: Recipe) -> Iterator[Finding]:
    """Yield the findings on this machine for `recipe`, in less than 10 s."""
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        devices_asked = pool.submit(ask_devices, recipe)
        engine = docker_info()
        cache = hub_cache(in_container=engine[0] == 0 and os.environ.get("RUNTIME") != "local")
        model = local_model(recipe, cache)
        tokenizer = start_tokenizer_check(recipe, model, cache)
        data_findings, urls = data_places(recipe)
        datasets = list(urls)
        if model is None and is_hub_name(recipe.model.name):
            urls[recipe.model.name] = f"{endpoint()}/{recipe.model.name}/resolve/{recipe.model.revision}/config.json"
        asked = pool.submit(ask_hub, urls)
        shape, without = shape_of_model(recipe, model)
        yield from gpu_findings(recipe, shape, devices_asked.result())
        if shape is None:
            yield Finding("warn", "estimate", f"none of memory and disk: {without}", WATCH)
        yield from docker_findings(recipe, engine)
        yield shared_memory_finding(recipe)
        if shape is not None:
            yield system_memory_finding(shape)
            yield from disk_findings(recipe, shape, model, cache)
        yield from image_room(recipe, engine)
        answers = asked.result()
    yield model_finding(recipe, model, answers)
    yield from data_findings
    unpinned = {source.name for source in recipe.data.sources if not source.revision}
    for name in datasets:
        finding = hub_finding("data", name, answers[name])
        yield unpinned_finding(finding, answers[name].commit) if name in unpinned else finding
    yield token_finding(recipe, model, answers)
    yield clock_finding(answers)
    yield tokenizer_finding(tokenizer, recipe, started + TOKENIZER_SECONDS)


if __name__ == "__main__":
    main()
