"""Turn problems with checkable answers into the sft, grpo and eval sets: one answer form, no duplicates, no leaks.

The first rows of each source are read ahead and shown; then all are read once. Each is checked, written to a draft of
its sets and fingerprinted. The fingerprints show which rows are duplicates or too close to eval problems, and the
drafts are copied without those. So memory grows by about 100 bytes a row and by the n-grams of the eval problems, not
by the length of the texts; only a JSON list is in memory whole. Where several processes share the work, each reads its
lines from the file and has drafts of its own: no texts are sent between processes.
"""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, cast

import click

from stages.lib import options
from stages.lib.answers.sandbox import check_sandbox
from stages.lib.artifact.folder import write_artifact
from stages.lib.artifact.manifest import read_manifest
from stages.lib.bounded import process_pool
from stages.lib.data.place import files_of_source
from stages.lib.data.preview import preview, rows_as_read, rows_each
from stages.lib.data.rows import label
from stages.lib.data.ruler import Ruler
from stages.lib.data.sets import Draft, helpers
from stages.lib.data.shapes import as_list
from stages.lib.errors import UserError
from stages.lib.model.dress import WITHOUT, rehearse
from stages.lib.model.locate import local_model
from stages.lib.model.rehearsal import check_chat_template, check_completion, check_tokenizer, refuse_base
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import PACKED_SUFFIXES, Recipe, is_hub_name
from stages.lib.report import terminal
from stages.lib.report.figures import PrepareDataFigures, Rehearsal
from stages.lib.rewards.own import is_own
from stages.lib.rewards.trial import try_rewards

MANY_EPOCHS = 100  # of one set, before that is a warning
# Of base-model: all but the weights, which change no row.
BASE_MODEL_FILES = ("problems/*", "model/*.json", "model/*.jinja", "model/*.model")


@click.command(help=__doc__.partition("\n")[0])
@options.recipe
@options.base_model
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    help="A local copy, file or folder, of what the recipe names on the hub.",
)
@options.out
def main(recipe: Path, base_model: Path | None, data: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe, base_model)
    sources = run_recipe.data.sources
    if data and not any(is_hub_name(source.name) for source in sources):
        raise UserError(f"--data {data}: {recipe} names nothing on the hub; expected a local copy of such a dataset")
    if base_model:
        read_manifest(base_model, "base-model")  # refuses an unfinished one before its files are looked for
    source_files = [files_of_source(source, base_model, data) for source in sources]
    raw = {label(source, file): file for source, files in zip(sources, source_files, strict=True) for file in files}
    swelling = (".parquet", *PACKED_SUFFIXES)
    bytes_on_disk = ((file.suffix.lower() in swelling, file.stat().st_size) for file in raw.values())
    room = sum((32 if swells else 8) * size for swells, size in bytes_on_disk) + (1 << 26)
    if base_model:  # its problems are an input
        raw = {name: file for name, file in raw.items() if not file.is_relative_to(base_model)}
    folders = [path for path in (data, *(Path(source.name) for source in sources)) if path and path.is_dir()]
    folders += [file.parent for file in raw.values() if any(file.is_relative_to(folder) for folder in folders)]
    raw |= {str(folder): folder for folder in folders} | local_model(run_recipe)
    tables = {
        **run_recipe.tables("data", "format", "model"),
        "sft": {"max_tokens": run_recipe.sft.max_tokens},
        "lora": {"target_modules": run_recipe.lora.target_modules},
        "save": ["lora"] if "lora" in run_recipe.save else [],
    }
    if any(is_own(name) for name in run_recipe.rewards.functions):
        tables["rewards"] = {"whole_rows": True}  # the grpo set keeps each row's own columns for them
    inputs = {"base-model": (base_model, BASE_MODEL_FILES)} if base_model else {}
    if any(source.answers == "python" for source in sources):
        check_sandbox()  # before hours of training: rewards and infer run programs in it
    with write_artifact(out, "prepare-data", tables, inputs, sources=raw, room_bytes=room) as run:
        with helpers(source_files) as pool:  # they start while this process loads the tokenizer
            refuse_base(run_recipe)
            tokenizer = load_tokenizer(run_recipe)
            with ThreadPoolExecutor(2) as beside:  # llama.cpp's converter takes seconds to start
                tokenizer_check = beside.submit(check_tokenizer, run_recipe, tokenizer)
                check_chat_template(run_recipe, tokenizer)
                check_completion(run_recipe, tokenizer)
                rehearsal = beside.submit(rehearse_beside, run_recipe) if run_recipe.model.rehearsal else None
                if rehearsal and pool:
                    rehearsal.result()  # of a large source first this: together they would take over 1 GB
                ruler = Ruler(tokenizer, run_recipe.format.system_prompt)
                metrics = prepare(run_recipe, source_files, ruler, run.folder, pool)
                try_rewards(run_recipe, run.folder / "grpo.jsonl")
                tokenizer_check.result()
                if rehearsal and (figures := rehearsal.result()):
                    metrics["rehearsal"] = cast(Rehearsal, figures)
        run.metrics.update(metrics)
        click.echo(terminal.prepare_data(metrics))


