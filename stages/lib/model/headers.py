"""What a model's files say before a library reads them: a JSON object, and the header of a safetensors file.

Format: https://huggingface.co/docs/safetensors, where a file begins with the length of its header, 8 bytes, and that.
"""

import contextlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError

MAX_JSON_BYTES = 1 << 27  # a vocabulary of a million tokens takes half
MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip
AGAIN = "Fetch or make it again"


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a model's file. Raises `UserError` when it holds none, or is too large."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path}: has {size:,} bytes; expected JSON of at most {MAX_JSON_BYTES:,}. {AGAIN}")
    return parsed_object(path, path.read_bytes())


def parsed_object(path: Path, raw: bytes) -> dict[str, Any]:
    """Return the JSON object that `raw`, of the file `path`, is. Raises `UserError` when it is none."""
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); expected a JSON object. {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); expected an object. {AGAIN}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}; expected an object. {AGAIN}")
    return value


def tensors_in(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of every tensor of a safetensors file, by name, from its header alone.

    Raises `UserError` for a file that is cut short, and for a header that is none or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path}: its header would have {length:,} bytes, so it is no safetensors file. {AGAIN}")
        data = file.read(length)
    if not data or len(data) < length:
        raise UserError(f"{path}: is cut short; expected a whole safetensors file. {AGAIN}")
    header = parsed_object(path, data)
    header.pop("__metadata__", None)
    tensors, places = {}, []
    for name, entry in header.items():
        dtype, shape, place = stated_tensor(path, name, entry)
        tensors[name] = (dtype, shape)
        places.append(place)
    end = 0
    for begin, after in sorted(places):
        if begin != end:
            raise UserError(f"{path}: its tensors overlap or leave a gap at byte {end:,} of the data. {AGAIN}")
        end = after
    if size < 8 + length + end:
        raise UserError(f"{path}: is cut short: {size:,} bytes of {8 + length + end:,}. {AGAIN}")
    if size > 8 + length + end:
        raise UserError(f"{path}: has {size:,} bytes; its header states {8 + length + end:,}. {AGAIN}")
    return tensors


def stated_tensor(path: Path, name: str, entry: Any) -> tuple[str, list[int], tuple[int, int]]:
    """Return dtype, shape and place (begin, end) that a header states of a tensor. Raises `UserError` for nonsense."""
    stated = entry if isinstance(entry, dict) else {}
    dtype, shape, place = stated.get("dtype"), stated.get("shape", []), stated.get("data_offsets", [])
    if not isinstance(dtype, str) or not are_sizes(shape, 64) or not are_sizes(place, 2) or len(place) != 2:
        raise UserError(f"{path}: its header does not state what {name[:80]!r} is: {str(entry)[:80]}. {AGAIN}")
    begin, end = place
    bits = math.prod(shape) * BITS.get(dtype, 0)
    if begin > end or (dtype in BITS and bits != 8 * (end - begin)):
        raise UserError(
            f"{path}: its header gives {name[:80]!r}, {dtype} {shape[:8]}, the bytes {begin:,} to {end:,}; expected "
            f"{bits // 8:,} of them. {AGAIN}"
        )
    return dtype, shape, (begin, end)


def are_sizes(value: Any, most: int) -> bool:
    """Return whether `value` is a list of at most `most` numbers that may be sizes: whole, of 63 bits."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(each) is int and 0 <= each < 1 << 63 for each in value)


@contextlib.contextmanager
def reading_model(name: str, what: str) -> Iterator[None]:
    """Raise `UserError` when a library can't read `what` ("the tokenizer") of the model `name`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of transformers, tokenizers, sentencepiece: each has its own, and Rust a bare one
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: can't read {what} ({type(error).__name__}: {reason}). {AGAIN}") from error
