"""Show how many prompts and positions the gates of merge and gguf need, with models broken on purpose.

`python -m bench.gate_power make FOLDER` makes the tests' tiny model, or takes `--base FOLDER`; trains an adapter,
merges and converts. `measure FOLDER merge` (`gguf`, `lora`, `ends`) breaks each result in many ways, and writes the
divergence at every position of every prompt, and which completions end. `page FOLDER ...` draws prompts and positions
from these, many times, and writes bench/results/gate_power.md: how often each gate refuses each model.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from stages import merge
from stages.lib.distance import Text, kl_divergence, log_softmax, spread_positions, store_logits
from stages.lib.ends import end_ids
from stages.lib.gguf.convert import convert_lora, convert_model, quantize
from stages.lib.gguf.file import Loaded
from stages.lib.gguf.types import GGUF_TYPES
from stages.lib.model.fold import fold
from stages.lib.model.generate import Generator, Sampling, generate_completions
from stages.lib.model.reference import load_reference, model_logits
from stages.lib.recipe.tables import Merge
from tests.support import tiny_models

RESULTS = Path(__file__).parent / "results" / "gate_power.md"
DRAWS = 2000  # subsets for each share
PROMPTS = (1, 2, 4, 8, 16, 25, 50, 100, 200)
POSITIONS = (2, 8, 32)
SEQUENCES = 8
GATES = ("merge", "gguf", "lora")
MERGE_LIMIT = Merge("float16").max_mean_kl
LORA_LIMIT = GGUF_TYPES["f16"] + MERGE_LIMIT
SCALES = {
    "adapter not applied": 0.0, "adapter at half its scale": 0.5, "adapter at 0.99 of its scale": 0.99,
    "adapter at 1.1 of its scale": 1.1, "adapter applied twice": 2.0,
}  # fmt: skip
LORA_SCALES = {name: SCALES[name] for name in ("adapter at 0.99 of its scale", "adapter at 1.1 of its scale")}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--base", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--steps", type=click.IntRange(0), default=4, help="Steps of the adapter's training; 0: random weights.")
def make(folder: Path, base: Path | None, steps: int) -> None:
    """Write base, adapter, merged model and GGUF files to FOLDER: the tests' tiny model, or the one in `--base`."""
    if base is None:
        tiny_models.adapter(tiny_models.trained_gemma(folder / "base"), folder / "grpo")
    else:
        shutil.copytree(base, folder / "base")
        tiny_models.adapter(folder / "base", folder / "grpo", steps=steps, init_lora_weights=steps > 0)
    fold(folder / "base", folder / "grpo", "float16", folder / "merged")
    for kind in ("f16", "bf16"):
        convert_model(folder / "merged", folder / f"{kind}.gguf", kind, "bench")
    for kind in ("q8_0", "q4_k_m", "q2_k"):
        quantize(folder / "f16.gguf", folder / f"{kind}.gguf", kind)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("part", type=click.Choice([*GATES, "ends"]))
@click.option("--prompts", type=click.IntRange(2), default=200, show_default=True)
@click.option("--completion-tokens", type=click.IntRange(1), default=64, show_default=True)
def measure(folder: Path, part: str, prompts: int, completion_tokens: int) -> None:
    """Break the model that `make` wrote to FOLDER, and write what a gate sees at every position of every prompt."""
    rows = tiny_models.rows(prompts, seed=3)
    if part == "ends":
        found = {"ended": ended(folder, rows, completion_tokens), "tokens": prompt_tokens(folder, rows)}
        (folder / "ends.json").write_text(json.dumps(found))
        return
    texts = merge.texts_of(folder / "merged", rows, 1_000_000)
    cases = []
    for gate, name, limit, divergences in {"merge": merges, "gguf": files, "lora": adapters}[part](folder, texts):
        mean = sum(map(sum, divergences)) / sum(map(len, divergences))
        click.echo(f"{gate}: {name}: mean KL {mean:.2e}, limit {limit:.0e}")
        cases.append({"gate": gate, "name": name, "limit": limit, "kl": divergences})
    git = ["git", "rev-parse", "--short", "HEAD"]
    (folder / f"{part}.json").write_text(
        json.dumps(
            {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
                "date": str(datetime.date.today()),
                "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
                "lengths": [len(text.tokens) for text in texts],
                "cases": cases,
            }
        )
    )


