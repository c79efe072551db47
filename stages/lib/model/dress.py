"""A dress rehearsal: what the stages do with a model, done in seconds with a small copy of it before the training."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from stages.lib.distance import Text, compare_logits, spread_positions, store_logits
from stages.lib.errors import UserError
from stages.lib.gguf.convert import convert_lora, convert_model, name_of
from stages.lib.gguf.file import Loaded
from stages.lib.gguf.tokens import PROBES
from stages.lib.model.files import model_folder
from stages.lib.model.fold import fold
from stages.lib.model.load import load_trainable
from stages.lib.model.locate import locate_model
from stages.lib.model.network import network_class
from stages.lib.model.reference import load_reference, model_logits
from stages.lib.model.shrink import write_small_copy
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.tables import Recipe

MERGED_LOGITS = "merged.npy"
WITHOUT = "Where the copy is at fault and not the model, set [model] rehearsal = false"
POSITIONS = 8  # of a conversation, at which models are compared


def rehearse(recipe: Recipe) -> dict[str, float]:
    """Train, merge and convert a small copy of the recipe's model; return mean KLs (nats) from its merged model.

    They are those of the "base", the "adapter" on it, the "gguf" file and, where `save` has it, the "lora" file; {},
    after a warning, for a model whose copy can't be made small. Raises `UserError` with the stage that would fail, the
    cause and what to change.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as beside:
        folder = Path(temporary)
        with failing(recipe, "sft", "Choose another base model"):
            base = model_folder(*locate_model(recipe))
            network_class(base)
        if not shrunk(recipe, base, folder / "base"):
            return {}
        with failing(recipe, "sft", "Choose another base model, or other [lora] target_modules"):
            model = dataclasses.replace(recipe.model, engine="trl", load_in_4bit=False)
            small = dataclasses.replace(recipe, model_folder=folder / "base", model=model)
            tokenizer = load_tokenizer(small)
            texts = [text_of(tokenizer, question) for question in PROBES]
            train(small, tokenizer, texts, folder)
        adapter = beside.submit(convert_adapter, recipe, folder) if "lora" in recipe.save else None
        with failing(recipe, "merge", "Choose another base model, or other [lora] target_modules"):
            fold(folder / "base", folder, recipe.merge.dtype, folder / "merged")
            figures = compare_merged(folder, texts)
        with failing(recipe, "gguf", "Choose another base model"):
            file = folder / "model.gguf"
            # After the adapter's, in the same thread: a converter takes 280 MB, two at once were the peak of memory.
            beside.submit(convert_model, folder / "merged", file, "f16", name_of(recipe)).result()
            figures["gguf"] = compare_file(file, None, folder, texts)
            refuse_far(figures["gguf"], figures["base"], "GGUF file")
        if adapter:
            with failing(recipe, "gguf", "Take 'lora' out of save: it asks for a GGUF file of the adapter alone"):
                figures["lora"] = compare_file(*adapter.result(), folder, texts)
                refuse_far(figures["lora"], figures["base"], "GGUF file of the adapter, on its base,")
    return figures


def shrunk(recipe: Recipe, base: Path, out: Path) -> bool:
    """Write the small copy of `base` to `out`; say so, and return False, where its sizes make no network.

    That is a fault of the copy and none of the model: it refuses nothing.
    """
    try:
        write_small_copy(base, out)
    except Exception as error:  # whatever transformers or torch raise for sizes that do not fit each other
        click.echo(
            f"warning: {recipe.model.name}: no rehearsal with a small copy, which can't be made of its config.json: "
            f"{type(error).__name__}: {error}",
            err=True,
        )
        return False
    return True


@contextlib.contextmanager
def failing(recipe: Recipe, stage: str, remedy: str) -> Iterator[None]:
    """Say of an error which stage would have failed, and what to change."""
    try:
        yield
    except Exception as error:  # whatever transformers, PEFT or llama.cpp's converter raise for a model like this
        found = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{recipe.path}: make {stage} would fail with {recipe.model.name}, as it does with a small copy of it: "
            f"{found.strip()}\n{remedy}. {WITHOUT}"
        ) from error


def text_of(tokenizer: Any, question: str) -> Text:
    """Return a conversation about `question` as token ids."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "17 + 25 = 42"}]
    tokens = tokenizer.apply_chat_template(turns, return_dict=False)
    return Text(tokens, spread_positions(len(tokens), POSITIONS))


def train(recipe: Recipe, tokenizer: Any, texts: list[Text], folder: Path) -> None:
    """Take one step with the adapter that the trainer starts; save it and the tokenizer, as GRPO does, in `folder`."""
    import torch

    model = load_trainable(recipe, adapter=None).train()
    tokens = torch.tensor([texts[0].tokens])
    model(input_ids=tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # zero until its first step
                weight.normal_(std=0.1)
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "tokenizer")


def convert_adapter(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """Convert the base and the adapter in `folder`; return both GGUF files."""
    file, adapter = folder / "base.gguf", folder / "adapter.gguf"
    convert_model(folder / "base", file, "f16", name_of(recipe))
    convert_lora(folder / "adapter", folder / "base", adapter)
    return file, adapter


def compare_merged(folder: Path, texts: list[Text]) -> dict[str, float]:
    """Store the merged model's logits in `folder`; return the mean KLs of base and adapter from them, in nats."""
    from peft import PeftModel

    stored = folder / MERGED_LOGITS
    model = load_reference(folder / "merged")
    store_logits(stored, texts, model.config.get_text_config().vocab_size, model_logits(model, texts))
    model = PeftModel.from_pretrained(load_reference(folder / "base"), folder / "adapter").eval()
    difference = compare_logits(stored, texts, model_logits(model, texts))["mean_kl"]
    with model.disable_adapter():
        from_base = compare_logits(stored, texts, model_logits(model, texts))["mean_kl"]
    refuse_far(difference, from_base, "adapter on its base")
    return {"base": from_base, "adapter": difference}


def compare_file(file: Path, adapter: Path | None, folder: Path, texts: list[Text]) -> float:
    """Return the mean KL (nats) of the GGUF `file`, with the LoRA `adapter`, from the merged model."""
    with contextlib.closing(Loaded(file, max(len(text.tokens) for text in texts), adapter=adapter)) as loaded:
        return compare_logits(folder / MERGED_LOGITS, texts, loaded.logits(texts))["mean_kl"]


def refuse_far(difference: float, from_base: float, what: str) -> None:
    """Raise `UserError` when `what` is not much nearer to the merged model than the base is."""
    if not difference < from_base / 10:
        raise UserError(
            f"the {what} is {difference:.1e} nats from the merged model, and the base {from_base:.1e}; expected less "
            f"than a tenth of that"
        )
