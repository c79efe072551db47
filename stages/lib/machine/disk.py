"""The disk room that a recipe needs, from its model's shape alone, and findings on the room that is free."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.lib.disk import existing
from stages.lib.machine.findings import Finding, gigabytes
from stages.lib.machine.memory import adapter_parameters, weight_bytes
from stages.lib.machine.room import training_room
from stages.lib.machine.shape import Shape
from stages.lib.recipe.tables import Recipe, is_hub_name

IMAGE_BYTES = 9_810_000_000  # the CUDA image; as much again while its layers are written
TOKENIZER_BYTES = 150  # of tokenizer.json for a token, as in Gemma 3 and Llama 3.1
SYSTEM_BYTES = 4_000_000_000  # Python, torch and the operating system, beside a model
ARTIFACTS = Path("artifacts")
CONTAINER_CACHE = Path("data/cache")


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
    tokenizer = shape.vocabulary_size * TOKENIZER_BYTES
    four_bits = weight_bytes(shape, "bfloat16", load_in_4bit=True) if "merged_4bit" in save else 0
    lora_base = 2 * size if "lora" in save else 0  # the converter takes an adapter beside its base
    sft, grpo = (Room(*training_room(recipe, stage, adapter, tokenizer)) for stage in ("sft", "grpo"))
    return {
        "base": Room(2 * size),
        "sft": sft,
        "grpo": grpo,
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


def disk_findings(recipe: Recipe, shape: Shape, model: Path | None, cache: Path) -> Iterator[Finding]:
    """Yield, for each file system, whether it has room for the unfinished stages that write to it."""
    out = ARTIFACTS / recipe.path.stem
    systems: dict[int, tuple[set[str], dict[str, Room]]] = {}
    for stage, room in disk_rooms(shape, recipe).items():
        is_done = model is not None if stage == "base" else (out / stage / "manifest.json").is_file()
        place = existing(cache if stage == "base" and is_hub_name(recipe.model.name) else out)
        if not is_done:
            places, rooms = systems.setdefault(place.stat().st_dev, (set(), {}))
            places.add(str(place))
            rooms[stage] = room
    for places, rooms in systems.values():
        need, free = most_room(rooms), shutil.disk_usage(min(places)).free
        stages = ", ".join(
            f"{stage} {room.kept / 1e9:.1f}{f' + {room.scratch / 1e9:.1f} for a while' if room.scratch > 1e8 else ''}"
            for stage, room in rooms.items()
            if room.kept + room.scratch > 5e7
        )
        found = f"{', '.join(sorted(places))}: {gigabytes(free)} free; needs {gigabytes(need)}"
        found += f" ({stages})" if stages else ""
        remedy = "free some, or put artifacts/ and HF_HOME on a larger disk; fewer [gguf] types need less"
        yield Finding("fail", "disk", found, remedy) if need > free else Finding("ok", "disk", found)
    if not systems:
        yield Finding("ok", "disk", "every stage is finished")


def image_room(recipe: Recipe, engine: tuple[int | None, str]) -> Iterator[Finding]:
    """Yield a warning when Docker's own folder may have too little room to build the CUDA image."""
    if recipe.model.engine != "unsloth" or os.environ.get("RUNTIME") == "local" or engine[0] != 0:
        return
    folder = Path(json.loads(engine[1]).get("DockerRootDir") or "/var/lib/docker")
    free = shutil.disk_usage(existing(folder)).free
    if free < 2 * IMAGE_BYTES:
        need = gigabytes(2 * IMAGE_BYTES)
        found = f"Docker's {folder} has {gigabytes(free)} free; building the CUDA image takes up to {need}"
        yield Finding("warn", "disk", found, "if it is not built yet: docker system prune, or a larger disk")