def divergence(path: Path, texts: Sequence[Text], logits: Iterable[Any]) -> list[list[float]]:
    """Return KL(reference at `path` || the model of `logits`) at each position of each text, in nats."""
    import numpy as np

    reference, values, count = np.load(path, mmap_mode="r"), [], 0
    for chunk in logits:
        known = log_softmax(reference[count : count + len(chunk)])
        values += kl_divergence(known, log_softmax(chunk)).tolist()
        count += len(chunk)
    taken = iter(values)
    return [[next(taken) for _ in text.positions] for text in texts]


Case = tuple[str, str, float, list[list[float]]]


def merges(work: Path, texts: Sequence[Text]) -> Iterator[Case]:
    """Yield what the gate of merge sees of the merged model, whole and broken, against the adapter on its base."""
    import torch
    from peft import PeftModel

    model, logits = load_reference(work / "base"), work / "adapter.npy"
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, work / "grpo" / "adapter").eval()
    store_logits(logits, texts, model.config.get_text_config().vocab_size, model_logits(adapted, texts))
    del adapted, model
    model = load_reference(work / "merged")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def seen(name: str, changed: dict[str, torch.Tensor]) -> Case:
        model.load_state_dict(whole | changed)
        return "merge", name, MERGE_LIMIT, divergence(logits, texts, model_logits(model, texts))

    yield seen("nothing wrong", {})
    for name, scale in SCALES.items():
        yield seen(name, {key: base[key] + scale * (whole[key] - base[key]) for key in whole})
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    yield seen("adapter left out of one matrix", {first: base[first]})
    yield seen("a matrix of two layers exchanged", {first: whole[second], second: whole[first]})
    yield seen("rounded to bfloat16", {name: tensor.bfloat16().float() for name, tensor in whole.items()})
    logits.unlink()


def store_merged(work: Path, texts: Sequence[Text]) -> Path:
    """Return the file to which the merged model's logits are written."""
    model, path = load_reference(work / "merged"), work / "merged.npy"
    store_logits(path, texts, model.config.get_text_config().vocab_size, model_logits(model, texts))
    return path


def files(work: Path, texts: Sequence[Text]) -> Iterator[Case]:
    """Yield what the gate of gguf sees of each GGUF file, whole and broken, against the merged model."""
    logits = store_merged(work, texts)
    for name, changes in broken(work).items():
        folder = work / "broken"
        shutil.copytree(work / "merged", folder)
        change(folder, changes)
        convert_model(folder, work / f"{name}.gguf", "f16", "bench")
        shutil.rmtree(folder)
    cases = [(kind, "nothing wrong", work / f"{kind}.gguf") for kind in ("f16", "q8_0", "q4_k_m")]
    cases += [("f16", name, work / f"{name}.gguf") for name in ("bf16", "q8_0", *broken(work))]
    cases += [
        ("q8_0", "q4_k_m in its place", work / "q4_k_m.gguf"),
        ("q4_k_m", "q2_k in its place", work / "q2_k.gguf"),
    ]
    context, known = max(len(text.tokens) for text in texts), {}
    for kind, name, path in cases:
        if path not in known:
            with contextlib.closing(Loaded(path, context)) as file:
                known[path] = divergence(logits, texts, file.logits(texts))
        yield f"gguf {kind}", name, GGUF_TYPES[kind], known[path]
    logits.unlink()


def adapters(work: Path, texts: Sequence[Text]) -> Iterator[Case]:
    """Yield what the gate of gguf sees of the base's GGUF file with the adapter's, against the merged model."""
    logits, context = store_merged(work, texts), max(len(text.tokens) for text in texts)
    convert_model(work / "base", work / "base.gguf", "f16", "bench")
    settings = json.loads((work / "grpo" / "adapter" / "adapter_config.json").read_text())
    for name, scale in ({"nothing wrong": 1.0} | LORA_SCALES).items():
        lora = Path(shutil.copytree(work / "grpo" / "adapter", work / "lora"))
        (lora / "adapter_config.json").write_text(
            json.dumps(
                settings | {"lora_alpha": scale * settings["lora_alpha"], "target_modules": settings["target_modules"]}
            )
        )
        convert_lora(lora, work / "base", work / "lora.gguf")
        shutil.rmtree(lora)
        with contextlib.closing(Loaded(work / "base.gguf", context, adapter=work / "lora.gguf")) as file:
            yield "gguf lora", name, LORA_LIMIT, divergence(logits, texts, file.logits(texts))
    logits.unlink()


