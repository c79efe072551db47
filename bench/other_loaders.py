"""Hold merged models against transformers 4: the same weights give the same distributions, the tokenizer the same ids.

    python -m pip install --no-deps --target FOLDER transformers==4.57.1 tokenizers==0.22.1 huggingface-hub==0.36.0
    python -m bench.other_loaders FOLDER

Writes bench/results/other_loaders.md, and ends with 1 where a model is further than 1e-4 nats or an id differs. The
models are the rehearsal's small copies of docs/models.md's, with an adapter folded in; the tokenizers those of
tests/support/family_models.py too, which have more classes.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from stages.lib.distance import compare_logits, store_logits
from stages.lib.gguf.tokens import PROBES, save_tokenizer
from stages.lib.model.dress import text_of, train
from stages.lib.model.fold import fold
from stages.lib.model.reference import load_reference, model_logits
from stages.lib.model.shrink import write_small_copy
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from tests.support import family_models, published, tiny_models

RESULTS = Path(__file__).parent / "results" / "other_loaders.md"
MOST_NATS = 1e-4
QUESTION = [{"role": "user", "content": PROBES[0]}]
# Run by the same Python with the other packages in front: in asked.json are folder, texts, conversations' tokens.
READ = """\
import json, sys
from pathlib import Path
import transformers

folder = Path(sys.argv[1])
asked = json.loads((folder / "asked.json").read_text())
told = {"version": transformers.__version__}
tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"])
told["ids"] = tokenizer(asked["probes"])["input_ids"]
told["prompt"] = tokenizer.apply_chat_template(asked["question"], add_generation_prompt=True)
if asked["texts"]:
    import numpy, torch

    torch.set_num_threads(1)
    try:
        config = transformers.AutoConfig.from_pretrained(asked["model"])
    except (ValueError, KeyError):
        told["unknown"] = True
    else:
        causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
        network = auto.from_pretrained(asked["model"], dtype=torch.float32).eval()
        with torch.no_grad():
            rows = [network(input_ids=torch.tensor([tokens])).logits[0, places] for tokens, places in asked["texts"]]
        numpy.save(folder / "logits.npy", torch.cat(rows).numpy())
(folder / "told.json").write_text(json.dumps(told))
"""


@click.command(help=__doc__)
@click.argument("packages", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(packages: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    rows, wrong, versions = [], 0, set()
    for model in (model for model in published.PUBLISHED if not model.refused and not model.like):
        with tempfile.TemporaryDirectory() as folder:
            found = compare_model(model, Path(folder), packages)
        rows.append(row(model.name, found))
        wrong += is_wrong(found)
        versions.add(found["version"])
        click.echo(rows[-1])
    for name, family in family_models.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = compare_tokenizer(family, Path(folder), packages)
        rows.append(row(f"tokenizer of `{name}`", found))
        wrong += is_wrong(found)
        click.echo(rows[-1])
    write_page(rows, ", ".join(versions))
    raise SystemExit(min(wrong, 1))


def compare_model(model: published.Published, folder: Path, packages: Path) -> dict[str, Any]:
    """Return what the other transformers says of a published model's small copy, merged; "nats" is its mean KL."""
    written = published.write(model, folder / "published")
    template = read_recipe(tiny_models.recipe(folder), folder / "base-model")
    recipe = published.recipe_of(model, folder / "base", template)
    write_small_copy(written, folder / "base")
    tokenizer = load_tokenizer(recipe)
    texts = [text_of(tokenizer, question) for question in PROBES]
    train(recipe, tokenizer, texts, folder)
    fold(folder / "base", folder, "bfloat16", folder / "merged")
    network = load_reference(folder / "merged")
    store_logits(
        folder / "reference.npy", texts, network.config.get_text_config().vocab_size, model_logits(network, texts)
    )
    found = ask(folder, [[text.tokens, text.positions] for text in texts], packages)
    if not found.get("unknown"):
        import numpy as np

        found["nats"] = compare_logits(folder / "reference.npy", texts, [np.load(folder / "logits.npy")])["mean_kl"]
    return found


def compare_tokenizer(family: family_models.Family, folder: Path, packages: Path) -> dict[str, Any]:
    """Return what the other transformers reads with a family's tokenizer as merge saves it."""
    from transformers import AutoTokenizer

    (folder / "base").mkdir()
    family.tokenizer(folder / "base", family.template, family.end)
    (folder / "merged").mkdir()
    save_tokenizer(AutoTokenizer.from_pretrained(folder / "base"), folder / "base", folder / "merged")
    return ask(folder, [], packages)


def ask(folder: Path, texts: list[Any], packages: Path) -> dict[str, Any]:
    """Return what `READ` tells of the model in `folder`, with "same_ids" against this environment's tokenizer."""
    from transformers import AutoTokenizer

    asked = {"model": str(folder / "merged"), "texts": texts, "probes": PROBES, "question": QUESTION}
    (folder / "asked.json").write_text(json.dumps(asked))
    environment = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{folder}: the other transformers failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "told.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    found["same_ids"] = found["ids"] == tokenizer(list(PROBES))["input_ids"] and found["prompt"] == prompt
    return found


def is_wrong(found: dict[str, Any]) -> bool:
    """Say whether an id differs, or a model is too far from the merged one."""
    return not found["same_ids"] or not found.get("nats", 0.0) <= MOST_NATS


def row(name: str, found: dict[str, Any]) -> str:
    """Return a line of the table."""
    nats = f"{found['nats']:.1e}" if "nats" in found else "not in it" if found.get("unknown") else ""
    return f"| {name} | {nats} | {'the same' if found['same_ids'] else 'others'} |"


def write_page(rows: list[str], other: str) -> None:
    """Write the table with machine, date, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    here = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "peft"))
    RESULTS.write_text(
        f"""# Merged models in transformers {other}

`python -m bench.other_loaders FOLDER`, with transformers {other} in FOLDER;
{datetime.date.today()}, {platform.machine()},
{os.cpu_count()} cores, Python {platform.python_version()}, {here}, commit {commit.strip()}.

Small copies of published models with random weights, a random LoRA folded in, saved as merge saves them. Mean KL
divergence in nats of the other transformers, in float32, from this one, on {len(PROBES)} conversations; and whether its
tokenizer gives the same ids for the probes of `stages/lib/gguf/tokens.py` and a prompt. "Not in it": the other has no
such model. Random weights on small copies: read it for whether everything is read, not for how good a model is.

| model | nats | ids |
|---|---:|---|
{chr(10).join(rows)}
"""
    )


if __name__ == "__main__":
    main()
