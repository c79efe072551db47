"""A model's folder: found, fetched, and read from config.json and the headers of its safetensors alone."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError
from stages.lib.mirror import keep_to_mirror
from stages.lib.model.headers import AGAIN, json_object, tensors_in


def model_folder(name: str, revision: str | None) -> Path:
    """Return the folder that holds the model `name`: itself, or the hub cache's snapshot of `revision`.

    It holds config.json and, where the model has one, tokenizer.model; weights only where they were loaded before.
    """
    from transformers.utils import cached_file

    with fetching_model(name, revision):
        cached_file(name, "tokenizer.model", revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(cached_file(name, "config.json", revision=revision)).parent


def whole_model_folder(name: str, revision: str | None) -> Path:
    """Return the folder of the whole model `name`, fetched if need be: safetensors, tokenizer, configuration."""
    if revision is None:
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
    with fetching_model(name, revision):
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"])
        )


@contextlib.contextmanager
def fetching_model(name: str, revision: str | None) -> Iterator[None]:
    """Guard what may fetch the model `name`: raise `UserError` when the hub does not give it."""
    keep_to_mirror()
    try:
        yield
    except OSError as error:  # of transformers and huggingface_hub: no network, no such revision, no licence
        if revision is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} at {revision}: the hub did not give it: {reason}. Run: make doctor RECIPE=...  It names the cause "
            f"(network, revision, licence, token). Or give a local folder as [model] name"
        ) from error


def local_model_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of the model `name` on this disk, None if it is not there; fetch nothing."""
    if revision is None:
        return Path(name) if Path(name).is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads in `folder`: model.safetensors, or the shards of the index.

    Others beside them, as Mistral's consolidated.safetensors, hold the same weights again. Raises `UserError` when
    there is neither or a shard is missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3]) or "no safetensors file"
        raise UserError(
            f"{folder}: expected a model's weights, {whole.name} or shards with {index.name}; found {others}"
        )
    by_tensor = json_object(index).get("weight_map")
    names = [name for name in by_tensor.values() if isinstance(name, str)] if isinstance(by_tensor, dict) else []
    if not names or len(names) < len(by_tensor or {}) or any(Path(name).name != name for name in names):
        raise UserError(f"{index}: weight_map is not names of files beside it, by tensor. Fetch or make it again")
    shards = sorted({*names})
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(shards)} shards that {index.name} names are missing: "
            f"{', '.join(missing[:3])}. Fetch them"
        )
    return [folder / name for name in shards]


def weight_shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype (as safetensors spells it: "BF16") and shape of every tensor of the model in `folder`, by name.

    Raises `UserError` as `weight_files` and `tensors_in` do.
    """
    return {name: stated for path in weight_files(folder) for name, stated in tensors_in(path).items()}


def parameter_count(folder: Path) -> int:
    """Return the number of parameters stored in `folder`."""
    return sum(math.prod(shape) for _, shape in weight_shapes(folder).values())


def model_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder. Raises `UserError` when there is none or it is no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; expected a model in transformers' layout")
    return json_object(path)


def vocabulary_size(folder: Path) -> int:
    """Return the number of rows of a model's embedding; of its text part where it has others."""
    configuration = model_config(folder)
    text = configuration.get("text_config", configuration)
    size = text.get("vocab_size") if isinstance(text, dict) else None
    if type(size) is not int:
        raise UserError(f"{folder / 'config.json'}: vocab_size is {size!r}; expected a number. Fetch or make it again")
    return size


def quantization(folder: Path) -> dict[str, Any] | None:
    """Return the quantization_config of a config.json, None if it has none. Raises `UserError` for no object."""
    settings = model_config(folder).get("quantization_config")
    if settings is not None and not isinstance(settings, dict):
        raise UserError(
            f"{folder / 'config.json'}: quantization_config is {str(settings)[:80]!r}; expected an object. {AGAIN}"
        )
    return settings


# The end of a quantized copy's name: "-unsloth-bnb-4bit", "-GPTQ-Int4", "-FP8".
QUANTIZED_NAME = re.compile(r"[-_.]((unsloth[-_])?bnb[-_]4bit|4bit|8bit|int[48]|fp8|awq|gptq|nf4|mxfp4)\b.*", re.I)


def refuse_quantized_base(folder: Path, name: str) -> None:
    """Raise `UserError` when config.json says that the base `name` is quantized; its weights may be on the hub."""
    settings = quantization(folder)
    if settings is None:
        return
    whole = QUANTIZED_NAME.sub("", name)
    example = f", likely {whole!r}" if whole != name else ""
    method = settings.get("quant_method", "quantization_config")
    raise UserError(
        f"{name}: its weights are quantized ({method} in its config.json); merge needs the 16-bit model, or the "
        f"rounding counts twice. Name that in [model] name{example}. With engine = 'unsloth' and load_in_4bit = true "
        f"training still loads it in 4 bits"
    )


def refuse_quantized(folder: Path, purpose: str) -> None:
    """Raise `UserError` for a quantized model in `folder`: `purpose` starts from 16-bit weights only."""
    settings = quantization(folder)
    dtypes = sorted({dtype for dtype, _ in weight_shapes(folder).values()} - {"F64", "F32", "F16", "BF16"})
    if settings is None and not dtypes:
        return
    settings = settings or {}
    bits = "4-bit " if settings.get("load_in_4bit") or settings.get("bits") == 4 else ""
    found = f"{bits}{settings.get('quant_method', 'quantized')} ({', '.join(dtypes) or 'quantization_config'})"
    raise UserError(
        f"{folder}: its weights are {found}; {purpose} needs the 16-bit model, or the rounding counts twice. Name the "
        f"16-bit base in [model] name, and run: make merge"
    )
