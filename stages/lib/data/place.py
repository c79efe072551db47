"""The files that make up a source: a file, or those of one split in a folder laid out as on the hub."""

import itertools
import re
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError, nearest
from stages.lib.recipe.tables import DATA_SUFFIXES, GYM, PACKED_SUFFIXES, Source, is_hub_name

CARD_BYTES = 1 << 18  # the front matter of a dataset card ends before
SHARD = r"-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?"  # the hub's older names end in a hash


def files_of_source(source: Source, base_model: Path | None, data: Path | None) -> list[Path]:
    """Return the files of a source in the order they are read; none for one that is fetched or made.

    `base_model` is the artifact for a source named "base-model". `data` is a file or folder, the local copy of the
    datasets that the recipe names on the hub. Raises `UserError` for a file that does not exist, and for a dataset to
    fetch without a revision.
    """
    if source.name == GYM:
        return []
    if source.name == "base-model":
        if base_model is None:
            raise UserError(f"the recipe takes {source.split!r} problems from base-model; give --base-model FOLDER")
        return files_in(base_model / "problems", source)
    if is_hub_name(source.name):
        if data is None:
            if not source.revision:
                raise UserError(
                    f"[[data.sources]] name = {source.name!r}: {not_there(Path(source.name))}, and for a dataset "
                    f"of that name on the hub the recipe states no revision; expected a commit (40 hex digits). "
                    f"make doctor RECIPE=... shows the newest. Or give a local copy: make ... DATA=FOLDER"
                )
            return []
        owner, name = source.name.split("/")
        inside = [folder for folder in (data / owner / name, data / name) if folder.is_dir()]
        return files_in(inside[0] if inside else data, source)
    return files_in(Path(source.name), source)


