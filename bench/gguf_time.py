"""Time the gguf stage's files against llama.cpp's converter and quantizer run by hand, on random weights.

`python -m bench.gguf_time` writes bench/results/gguf_time.md. A Qwen2 network of at least 500 MB in 16 bits goes the
stage's way (`stages.gguf.make_files`) and by hand: the converter on the command line, and `llama_model_quantize` called
with its defaults for each type, on the same number of threads. One run of each; by hand comes second, so that the
disk's cache is on its side.
"""

import ctypes
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import click

from stages import gguf
from stages.lib.artifact.digests import sha256_of
from stages.lib.artifact.folder import Run
from stages.lib.gguf.convert import HOME, type_number
from stages.lib.gguf.library import threads_for
from stages.lib.recipe.tables import Gguf
from tests.support import family_models

RESULTS = Path(__file__).parent / "results" / "gguf_time.md"
LIMIT = 1.3
TYPES = ["f16", "q8_0", "q5_k_m", "q4_k_m"]
LAYERS, WIDTH = 8, 1024


def model(folder: Path) -> int:
    """Write a random-weight Qwen2 with its real vocabulary to `folder`; return the bytes of its weights."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    family_models.base(family_models.FAMILIES["qwen2.5"], folder, **sizes)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def processor_seconds() -> float:
    """Return the processor time of this process and its ended children: what else the machine does is not in it."""
    return sum(os.times()[:4])


def by_stage(base: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of each step of the stage's own way, of the whole, and of the processors."""
    run = Run(folder)
    run.checkpoints.mkdir(parents=True)
    recipe = SimpleNamespace(path=Path("bench.toml"), model=SimpleNamespace(name="random"), gguf=Gguf(TYPES))
    started, used = time.monotonic(), processor_seconds()
    gguf.make_files(base, base, recipe, run)
    return {**run.seconds, "all": time.monotonic() - started, "all, processor time": processor_seconds() - used}


def by_hand(base: Path, folder: Path) -> dict[str, float]:
    """Return the same of llama.cpp's own converter and quantizer."""
    import llama_cpp

    folder.mkdir()
    source = folder / "model.f16.gguf"
    started, used = time.monotonic(), processor_seconds()
    command = [sys.executable, str(HOME / "convert_hf_to_gguf.py"), str(base), "--outfile", str(source)]
    subprocess.run([*command, "--outtype", "f16", "--model-name", "random bench"], check=True, capture_output=True)
    seconds = {"convert": time.monotonic() - started}
    for kind in TYPES[1:]:
        begun = time.monotonic()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = type_number(kind)
        parameters.nthread = threads_for(source)
        out = folder / f"model.{kind}.gguf"
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters)):
            raise click.ClickException(f"{out}: llama.cpp could not quantize to {kind}")
        seconds[f"quantize {kind}"] = time.monotonic() - begun
    return {**seconds, "all": time.monotonic() - started, "all, processor time": processor_seconds() - used}


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS, show_default=True)
def main(out: Path) -> None:
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = model(folder / "base")
        stage = by_stage(folder / "base", folder / "stage")
        hand = by_hand(folder / "base", folder / "hand")
        same = all(
            sha256_of(folder / "stage" / name) == sha256_of(folder / "hand" / name)
            for name in (f"model.{kind}.gguf" for kind in TYPES)
        )
    rows = "\n".join(
        f"| {name} | {stage[name]:.1f} | {hand[name]:.1f} | {stage[name] / hand[name]:.2f} |" for name in hand
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    ratio = stage["all"] / hand["all"]
    out.write_text(
        f"""# The gguf stage's files against converter and quantizer by hand

`python -m bench.gguf_time`, {datetime.date.today()}, {machine},
llama-cpp-python {importlib.metadata.version("llama-cpp-python")}; load average at the start {load:.1f}.

Qwen2 with random weights, {LAYERS} layers of width {WIDTH}, {size / 1e6:,.0f} MB of safetensors. One run of
each; seconds.

| step | stage | by hand | ratio |
|---|---:|---:|---:|
{rows}

The whole takes {ratio:.2f} times as long as by hand; wanted: at most {LIMIT}. The files are the
same to the byte: {"yes" if same else "no"}. The stage's gate comes on top of this.
"""
    )
    click.echo(out.read_text())


if __name__ == "__main__":
    main()
