"""Findings on the free disk room, compared with what the recipe needs."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.lib.machine.findings import Finding, gigabytes
from stages.lib.machine.room import Room, disk_rooms, most_room
from stages.lib.machine.shape import Shape
from stages.lib.recipe.tables import Recipe, is_hub_name

IMAGE_BYTES = 9_810_000_000  # the CUDA image; as much again while its layers are written
SYSTEM_BYTES = 4_000_000_000  # Python, torch and the operating system, beside a model
ARTIFACTS = Path("artifacts")
CONTAINER_CACHE = Path("data/cache")


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def disk_findings(recipe: Recipe, shape: Shape, model: Path | None, cache: Path) -> Iterator[Finding]:
    """Yield, for each file system, whether it has room for the unfinished stages that write to it."""
    out = ARTIFACTS / recipe.path.stem
    systems: dict[int, tuple[set[str], dict[str, Room]]] = {}
    for stage, room in disk_rooms(shape, recipe).items():
        done = model is not None if stage == "base" else (out / stage / "manifest.json").is_file()
        place = existing(cache if stage == "base" and is_hub_name(recipe.model.name) else out)
        if not done:
            places, wanted = systems.setdefault(place.stat().st_dev, (set(), {}))
            places.add(str(place))
            wanted[stage] = room
    for places, wanted in systems.values():
        need, free = most_room(wanted), shutil.disk_usage(min(places)).free
        stages = ", ".join(
            f"{stage} {room.kept / 1e9:.1f}{f' + {room.scratch / 1e9:.1f} for a while' if room.scratch > 1e8 else ''}"
            for stage, room in wanted.items()
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
