"""llama.cpp's converter and quantizer."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.bounded import python_command
from stages.lib.errors import UserError
from stages.lib.gguf.library import LOG, llama_library, llama_said, threads_for
from stages.lib.recipe.tables import Recipe

if TYPE_CHECKING:
    import numpy as np

HOME = Path(sys.prefix) / "llama.cpp"


def name_of(recipe: Recipe) -> str:
    """Return general.name: llama.cpp knows Phi-3's control tokens by the base's name in it (src/llama-vocab.cpp)."""
    return f"{Path(recipe.model.name).name} {recipe.path.stem}"


def convert_model(model: Path, out: Path, kind: str, name: str) -> None:
    """Convert the model in the folder `model` to the GGUF `out` of `kind`, called `name`: see `run_converter`.

    Of layers that predict several tokens at once (MTP, Qwen3.5) transformers keeps no weights, only their count.
    """
    arguments = [str(model), "--outfile", str(out), "--outtype", kind, "--model-name", name]
    config = json.loads((model / "config.json").read_text())
    if "mtp_num_hidden_layers" in config.get("text_config", config):
        arguments.append("--no-mtp")
    run_converter(arguments)


def convert_lora(adapter: Path, base: Path, out: Path) -> None:
    """Convert the PEFT adapter in `adapter`, of the model in `base`, to the float16 GGUF `out`: see `run_converter`."""
    arguments = [str(adapter), "--base", str(base), "--outfile", str(out), "--outtype", "f16"]
    run_converter(arguments, "convert_lora_to_gguf.py")


def run_converter(arguments: list[str], name: str = "convert_hf_to_gguf.py") -> None:
    """Run llama.cpp's converter. Raises `UserError` with its last lines when it fails: no full disk loses them."""
    program = HOME / name
    if not program.is_file():
        raise UserError(f"{program}: llama.cpp's converter is not installed. Run: make setup")
    # Without PYTHONPATH: a gguf.py on it would shadow the converter's gguf package.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSTARTUP")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        python_command(program, *arguments),  # one left behind would write into the next run's file
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment | offline,
        check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stdout.decode(errors="replace").strip().splitlines()[-12:]
        raise UserError(f"{arguments[0]}: llama.cpp's converter failed ({done.returncode}):\n  " + "\n  ".join(lines))


def quantize(source: Path, out: Path, kind: str, importance: Mapping[str, "np.ndarray"] | None = None) -> None:
    """Quantize the 16-bit GGUF `source` to `out`, of llama.cpp's type `kind` ("q4_k_m"), with a matrix of `collect`.

    Raises `UserError` with llama.cpp's reason, such as a type in `NEED_IMPORTANCE` without a matrix.
    """
    llama_cpp = llama_library()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads_for(source)
    parameters.ftype = type_number(kind)
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance or {}) + 1))()  # the last, without a name, ends it
    for entry, (name, values) in zip(entries, (importance or {}).items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if importance:
        parameters.imatrix = entries
    LOG.clear()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters)):
        raise UserError(f"{out}: llama.cpp could not quantize {source.name} to {kind}:\n{llama_said()}")


def type_number(kind: str) -> int:
    """Return llama.cpp's number (LLAMA_FTYPE) of a type's lower-case name."""
    llama_cpp = llama_library()
    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return getattr(llama_cpp, f"LLAMA_FTYPE_{name}")
