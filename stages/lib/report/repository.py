"""The files of each repository on the hub: those of the stages, each checked, and those made for the upload."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.artifact.digests import sha256_of
from stages.lib.artifact.manifest import LOGS, MANIFEST, OUTSIDE
from stages.lib.errors import UserError
from stages.lib.ollama import modelfile
from stages.lib.recipe.tables import Recipe, is_hub_name

# What a model repository needs, and nothing that can harm those who load it: no pickles, no code, no logs.
SUFFIXES = (".gguf", ".jinja", ".json", ".md", ".model", ".png", ".safetensors", ".txt")
WITHOUT_SUFFIX = ("Modelfile",)


@dataclass(frozen=True)
class Kind:
    """One kind of upload. `sources`: (stage, folder in its artifact) each; only the first must have files."""

    suffix: str  # of the repository's name
    title: str
    sources: tuple[tuple[str, str], ...]


KINDS = {
    "merged_16bit": Kind("", "The model in 16 bits", (("merge", "model/"),)),
    "merged_4bit": Kind("-4bit", "The model in 4 bits (bitsandbytes NF4)", (("merge", "model-4bit/"),)),
    "lora": Kind(
        "-LoRA", "The LoRA adapter of the model", (("grpo", "adapter/"), ("grpo", "tokenizer/"), ("gguf", ""))
    ),
    "gguf": Kind(
        "-GGUF", "The model as GGUF files, for llama.cpp and Ollama", (("gguf", ""), ("ollama-modelfile", ""))
    ),
}


@dataclass(frozen=True)
class File:
    """A file of a repository: its name there, and its content or the path to it."""

    name: str
    source: Path | bytes
    size: int  # bytes
    sha256: str

    @property
    def content(self) -> bytes:
        """The whole content, in memory."""
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source


def repositories(name: str, kinds: Sequence[str]) -> dict[str, str]:
    """Return the repository of each kind: `name` with the kind's suffix."""
    return {kind: name + KINDS[kind].suffix for kind in kinds}


def collect(
    kind: str, folders: Mapping[str, Path], manifests: Mapping[str, Mapping[str, Any]], recipe: Recipe
) -> list[File]:
    """Return the files of one kind of upload, without the card, each checked against its manifest's sha256.

    Raises `UserError` when there are none, for a symbolic link or a file that its manifest does not name, for a suffix
    not in SUFFIXES, and for another sha256 than the manifest's.
    """
    chosen: dict[str, tuple[str, str]] = {}  # name in the repository: stage, name in its artifact
    for stage, prefix in KINDS[kind].sources:
        refuse_unknown(folders[stage], stage, manifests[stage])
        for name in manifests[stage]["files"]:
            short = name.removeprefix(prefix)
            if name.startswith(prefix) and "/" not in short and takes(kind, stage, short):
                chosen[short] = (stage, name)
    if not any(stage == KINDS[kind].sources[0][0] for stage, _ in chosen.values()):
        stage, prefix = KINDS[kind].sources[0]
        raise UserError(
            f"{folders[stage] / prefix}: holds no {kind}; expected what `save` of the recipe names "
            f"(merged_4bit needs an NVIDIA GPU). Add {kind!r} to save and run: make {stage}"
        )
    files = []
    for short, (stage, name) in sorted(chosen.items()):
        path = folders[stage] / name
        if path.suffix not in SUFFIXES and short not in WITHOUT_SUFFIX:
            raise UserError(
                f"{path}: is not uploaded; expected only {', '.join((*SUFFIXES, *WITHOUT_SUFFIX))}. Move it away, or "
                f"leave {kind} out with --what"
            )
        entry = manifests[stage]["files"][name]
        if sha256_of(path) != entry["sha256"]:
            raise UserError(
                f"{path}: is not the file that {stage} wrote: its sha256 is not the manifest's. "
                f"Delete {folders[stage]} and run: make {stage}"
            )
        files.append(File(short, path, entry["bytes"], entry["sha256"]))
    if kind == "lora":
        place = next(place for place, file in enumerate(files) if file.name == "adapter_config.json")
        files[place] = of_text("adapter_config.json", adapter_config(files[place].content, recipe))
    if kind == "gguf":
        files += ollama_files(folders["ollama-modelfile"] / "Modelfile", {file.name for file in files})
    return files


def takes(kind: str, stage: str, name: str) -> bool:
    """Return whether a kind of upload takes the file `name` of a stage."""
    if stage == "gguf":
        return name.startswith("adapter") if kind == "lora" else not name.startswith("adapter")
    return stage != "ollama-modelfile" or name == "Modelfile"  # the GGUF beside it is gguf's


def refuse_unknown(folder: Path, stage: str, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` when an artifact holds a symbolic link, or a file that its manifest does not name."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        known = path.is_dir() or name in (MANIFEST, OUTSIDE) or name.startswith(f"{LOGS}/")
        if path.is_symlink() or not (known or name in manifest["files"]):
            found = "is a symbolic link" if path.is_symlink() else f"was not written by {stage}"
            raise UserError(f"{path}: {found}; expected only files that {folder / MANIFEST} names. Move it away")


def of_text(name: str, text: str) -> File:
    """Return the file `name` of a repository, made from `text`."""
    content = text.encode()
    return File(name, content, len(content), hashlib.sha256(content).hexdigest())


def adapter_config(content: bytes, recipe: Recipe) -> str:
    """Return adapter_config.json with hub name and revision of the base instead of a path on this disk."""
    settings = json.loads(content)
    on_hub = is_hub_name(recipe.model.name) and not recipe.model.hub
    is_name = is_hub_name(recipe.model.name)
    settings["base_model_name_or_path"] = recipe.model.name if is_name else Path(recipe.model.name).name
    settings["revision"] = recipe.model.revision if on_hub else None
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def ollama_files(path: Path, beside: set[str]) -> list[File]:
    """Return `template`, `system` and `params`, which `ollama run hf.co/...` reads in the place of a Modelfile.

    Without them it guesses a stock template: https://huggingface.co/docs/hub/ollama. Raises `UserError` when FROM of
    the Modelfile names no file in `beside`.
    """
    commands = modelfile.read(path)
    (source,) = modelfile.values(commands, "from")
    if source.removeprefix("./") not in beside:
        raise UserError(f"{path}: FROM {source} names no GGUF file of this upload. Run: make ollama-modelfile")
    files = [of_text("template", text) for text in modelfile.values(commands, "template")]
    files += [of_text("system", text) for text in modelfile.values(commands, "system")]
    params: dict[str, Any] = {}
    for name, value in commands:
        if name == "parameter stop":
            params.setdefault("stop", []).append(value)
        elif name.startswith("parameter "):
            params[name.removeprefix("parameter ")] = json.loads(value)
    return [*files, of_text("params", json.dumps(params, indent=2, ensure_ascii=False) + "\n")]