def broken(work: Path) -> dict[str, Any]:
    """Return faults of a converter by name: keys of config.json, or a function of the weights."""
    end = max(end_ids(load_generation(work / "merged")))

    def exchanged(weights: dict[str, Any]) -> None:
        first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
        weights[first], weights[second] = weights[second].clone(), weights[first].clone()

    def lost_row(weights: dict[str, Any]) -> None:
        table = weights["model.embed_tokens.weight"]
        table[end] = table.float().mean(dim=0).to(table.dtype)

    def scaled(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"] *= 1.02

    config = json.loads((work / "merged" / "config.json").read_text())
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return {
        "RoPE's theta 10 times": theta * 10,
        "RoPE's theta 1.5 times": theta * 1.5,
        "a matrix of two layers exchanged": exchanged,
        "one matrix times 1.02": scaled,
        "the end token's embedding lost": lost_row,
    }


def load_generation(folder: Path) -> Any:
    """Return the generation settings of the model in `folder`."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder)


def change(folder: Path, fault: Any) -> None:
    """Put a fault of `broken` into the model in `folder`."""
    from safetensors.torch import load_file, save_file

    if callable(fault):
        weights = load_file(folder / "model.safetensors")
        fault(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    stated = config.get("rope_parameters") or {}
    for each in (config, stated, stated.get("full_attention", {})):
        if "rope_theta" in each:
            each["rope_theta"] = fault
    path.write_text(json.dumps(config))


def ended(work: Path, rows: Sequence[dict], tokens: int) -> dict[str, list[bool]]:
    """Return whether each prompt's greedy completion ends by itself, in transformers and with each file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "merged")
    network = load_reference(work / "merged")
    ends = end_ids(network.generation_config)
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=False
    )
    made = generate_completions(Generator(network, tokenizer, ends, {}), prompts, Sampling(tokens), SEQUENCES)
    del network
    found = {"transformers": [each[-1] in ends for each in made]}
    for name in ("f16", "q8_0", "q4_k_m", "q2_k", "the end token's embedding lost"):
        with contextlib.closing(Loaded(work / f"{name}.gguf", max(map(len, prompts)) + tokens, SEQUENCES)) as file:
            found[name] = [each[-1] in file.ends for each in file.greedy(prompts, tokens)]
        click.echo(f"ends: {name}: {sum(found[name])} of {len(rows)}, transformers {sum(found['transformers'])}")
    return found


def prompt_tokens(work: Path, rows: Sequence[dict]) -> list[list[int]]:
    """Return the token ids that each prompt holds, each once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "merged")
    prompts = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=False
    )
    return [sorted(set(prompt)) for prompt in prompts]


@main.command()
@click.argument("folders", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def page(folders: Sequence[Path], out: Path) -> None:
    """Write the page of results of what `measure` wrote to FOLDERS."""
    parts = "".join(tables(folder) for folder in folders)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "llama-cpp-python")
    )
    lost = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    rows = "\n".join(line(f"{share:.0%}", [f"{1 - (1 - share) ** count:.0%}" for count in PROMPTS]) for share in lost)
    out.write_text(
        f"""# How many prompts and positions the gates need

`python -m bench.gate_power`, {versions}.

Each model was broken on purpose. A gate's figure at every position of every prompt was measured once; of these,
prompts were drawn {DRAWS:,} times with replacement, with the positions that the gate takes of each. A cell is the
percentage of draws in which the gate refuses, with {" / ".join(map(str, POSITIONS))} positions a prompt; one number
where they are alike. "nothing wrong" is to be let through. The rest is to be refused where it is over the limit as a
whole ("of the limit" over 1); what is under the limit, no number of prompts refuses. Where a fault has the figure of
"nothing wrong", it changes nothing in this network: the tiny one has no layer that uses this theta of RoPE.

