"""Run public benchmarks with lm-eval, and show the base and the result side by side."""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.answers import stats
from stages.lib.artifact.environment import environment_now
from stages.lib.artifact.manifest import read_manifest, write_whole
from stages.lib.benchmark.harness import Asked, Judged, checked_names, installed, run_apart
from stages.lib.errors import UserError
from stages.lib.gguf.convert import convert_model, name_of, quantize
from stages.lib.model.engine import require_engine
from stages.lib.model.files import whole_model_folder
from stages.lib.model.locate import locate_model
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe
from stages.lib.report.terminal import aligned

SOURCES = ("f32", "f16", "bf16")  # types that the converter writes itself


@click.command(help=__doc__)
@options.recipe
@options.reads("merge")
@options.reads("gguf", required=False)
@options.base_model
@click.option("--artifacts", type=options.FOLDER, required=True, help="The folder with a folder for each stage.")
@click.option("--tasks", required=True, help="Names of lm-eval's tasks, with commas between them.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many problems of each task.")
@click.option("--local", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="A folder with local copies of the tasks' datasets, and with tasks of one's own.")  # fmt: skip
@click.option("--of", type=click.Choice(["merged", "gguf"]), default="merged", help="Which form of the result.")
@click.option("--chat", is_flag=True, help="Prompt by the chat template, with the system prompt.")
def main(recipe: Path, merge: Path, gguf: Path | None, base_model: Path | None, artifacts: Path, **asked: Any) -> None:
    run_recipe = read_recipe(recipe, base_model)
    tasks = checked_names(asked["tasks"])
    system_prompt = run_recipe.format.system_prompt if asked["chat"] else None
    what = Asked(tasks, asked["limit"], asked["local"], system_prompt, run_recipe.infer.batch_size)
    read_manifest(merge, "merge", "model/*")
    harness = installed()
    with tempfile.TemporaryDirectory(prefix="temper-") as work:
        if asked["of"] == "gguf":
            judged = in_llama_server(run_recipe, gguf, Path(work))
        else:
            judged = as_weights(run_recipe, merge)
        found = {name: run_apart(model, what, harness) for name, model in judged.items()}
    rows = compared(found["base"], found["result"])
    result = {
        "of": asked["of"], "tasks": tasks, "limit": what.limit, "chat": asked["chat"], "rows": rows,
        "lm_eval": found["base"]["version"], "engine": judged["result"].engine, "environment": environment_now(),
    }  # fmt: skip
    path = artifacts / f"benchmark-{asked['of']}.json"
    write_whole(path, json.dumps(result, indent=1).encode())
    click.echo(table(rows))
    click.echo(f"lm-eval {result['lm_eval']}, engine {result['engine']}; {path}")


def as_weights(recipe: Recipe, merge: Path) -> dict[str, Judged]:
    """Return base and merged model, for vLLM with engine "unsloth", else for transformers."""
    name, revision = locate_model(recipe)
    tokens = recipe.ollama.num_ctx
    if recipe.model.engine == "unsloth":
        require_engine(recipe)
        share = recipe.vllm.memory_share
        base = Judged("vllm", name, revision, recipe.model.dtype, share, tokens)
        return {"base": base, "result": Judged("vllm", str(merge / "model"), None, recipe.merge.dtype, share, tokens)}
    # The merged model's tokenizer for both: it is the base's, read as it was in training.
    base = Judged("hf", name, revision, tokenizer=str(merge / "model"))
    return {"base": base, "result": Judged("hf", str(merge / "model"))}


def in_llama_server(recipe: Recipe, gguf: Path | None, work: Path) -> dict[str, Judged]:
    """Return the recommended GGUF file, and the base converted to the same type in the folder `work`."""
    if gguf is None:
        raise UserError("--of gguf needs the folder of the GGUF files. Run: make benchmark OF=gguf")
    kind = recipe.ollama.quantization.lower()
    read_manifest(gguf, "gguf", f"model.{kind}.gguf")
    base = whole_model_folder(*locate_model(recipe))
    made = work / f"base.{kind}.gguf"
    source = made if kind in SOURCES else work / "base.f16.gguf"
    convert_model(base, source, kind if kind in SOURCES else "f16", name_of(recipe))
    if source != made:
        quantize(source, made, kind)
    return {"base": Judged("gguf", str(made)), "result": Judged("gguf", str(gguf / f"model.{kind}.gguf"))}


def compared(base: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each metric of each task: both values, and for right or wrong answers the paired test."""
    rows = []
    for task, metrics in result["metrics"].items():
        for metric, value in metrics.items():
            row = {"task": task, "metric": metric, "base": base["metrics"][task][metric], "result": value}
            before, after = (each["values"].get(task, {}).get(metric, {}) for each in (base, result))
            row["problems"] = len(after) or result["counts"].get(task, 0)
            if after and before.keys() == after.keys() and {*before.values(), *after.values()} <= {0.0, 1.0}:
                gained = sum(after[key] > before[key] for key in after)
                lost = sum(after[key] < before[key] for key in after)
                row |= {"gained": gained, "lost": lost, "p": stats.mcnemar(gained, lost)}
                row |= {
                    f"{name}_interval": list(stats.wilson(sum(own.values()), len(own)))
                    for name, own in (("base", before), ("result", after))
                }
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each metric: base and result, with intervals and the paired test where there are any."""
    lines = [("task", "metric", "problems", "base", "result", "gained/lost", "McNemar")]
    for row in rows:
        values = [
            f"{row[name]:.1%} ({row[f'{name}_interval'][0]:.1%} to {row[f'{name}_interval'][1]:.1%})"
            if f"{name}_interval" in row else f"{row[name]:.4g}"
            for name in ("base", "result")
        ]  # fmt: skip
        test = (f"{row['gained']}/{row['lost']}", stats.p_text(row["p"])) if "p" in row else ("", "")
        lines.append((row["task"], row["metric"], str(row["problems"]), *values, *test))
    return "\n".join(aligned(lines))


if __name__ == "__main__":
    main()
