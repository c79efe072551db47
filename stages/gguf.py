"""Make GGUF files of the merged model, and prove that each answers like it."""

import contextlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.answers import formats, stats
from stages.lib.answers.grade import mark
from stages.lib.artifact.folder import Run, write_artifact
from stages.lib.artifact.manifest import read_manifest, write_json
from stages.lib.distance import Text, compare_logits, spread_positions, store_logits
from stages.lib.errors import UserError
from stages.lib.gguf import imatrix
from stages.lib.gguf.convert import convert_lora, convert_model, quantize
from stages.lib.gguf.file import Loaded
from stages.lib.gguf.tokens import Vocabulary, verify_end, verify_prompt
from stages.lib.gguf.types import GGUF_TYPES
from stages.lib.jsonl import first_rows
from stages.lib.model.files import refuse_quantized, vocabulary_size, whole_model_folder
from stages.lib.model.locate import locate_model
from stages.lib.model.reference import load_reference, model_greedy, model_logits, stated_ends
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Gguf, Recipe

SEQUENCES = 8  # completions at once
ADAPTER = "adapter-f16.gguf"
COLUMNS = (
    "type",
    "MB",
    "mean KL",
    "p99 KL",
    "max KL",
    "same top",
    "perplexity",
    "same text",
    "right",
    "flips",
    "ended",
)


@click.command(help=__doc__)
@options.recipe
@options.reads("merge")
@options.reads("prepare-data")
@options.reads("grpo")
@options.base_model
@options.out
def main(recipe: Path, merge: Path, prepare_data: Path, grpo: Path, base_model: Path | None, out: Path) -> None:
    run_recipe = read_recipe(recipe, base_model)
    merged = read_manifest(merge, "merge")
    lora = grpo / "adapter" if "lora" in run_recipe.save else None
    room = room_bytes(run_recipe.gguf, merged["metrics"]["parameters"], merge / "model", lora)
    tables = run_recipe.tables("format", "gguf") | {
        "model": {"name": run_recipe.model.name},
        "infer": {"max_completion_tokens": run_recipe.infer.max_completion_tokens},
    }
    inputs = {"merge": merge, "prepare-data": prepare_data}
    if lora:
        tables |= {"save": ["lora"], "merge": {"max_mean_kl": run_recipe.merge.max_mean_kl}}
        inputs |= {"grpo": grpo, **({"base-model": base_model} if base_model else {})}
        base, revision = locate_model(run_recipe)
    with write_artifact(out, "gguf", tables, inputs, room_bytes=room) as run:
        refuse_quantized(merge / "model", "gguf")
        rows = first_rows(prepare_data / "eval.jsonl", run_recipe.gguf.prompts, "[gguf] prompts")
        run.checkpoints.mkdir(exist_ok=True)
        paths = make_files(merge / "model", prepare_data / "sft.jsonl", run_recipe, run)
        adapter = make_adapter(whole_model_folder(base, revision), lora, run_recipe, run) if lora else None
        run.metrics.update(prove(merge / "model", paths, rows, run_recipe, run, adapter))


def kinds(gguf: Gguf) -> list[str]:
    """Return the types asked for, in llama.cpp's spelling in lower case."""
    return [name.lower() for name in gguf.types]


def limits(gguf: Gguf) -> dict[str, float]:
    """Return the largest mean KL divergence (nats) allowed by type: the recipe's, or else `GGUF_TYPES`'."""
    return GGUF_TYPES | {name.lower(): limit for name, limit in gguf.max_mean_kl.items()}