def kind_of_file(path: Path) -> str:
    """Return the suffix that says how a file is read, in lower case and without .gz or .zst; "" for no dataset."""
    name = path.name.lower()
    for packed in PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    return next((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """Return a data file's name without its suffixes."""
    return path.name[: path.name.lower().rindex(kind_of_file(path))]


def files_in(path: Path, source: Source) -> list[Path]:
    """Return the files that hold the source's split in `path`: a file itself, or a folder laid out as on the hub."""
    if path.is_file():
        if not kind_of_file(path):
            raise UserError(
                f"{path}: can't be read as a dataset; expected a name that ends in {', '.join(DATA_SUFFIXES)}, or in "
                f"one of these and {' or '.join(PACKED_SUFFIXES)}. A spreadsheet: save it as CSV"
            )
        return [path]
    if not path.is_dir():
        raise UserError(f"[[data.sources]] name = {source.name!r}: {not_there(path)}")
    if listed := files_of_card(path, source):
        return listed
    places = [path / source.config] if source.config else []
    for place in (*places, path / "data", path):
        if found := files_of_split(place, source):
            return found
    all_files = sorted(file.relative_to(path).as_posix() for file in itertools.islice(path.rglob("*.*"), 1000))
    sample = ", ".join(all_files[:8]) + (", ..." if len(all_files) > 8 else "")
    usable = [name for name in all_files if kind_of_file(Path(name))]
    line = f'. For one of these files write: name = "{(path / usable[0]).as_posix()}"' if usable else ""
    raise UserError(
        f"{path}: no file of the split {source.split!r}; expected {source.split}.jsonl, .json, .csv or .parquet, or "
        f"{source.config or 'data'}/{source.split}-00000-of-00001.parquet; found {sample or 'nothing'}{line}"
    )


def not_there(path: Path) -> str:
    """Return that there is no such file or folder, with the nearest name beside it."""
    there = itertools.islice(path.parent.iterdir(), 10_000) if path.parent.is_dir() else ()
    return f"there is no such file or folder{nearest(path.name, sorted(each.name for each in there))}"


def files_of_split(place: Path, source: Source) -> list[Path]:
    """Return the files in a folder that are named after the split: one, its shards, or a folder of it."""
    candidates = data_files(place)
    names = [source.split, *([f"{source.config}-{source.split}"] if source.config else [])]
    wholes = [file for file in candidates if stem_of(file) in names]
    shard = re.compile("(?:" + "|".join(map(re.escape, names)) + ")" + SHARD)
    shards = [(file, match) for file in candidates if (match := shard.fullmatch(stem_of(file)))]
    inside = data_files(place / source.split)
    groups = [group for group in (wholes, [file for file, _ in shards], inside) if group]
    if len(wholes) > 1 or len(groups) > 1:
        found = ", ".join(file.relative_to(place).as_posix() for file in itertools.chain(*groups[:2]))
        raise UserError(f"{place}: the split {source.split!r} is there more than once ({found}); name one file")
    if shards:
        count = int(shards[0][1][2])
        if [int(match[1]) for _, match in shards] != list(range(count)):
            raise UserError(f"{place}: has {len(shards)} of the {count} files of the split {source.split!r}")
    return groups[0] if groups else []


def data_files(folder: Path) -> list[Path]:
    """Return the data files that lie in a folder, by name; none for a folder that is not there."""
    return sorted(file for file in folder.glob("*") if kind_of_file(file) and file.is_file())


def files_of_card(path: Path, source: Source) -> list[Path]:
    """Return the files that a dataset card (README.md) lists for the source's configuration and split; [] if none.

    Raises `UserError` for a listed file that is not there.
    """
    patterns = [pattern for pattern in listed_patterns(path / "README.md", source) if isinstance(pattern, str)]
    found: list[Path] = []
    for pattern in patterns:
        matches = files_inside(path, pattern)
        if not matches:
            raise UserError(
                f"{path / 'README.md'}: lists {pattern[:200]!r} for the split {source.split!r}; there is no such file"
            )
        if unknown := [file for file in matches if not kind_of_file(file)]:
            raise UserError(f"{unknown[0]}: can't be read as a dataset, and {path / 'README.md'} lists it as one")
        found += [file for file in matches if file not in found]
    if len({file.name for file in found}) < len(found):
        raise UserError(
            f"{path}: {path.name}/README.md lists files of one name for the split {source.split!r}; name one"
        )
    return found


def files_inside(path: Path, pattern: str) -> list[Path]:
    """Return the files in the folder `path` that a pattern of a dataset card names; [] for one that leads outside.

    And for one that is none, or with more than two **: a search takes the more steps by the power of their number.
    """
    parts = Path(pattern).parts
    if not pattern.strip("./") or Path(pattern).is_absolute() or ".." in parts or parts.count("**") > 2:
        return []
    try:
        return sorted(file for file in path.glob(pattern) if file.is_file())
    except (ValueError, OSError, RecursionError):  # "**x", a name too long, a thousand folders
        return []


def head_of(card: Path) -> str:
    """Return the first `CARD_BYTES` of a dataset card, as text."""
    with card.open("rb") as file:
        return file.read(CARD_BYTES).decode(errors="replace")


def listed_patterns(card: Path, source: Source) -> list[Any]:
    """Return the paths in the `data_files` of a dataset card's front matter, for the source."""
    if not card.is_file():
        return []
    front = re.match(r"---\r?\n(.*?)\r?\n---", head_of(card), re.DOTALL)
    if front is None:
        return []
    import yaml

    try:
        # Texts, lists and tables alone: no dates, and no << that makes gigabytes of a few lines
        fields = yaml.load(front[1], yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{card}: its first lines are not YAML ({str(error).splitlines()[0]})") from error
    configs = fields.get("configs") if isinstance(fields, dict) else None
    configs = [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []
    wanted = [each for each in configs if each.get("config_name") == (source.config or "default")]
    if not source.config and not wanted and len(configs) == 1:
        wanted = configs
    listed = wanted[0].get("data_files") if wanted else None
    if isinstance(listed, dict):  # split: path
        listed = [{"split": split, "path": path} for split, path in listed.items()]
    if not isinstance(listed, list):  # files for all: they make up the split "train"
        listed = [{"split": "train", "path": listed}] if listed else []
    if all(isinstance(each, str) for each in listed):
        listed = [{"split": "train", "path": listed}] if listed else []
    paths = [each.get("path") for each in listed if isinstance(each, dict) and each.get("split") == source.split]
    return [each for path in paths for each in (path if isinstance(path, list) else [path])]
