"""Check, before a paid run, that this machine can take a recipe to its end, and say what to do if it can't."""

import concurrent.futures
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from stages.lib import options
from stages.lib.machine import containers, copies, disk, exchange, gpu, hub, rehearsed
from stages.lib.machine.findings import Finding
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe, is_hub_name


@click.command(help=__doc__)
@options.recipe
def main(recipe: Path) -> None:
    failed = 0
    for finding in check_machine(read_recipe(recipe)):
        failed += finding.status == "fail"
        click.echo(finding.line)
    if failed:
        click.echo(f"doctor: {failed} thing{'s' if failed > 1 else ''} to fix before make all RECIPE={recipe.stem}")
        raise SystemExit(1)
    click.echo(f"doctor: nothing stands in the way of make all RECIPE={recipe.stem}")


def check_machine(recipe: Recipe) -> Iterator[Finding]:
    """Yield the findings on this machine for `recipe`: in 10 s, but for several GPUs and the rehearsal."""
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        devices_asked = pool.submit(gpu.ask_devices, recipe)
        engine = containers.docker_info()
        in_container = engine[0] == 0 and os.environ.get("RUNTIME") != "local"
        cache = copies.hub_cache(in_container=in_container)
        model = copies.local_model(recipe, cache)
        tokenizer = copies.start_tokenizer_check(recipe, model, cache)
        rehearsal = rehearsed.start_rehearsal(recipe, cache)
        data_findings, urls = hub.data_places(recipe)
        datasets = list(urls)
        name = recipe.model.name
        if model is None and is_hub_name(name) and not recipe.model.hub:
            urls[name] = f"{hub.endpoint()}/{name}/resolve/{recipe.model.revision}/config.json"
        asked = pool.submit(hub.ask_hub, urls)
        shape, without = copies.shape_of_model(recipe, model)
        yield from gpu.gpu_findings(recipe, shape, devices_asked.result())
        cards = gpu.chosen_cards(devices_asked.result())
        exchanged = start_exchange(cards, in_container)
        if len(cards) > 1:
            yield exchange.cards_finding(cards)
        if shape is None:
            yield Finding("warn", "estimate", f"none of memory and disk: {without}", gpu.WATCH)
        yield from containers.docker_findings(recipe, engine)
        yield containers.shared_memory_finding(recipe)
        if shape is not None:
            yield containers.system_memory_finding(shape)
            yield from disk.disk_findings(recipe, shape, model, cache)
        yield from disk.image_room(recipe, engine)
        answers = asked.result()
    yield hub.model_finding(recipe, model, answers)
    yield from data_findings
    unpinned = {source.name for source in recipe.data.sources if not source.revision}
    for name in datasets:
        finding = hub.hub_finding("data", name, answers[name])
        yield hub.unpinned_finding(finding, answers[name].commit) if name in unpinned else finding
    yield hub.token_finding(recipe, model, answers)
    yield hub.clock_finding(answers)
    yield copies.tokenizer_finding(tokenizer, recipe, started + copies.TOKENIZER_SECONDS)
    yield rehearsed.rehearsal_finding(rehearsal, recipe, started + rehearsed.REHEARSAL_SECONDS)
    if exchanged is not None:
        yield from exchange.findings(exchanged)


def start_exchange(cards: Sequence[gpu.Card], in_container: bool) -> exchange.Started | None:
    """Start the exchange between several GPUs, or several processes on a CPU (PROCESSES); None where there is one."""
    if len(cards) > 1:
        return exchange.start(len(cards), "nccl", in_container=in_container)
    processes = os.environ.get("PROCESSES", "")
    return exchange.start(int(processes), "gloo") if processes.isdigit() and int(processes) > 1 else None


if __name__ == "__main__":
    main()