def rehearse_beside(recipe: Recipe) -> dict[str, float]:
    """Return the figures of `rehearse`, from a process of its own: it needs torch, and llama.cpp may end it."""
    with process_pool(1) as pool:
        try:
            return pool.submit(rehearse, recipe).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{recipe.path}: a small copy of {recipe.model.name} ended the process that trained, merged and "
                f"converted it; the reason is above, of llama.cpp or of torch. Training would end so as well. Choose "
                f"another base model. {WITHOUT}"
            ) from error


def prepare(
    recipe: Recipe, located: list[list[Path]], ruler: Ruler, folder: Path, pool: ProcessPoolExecutor | None
) -> PrepareDataFigures:
    """Write sft.jsonl, grpo.jsonl, eval.jsonl and removed.jsonl under `folder`; return the metrics.

    `located` are the files of each source, none for one from the hub; `pool` are their `helpers`. Raises `UserError`
    for a row to refuse and for a set with too few rows.
    """
    sources = list(zip(recipe.data.sources, located, strict=True))
    count = rows_each(len(sources))
    previews = [preview(source, files, recipe.format.name, count) for source, files in sources]
    for line in rows_as_read(previews):
        click.echo(line)
    for (source, _), seen in zip(sources, previews, strict=True):
        for name in seen.lost_columns:
            together = json.dumps([name, *as_list(source.question)], ensure_ascii=False)
            click.echo(
                f"warning: {source.name} ({source.split}): column {name!r} is not read, and by its name it belongs to "
                f"the question. If it does: question = {together}",
                err=True,
            )
    draft = Draft(folder, ruler, recipe, tuple(dict.fromkeys(text for seen in previews for text in seen.instructions)))
    read: list[Any] = [draft.add_source(*each, pool) for each in sources]
    sets = draft.finish()
    for warning in draft.warnings:
        click.echo(f"warning: {warning}", err=True)
    refuse_small(recipe, sets)
    say_epochs(recipe, sets)
    return {"sources": read, "sets": sets}


def say_epochs(recipe: Recipe, sets: dict[str, Any]) -> None:
    """Print how often SFT and GRPO go through their rows, as a warning from `MANY_EPOCHS` on."""
    for name, steps, rows_per_step, packing in (
        ("sft", recipe.sft.steps, recipe.sft.batch_size, recipe.sft.packing),
        ("grpo", recipe.grpo.steps, recipe.grpo.prompts_per_step, False),
    ):
        rows = sets[name]["rows"]
        line = terminal.epochs(name, steps, rows_per_step, rows, packing)
        if steps * rows_per_step < MANY_EPOCHS * rows:
            click.echo(line)
        else:
            click.echo(
                f"warning: {line}: the model learns these by heart. Take more rows, or fewer [{name}] steps", err=True
            )


def refuse_small(recipe: Recipe, sets: dict[str, Any]) -> None:
    """Raise `UserError` when a set has fewer rows than a later stage takes at once."""
    asked = {
        "[grpo] prompts_per_step": ("grpo", recipe.grpo.prompts_per_step),
        "[merge] prompts": ("eval", recipe.merge.prompts),
        "[gguf] prompts": ("eval", recipe.gguf.prompts),
        "[gguf] importance_prompts": ("sft", recipe.gguf.importance_prompts),
    }
    lines = "".join(
        f"\n  {knob} = {count}, and the {name} set has {sets[name]['rows']} rows"
        for knob, (name, count) in asked.items()
        if count > sets[name]["rows"]
    )
    if lines:
        raise UserError(
            f"{recipe.path}: too few rows for what later stages take at once:{lines}\nLower these, or give that set "
            f"more rows: another file, larger shares"
        )


if __name__ == "__main__":
    # Tokenizers need no torch, and its import by transformers takes longer than most datasets do.
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's sign for a module that can't be imported
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    main()