def room_bytes(gguf: Gguf, parameters: int, model: Path, lora: Path | None = None) -> int:
    """Return what the stage writes at most for a model of so many `parameters` in the folder `model`.

    `lora` is the adapter's folder where it is made too: that takes the base in 16 bits for a while. A type's digit
    understates its bits: scales, embeddings in a finer type, and rows that are no multiple of 256 and so fall back to
    one. 3 bits more cover all of them.
    """
    tokenizer = sum(path.stat().st_size for path in model.iterdir() if path.suffix != ".safetensors")
    kept = [name for name in kinds(gguf) if name != source_kind(gguf)]
    digits = {name: int(re.findall(r"\d+", name)[0]) for name in kept}
    bits = [digit if digit > 8 else min(digit + 3, 9) for digit in digits.values()]
    files = parameters * 2 + sum(parameters * count // 8 for count in bits)
    reference = gguf.prompts * gguf.positions_per_prompt * vocabulary_size(model) * 4
    if lora and lora.is_dir():
        files += parameters * 2 + sum(path.stat().st_size for path in lora.iterdir()) + tokenizer + 1_000_000
    return files + reference + (len(kept) + 1) * (tokenizer + 1_000_000)


def source_kind(gguf: Gguf) -> str:
    """Return the 16-bit type all others are made from: f16, or bf16 where that alone is asked for.

    A bfloat16 weight fits in float16 to the last bit but for the very smallest and largest (under 6e-5, over 65504).
    """
    return "bf16" if "bf16" in kinds(gguf) and "f16" not in kinds(gguf) else "f16"


def make_files(model: Path, training: Path, recipe: Recipe, run: Run) -> dict[str, Path]:
    """Convert the model in the folder `model` to 16 bits once, and that to every type asked for. Return paths by type.

    `training` is prepare-data's sft.jsonl, for the importance matrix where the recipe asks for one. The 16-bit file
    stays only where it was asked for: else it lies with the checkpoints, which go at the end.
    """
    wanted, source = kinds(recipe.gguf), source_kind(recipe.gguf)
    paths = {kind: run.folder / f"model.{kind}.gguf" for kind in wanted}
    source_path = paths.get(source, run.checkpoints / f"model.{source}.gguf")
    started = time.monotonic()
    convert_model(model, source_path, source, name_of(recipe), run.checkpoints / "convert.log")
    run.seconds["convert"] = time.monotonic() - started
    importance = None
    if recipe.gguf.importance_prompts:
        started = time.monotonic()
        rows = first_rows(training, recipe.gguf.importance_prompts, "[gguf] importance_prompts")
        importance = weigh(model, source_path, rows)
        run.seconds["importance"] = time.monotonic() - started
    for kind in wanted:
        if kind != source:
            started = time.monotonic()
            quantize(source_path, paths[kind], kind, importance)
            run.seconds[f"quantize {kind}"] = time.monotonic() - started
    return paths


def name_of(recipe: Recipe) -> str:
    """Return what a GGUF file calls itself.

    llama.cpp reads Phi-3's control tokens rightly only where general.name says Phi-3 (src/llama-vocab.cpp), so the
    base's name has to be in it.
    """
    return f"{recipe.model.name.rsplit('/', 1)[-1]} {recipe.path.stem}"


def make_adapter(base: Path, lora: Path, recipe: Recipe, run: Run) -> tuple[Path, Path]:
    """Convert the adapter in the folder `lora`, and for its proof the model in the folder `base`; return both files.

    The base's, which comes first, lies with the checkpoints, which go at the end.
    """
    started = time.monotonic()
    base_path = run.checkpoints / "base.f16.gguf"
    convert_model(base, base_path, "f16", name_of(recipe), run.checkpoints / "convert-base.log")
    convert_lora(lora, base, run.folder / ADAPTER, run.checkpoints / "convert-lora.log")
    run.seconds["convert lora"] = time.monotonic() - started
    return base_path, run.folder / ADAPTER


def weigh(model: Path, source: Path, rows: Sequence[dict]) -> dict[str, Any]:
    """Return the importance matrix of the model in the folder `model`, and in the 16-bit GGUF `source`, over `rows`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    texts = [template_tokens(tokenizer, row["prompt"] + row["completion"]) for row in rows]
    with contextlib.closing(Vocabulary(source)) as file:
        architecture = file.metadata("general.architecture")
    return imatrix.collect(load_reference(model), texts, architecture)


@dataclass(frozen=True)
class Reference:
    """What the merged model does in transformers: every file is held against it."""

    tokenizer: Any
    rows: list[dict[str, Any]]
    prompts: list[list[int]]  # token ids
    texts: list[Text]  # prompts with their reference completions
    logits: Path
    completions: list[str]  # greedy, without the end token
    right: list[bool]
    ended: int  # completions that ended by themselves
    max_tokens: int

    @property
    def context_tokens(self) -> int:
        """The longest text, or prompt with a completion, in tokens."""
        longest = max(len(prompt) for prompt in self.prompts) + self.max_tokens
        return max(longest, *(len(text.tokens) for text in self.texts))


def prove(
    model: Path,
    paths: dict[str, Path],
    rows: list[dict],
    recipe: Recipe,
    run: Run,
    adapter: tuple[Path, Path] | None = None,
) -> dict[str, Any]:
    """Hold every GGUF file against the merged model; write parity.json and parity.png; return what they say.

    `adapter` is the base's GGUF file and the LoRA's, which together are held against it as well. Raises `UserError`
    when a file reads a prompt as other tokens, is farther away than its limit, or does not end.
    """
    started = time.monotonic()
    reference = refer(model, rows, recipe, run.checkpoints)
    run.seconds["reference"] = time.monotonic() - started
    total = len(reference.prompts)
    figures: dict[str, Any] = {
        "reference": {
            "prompts": total,
            "positions": sum(len(text.positions) for text in reference.texts),
            **accuracy(reference.right),
            "ended": reference.ended,
        },
        "files": {},
    }
    allowed = limits(recipe.gguf)
    for kind, path in paths.items():
        started = time.monotonic()
        figures["files"][kind] = examine(path, reference, recipe) | {"max_mean_kl": allowed[kind]}
        run.seconds[f"examine {kind}"] = time.monotonic() - started
    if adapter:
        started = time.monotonic()
        # The merged model is the sum rounded to its type, and these are two files rounded to float16.
        limit = allowed["f16"] + recipe.merge.max_mean_kl
        figures["lora"] = examine_adapter(*adapter, reference) | {"max_mean_kl": limit}
        run.seconds["examine lora"] = time.monotonic() - started
    reference.logits.unlink()
    write_json(run.folder / "parity.json", figures)
    draw(figures["files"], run.folder / "parity.png")
    click.echo(table(figures))
    missed = [line for kind in paths for line in misses(kind, figures, recipe.gguf.max_lost_ends)]
    missed += adapter_misses(figures["lora"]) if adapter else []
    if missed:
        raise UserError("the files do not answer like the merged model:\n  " + "\n  ".join(missed))
    return figures


def refer(model: Path, rows: list[dict], recipe: Recipe, scratch: Path) -> Reference:
    """Run the merged model in the folder `model` in transformers on `rows`; keep its logits under `scratch`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    loaded = load_reference(model)
    ends = stated_ends(loaded.generation_config)
    verify_end(tokenizer, ends, str(model / "generation_config.json"))
    prompts = [template_tokens(tokenizer, row["prompt"], add_generation_prompt=True) for row in rows]
    max_tokens = recipe.infer.max_completion_tokens
    generated = model_greedy(loaded, prompts, max_tokens, ends, SEQUENCES)
    texts = []
    for row, prompt, tokens in zip(rows, prompts, generated, strict=True):
        if "completion" in row:
            whole = template_tokens(tokenizer, row["prompt"] + row["completion"])
        else:
            whole = prompt + tokens
        texts.append(Text(whole, spread_positions(len(whole), recipe.gguf.positions_per_prompt)))
    logits = scratch / "merged.npy"
    store_logits(logits, texts, loaded.config.get_text_config().vocab_size, model_logits(loaded, texts))
    completions = [written(tokenizer, tokens, ends) for tokens in generated]
    return Reference(
        tokenizer=tokenizer,
        rows=rows,
        prompts=prompts,
        texts=texts,
        logits=logits,
        completions=completions,
        right=grade(completions, rows, recipe.format.name),
        ended=sum(tokens[-1] in ends for tokens in generated),
        max_tokens=max_tokens,
    )


def template_tokens(tokenizer: Any, messages: list[dict], *, add_generation_prompt: bool = False) -> list[int]:
    """Return the ids of `messages` in the tokenizer's chat template."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)


def written(tokenizer: Any, tokens: list[int], ends: Sequence[int]) -> str:
    """Return a completion's text, without the end token."""
    return tokenizer.decode(tokens[:-1] if tokens[-1] in ends else tokens, skip_special_tokens=False)


def grade(completions: Sequence[str], rows: Sequence[dict], format_name: str) -> list[bool]:
    """Say for each completion whether it is well formed and gives its row's answer."""
    answer_format = formats.get(format_name)
    marked = zip(completions, rows, strict=True)
    return [mark(answer_format, text, row["answer"], row.get("kind", "number"))["right"] for text, row in marked]


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Return the share of right answers with its 95% Wilson interval."""
    low, high = stats.wilson(sum(right), len(right))
    return {"accuracy": sum(right) / len(right), "accuracy_low": low, "accuracy_high": high}


def examine(path: Path, reference: Reference, recipe: Recipe) -> dict[str, Any]:
    """Return the figures of one GGUF file against the reference.

    Raises `UserError` when it can't be loaded or does not read the prompts as the tokens the model was trained with.
    """
    with Loaded(path, reference.context_tokens, SEQUENCES) as file:
        for row in reference.rows:
            verify_prompt(file, reference.tokenizer, row["prompt"], f"{path}, problem {row['id']}")
        verify_end(reference.tokenizer, [n for n in range(file.size) if file.is_end(n)], str(path))
        difference = compare_logits(reference.logits, reference.texts, file.logits(reference.texts))
        generated = file.greedy(reference.prompts, reference.max_tokens)
        ends = {tokens[-1] for tokens in generated if file.is_end(tokens[-1])}
        ended = sum(file.is_end(tokens[-1]) for tokens in generated)
    completions = [written(reference.tokenizer, tokens, list(ends)) for tokens in generated]
    right = grade(completions, reference.rows, recipe.format.name)
    pairs = list(zip(reference.right, right, strict=True))
    same = sum(ours == theirs for ours, theirs in zip(reference.completions, completions, strict=True))
    return {
        "bytes": path.stat().st_size,
        **difference,
        "same_text": same / len(completions),
        **accuracy(right),
        "flipped_to_wrong": sum(before and not after for before, after in pairs),
        "flipped_to_right": sum(after and not before for before, after in pairs),
        "ended": ended,
        "answer": completions[0],
    }


def examine_adapter(base: Path, adapter: Path, reference: Reference) -> dict[str, Any]:
    """Return how far the GGUF file `base` with the LoRA `adapter` on it is from the merged model.

    Only distributions are compared: the base has the chat template and the end tokens that it had before training.
    """
    with Loaded(base, reference.context_tokens, adapter=adapter) as file:
        difference = compare_logits(reference.logits, reference.texts, file.logits(reference.texts))
    return {"bytes": adapter.stat().st_size, **difference}


def adapter_misses(lora: dict[str, Any]) -> list[str]:
    """Return a line with figure, limit and likely causes when the LoRA is farther from merged than it may be."""
    if lora["mean_kl"] <= lora["max_mean_kl"]:
        return []
    return [
        f"lora: the base with {ADAPTER} is a mean KL of {lora['mean_kl']:.2e} nats from the merged model; limit "
        f"{lora['max_mean_kl']:.2e}, that of f16 and [merge] max_mean_kl together. Likely causes: another base or "
        "revision; a scale other than lora_alpha / r, which is all that the file can state (rank-stabilized LoRA, a "
        "pattern of ranks); an adapter on an embedding that the base ties to another; weights beyond float16's range"
    ]


def misses(kind: str, figures: dict[str, Any], max_lost_ends: int) -> list[str]:
    """Return one line for each limit that the file of type `kind` misses, with figure, limit and likely causes."""
    file, lines = figures["files"][kind], []
    if not file["mean_kl"] <= file["max_mean_kl"]:
        if kind in ("f32", "f16", "bf16"):
            causes = (
                "tensors mapped or tied wrongly by the converter, another RoPE or attention setting, or weights beyond "
                "float16's range (then bf16 in [gguf] types instead of f16)"
            )
        else:
            causes = (
                "too few bits for this model; see whether the 16-bit file is close, then take a larger type, or raise "
                f"[gguf.max_mean_kl] {kind}"
            )
        lines.append(
            f"{kind}: mean KL {file['mean_kl']:.2e} nats; limit {file['max_mean_kl']:.2e}. Likely causes: {causes}"
        )
    lost = figures["reference"]["ended"] - file["ended"]
    if lost > max_lost_ends:
        lines.append(
            f"{kind}: {file['ended']} of {figures['reference']['prompts']} completions end by themselves, against "
            f"{figures['reference']['ended']} in transformers; limit [gguf] max_lost_ends = {max_lost_ends}. Likely "
            f"causes: an end token that the file does not mark as one, or too few bits for this model"
        )
    return lines


def table(figures: dict[str, Any]) -> str:
    """Return the figures as lines for the terminal, a file a line."""
    reference = figures["reference"]
    lines: list[tuple[str, ...]] = [COLUMNS]
    for kind, file in figures["files"].items():
        lines.append((
            kind,
            f"{file['bytes'] / 1e6:,.1f}",
            *(f"{file[name]:.1e}" for name in ("mean_kl", "p99_kl", "max_kl")),
            f"{file['same_top']:.2%}",
            f"{file['perplexity']:.4f}",
            f"{file['same_text']:.1%}",
            f"{file['accuracy']:.1%}",
            f"{file['flipped_to_wrong']}/{file['flipped_to_right']}",
            f"{file['ended']}",
        ))  # fmt: skip
        perplexity = f"{file['reference_perplexity']:.4f}"
    if "lora" in figures:
        file = figures["lora"]
        distances = (f"{file[name]:.1e}" for name in ("mean_kl", "p99_kl", "max_kl"))
        cells = (
            "lora",
            f"{file['bytes'] / 1e6:,.1f}",
            *distances,
            f"{file['same_top']:.2%}",
            f"{file['perplexity']:.4f}",
        )
        lines.append(cells + ("",) * (len(COLUMNS) - len(cells)))
    lines.append((
        "merged", "", "", "", "", "", perplexity, "", f"{reference['accuracy']:.1%}", "", f"{reference['ended']}"
    ))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append(
        f"{reference['prompts']} prompts, {reference['positions']:,} positions; KL in nats against the merged model; "
        f"right: {reference['accuracy_low']:.1%} to {reference['accuracy_high']:.1%} (95%) for the merged model; "
        f"flips: answers gone wrong/right"
    )
    return "\n".join(text)


def draw(files: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw KL divergence and size by type to a PNG."""
    from matplotlib.figure import Figure

    names = list(files)
    figure = Figure(figsize=(9, 4), layout="constrained")
    divergence, size = figure.subplots(1, 2)
    for name, label, marker in (
        ("mean_kl", "mean", "o"),
        ("p99_kl", "99th percentile", "^"),
        ("max_kl", "maximum", "x"),
    ):
        divergence.plot(names, [max(files[kind][name], 1e-12) for kind in names], marker, label=label)
    divergence.plot(
        names, [files[kind]["max_mean_kl"] for kind in names], "_", markersize=24, label="limit of the mean"
    )
    divergence.set(yscale="log", ylabel="KL(merged || file), nats", title="Distance from the merged model")
    divergence.legend()
    size.bar(names, [files[kind]["bytes"] / 1e6 for kind in names])
    size.set(ylabel="MB", title="Size")
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
