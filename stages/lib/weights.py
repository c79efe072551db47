"""What a folder of safetensors holds, read from the files' headers and config.json without loading a weight."""

import json
import math
import struct
from pathlib import Path

from stages.lib.errors import UserError


def folder(name: str, revision: str | None) -> Path:
    """Return the folder that holds the model `name`: itself, or the hub cache's snapshot of `revision`.

    config.json and, where the model has one, tokenizer.model are there after this; the weights once they were loaded.
    """
    from transformers.utils import cached_file

    cached_file(name, "tokenizer.model", revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(cached_file(name, "config.json", revision=revision)).parent


def local_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of the model `name` if it is on this disk, without fetching anything; None if it is not."""
    if revision is None:
        return Path(name) if Path(name).is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def shapes(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype (as safetensors spells it: "BF16") and shape of every tensor in `folder`, by name.

    Raises `UserError` when there is no safetensors file or one is cut short.
    """
    tensors: dict[str, tuple[str, list[int]]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no .safetensors file; expected a model's weights")
    for path in files:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            data = file.read(length) if 0 < length <= path.stat().st_size else b""
        if not data or len(data) < length:
            raise UserError(f"{path}: is cut short; expected a whole safetensors file. Fetch or make it again")
        header = json.loads(data)
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < end:
            raise UserError(f"{path}: is cut short: {path.stat().st_size:,} bytes of {end:,}. Fetch or make it again")
        tensors |= {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    return tensors


def parameter_count(folder: Path) -> int:
    """Return the number of parameters stored in `folder`."""
    return sum(math.prod(shape) for _, shape in shapes(folder).values())


def config(folder: Path) -> dict:
    """Return config.json of a model folder. Raises `UserError` when there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; expected a model in transformers' layout")
    return json.loads(path.read_text())


def vocabulary_size(folder: Path) -> int:
    """Return the rows of a model's embedding, of its text part where it has others."""
    configuration = config(folder)
    return configuration.get("text_config", configuration)["vocab_size"]


def refuse_quantized(folder: Path, purpose: str) -> None:
    """Raise `UserError` for a model stored in a few bits: what was rounded once is never `purpose`'s source."""
    settings = config(folder).get("quantization_config")
    dtypes = sorted({dtype for dtype, _ in shapes(folder).values()} - {"F64", "F32", "F16", "BF16"})
    if settings is None and not dtypes:
        return
    settings = settings or {}
    bits = "4-bit " if settings.get("load_in_4bit") or settings.get("bits") == 4 else ""
    found = f"{bits}{settings.get('quant_method', 'quantized')} ({', '.join(dtypes) or 'quantization_config'})"
    raise UserError(
        f"{folder}: its weights are {found}; {purpose} needs the 16-bit model, or the rounding counts twice. Name the "
        f"16-bit base in [model] name, and run: make merge"
    )