`tiny` is the tests' model. `smollm2-135m` is the real one (`tests/support/smollm2.py`) with a random adapter, `make
--steps 0`. Draws of more prompts than were measured hold the same ones again: they spread less than others would.

What the gates compare exactly needs one prompt or none (`tests/test_sabotage.py`): the tokenizer's ids in `merge`, BOS,
the template, the end token's mark, tied embeddings, a file cut short.
{parts}
## Ends that are lost

For a file that loses this share of the ends: how often so many completions hold a lost one, so that the gate with
`max_lost_ends` = 0 refuses it. A formula, 1 - (1 - share)^prompts, and no measurement.

{head("completions lost")}
{rows}
"""
    )
    click.echo(out.read_text())


def line(name: str, cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return f"| {name} | {' | '.join(cells)} |"


def head(*names: str) -> str:
    """Return the head of a table: `names`, then numbers of prompts."""
    first = line(" | ".join(names), [str(count) for count in PROMPTS])
    return f"{first}\n|---|{'---:|' * (len(names) - 1 + len(PROMPTS))}"


def tables(folder: Path) -> str:
    """Return the tables of the parts that were measured of the model in `folder`."""
    parts = [json.loads(path.read_text()) for part in GATES if (path := folder / f"{part}.json").is_file()]
    cases = "\n".join(case_row(case) for part in parts for case in part["cases"])
    found, lengths = parts[0], parts[0]["lengths"]
    text = f"""
## {folder.name}

{found["date"]}, commit {found["commit"]}, {found["machine"]}. {len(lengths)} prompts with their
completions, {min(lengths)} to {max(lengths)} tokens.

{head("gate: what is wrong", "mean KL", "of the limit")}
{cases}
"""
    return text + (ends_tables(folder / "ends.json") if (folder / "ends.json").is_file() else "")


def ends_tables(path: Path) -> str:
    """Return the tables of the completions' ends and the prompts' tokens in `path`."""
    found = json.loads(path.read_text())
    own = found["ended"]["transformers"]
    rows = "\n".join(
        line(f"{name} | {sum(of)} of {len(of)}", [f"{lost_ends(own, of, count):.0%}" for count in PROMPTS])
        for name, of in found["ended"].items()
    )
    shares = line("two ids exchanged", [f"{exchange_seen(found['tokens'], count):.0%}" for count in PROMPTS])
    return f"""
Ends: how many greedy completions end, and the percentage of draws in which fewer end than in transformers.

{head("file", "ended")}
{rows}

Tokens: two ids, out of those that any of these prompts holds, are exchanged in the file; the percentage of draws in
which a prompt holds one of them, and the gate of `gguf` so compares it. (`merge` compares all ids.)

{head("tokens")}
{shares}
"""


def case_row(case: dict[str, Any]) -> str:
    """Return the row of one model, whole or broken."""
    import numpy as np

    shares = {positions: refused(case["kl"], case["limit"], positions) for positions in POSITIONS}
    cells = []
    for count in PROMPTS:
        each = [f"{shares[positions][count]:.0%}".rstrip("%") for positions in POSITIONS]
        cells.append(each[0] if len(set(each)) == 1 else "/".join(each))
    mean = float(np.mean([value for text in case["kl"] for value in text]))
    return line(f"{case['gate']}: {case['name']} | {mean:.1e} | {mean / case['limit']:.2g}", cells)


def refused(divergences: Sequence[Sequence[float]], limit: float, positions: int) -> dict[int, float]:
    """Return the share of draws with a mean over `limit`, by the number of prompts, of `positions` each."""
    import numpy as np

    chosen = [[text[at] for at in spread_positions(len(text) + 1, positions)] for text in divergences]
    sums, counts = np.array([sum(each) for each in chosen]), np.array([len(each) for each in chosen])
    chance, shares = np.random.default_rng(0), {}
    for count in PROMPTS:
        drawn = chance.integers(0, len(chosen), (DRAWS, count))
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        shares[count] = float((~(means <= limit)).mean())
    return shares


def lost_ends(own: Sequence[bool], other: Sequence[bool], count: int) -> float:
    """Return the share of draws of `count` prompts in which `other` has fewer ends than `own`."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(0, len(own), (DRAWS, count))
    return float((np.array(own)[drawn].sum(axis=1) > np.array(other)[drawn].sum(axis=1)).mean())


def exchange_seen(prompts: Sequence[Sequence[int]], count: int) -> float:
    """Return the share of draws of `count` prompts in which one holds one of two random ids."""
    import numpy as np

    chance, ids, seen = np.random.default_rng(0), sorted({token for prompt in prompts for token in prompt}), 0
    for _ in range(DRAWS):
        pair = {ids[number] for number in chance.choice(len(ids), 2, replace=False)}
        seen += any(pair & set(prompts[number]) for number in chance.integers(0, len(prompts), count))
    return seen / DRAWS


if __name__ == "__main__":
    main()
