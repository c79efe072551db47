"""The disk room that a recipe needs, from its model's shape alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stages.lib.machine.memory import ADAPTER_BYTES, adapter_parameters, weight_bytes
from stages.lib.machine.shape import Shape
from stages.lib.recipe.tables import Recipe


def gguf_bits(kind: str) -> int:
    """Return the most bits a weight takes in a GGUF file of type `kind` ("q4_k_m"), as the gguf stage counts them.

    A type's digit understates its bits: it leaves out scales, and embeddings and rows that are in a finer type.
    """
    digit = int(re.findall(r"\d+", kind)[0])
    return digit if digit > 8 else min(digit + 3, 9)


@dataclass(frozen=True)
class Room:
    """The disk room that a stage takes, in bytes."""

    kept: int
    scratch: int = 0  # more, while it works


def disk_rooms(shape: Shape, recipe: Recipe) -> dict[str, Room]:
    """Return the disk room of each stage, by its name, in the order they run; "base" is the model itself."""
    size, save = shape.parameters, recipe.save
    kinds = {name.lower() for name in recipe.gguf.types}
    source = "bf16" if "bf16" in kinds and "f16" not in kinds else "f16"  # all others are made from this one
    files = sum(size * gguf_bits(kind) // 8 for kind in kinds)
    row = shape.vocabulary_size * 4  # float32 logits at one position
    merge_rows = 2 * recipe.merge.prompts * recipe.merge.positions_per_prompt
    gguf_rows = recipe.gguf.prompts * recipe.gguf.positions_per_prompt
    adapter = adapter_parameters(shape, recipe.lora)
    checkpoints = 2 * adapter * (ADAPTER_BYTES + 8)  # with Adam's moments
    four_bits = weight_bytes(shape, "bfloat16", load_in_4bit=True) if "merged_4bit" in save else 0
    lora_base = 2 * size if "lora" in save else 0  # the converter takes an adapter beside its base
    run = Room(adapter * ADAPTER_BYTES, checkpoints)
    return {
        "base": Room(2 * size),
        "sft": run,
        "grpo": run,
        "merge": Room(2 * size + four_bits, merge_rows * row),
        "gguf": Room(files, gguf_rows * row + (0 if source in kinds else 2 * size) + lora_base),
        "ollama-modelfile": Room(size * gguf_bits(recipe.ollama.quantization.lower()) // 8),
    }


def most_room(rooms: Mapping[str, Room]) -> int:
    """Return the most bytes that stages, run in order, take at once: what all before kept, and one's own scratch."""
    done, most = 0, 0
    for room in rooms.values():
        done += room.kept
        most = max(most, done + room.scratch)
    return most
