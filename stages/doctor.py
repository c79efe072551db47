"""Look whether this machine can carry a recipe to its end, before the run is paid for, and say what to do if not."""

import concurrent.futures
import contextlib
import email.utils
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click

from stages.lib import memory, options, sources
from stages.lib.errors import UserError
from stages.lib.recipe import Recipe, is_hub_name, read_recipe

MIN_DRIVER = 580  # what CUDA 13's libraries run on (CUDA 13.0 release notes, table 3)
MIN_CAPABILITY = (7, 5)  # the oldest that CUDA 13 compiles for; vLLM asks for no less, bitsandbytes for 6.0
BFLOAT16_CAPABILITY = (8, 0)
MIN_SHARED_BYTES = 1 << 30  # Docker's own default is 64 MB
IMAGE_BYTES = 9_810_000_000  # the CUDA image; as much again while its layers are written
SYSTEM_BYTES = 4_000_000_000  # Python, torch and the operating system, beside a model
COMMAND_SECONDS = 5  # nvidia-smi and docker, side by side
HUB_SECONDS = 4  # after these: where it is looked for copies depends on Docker
TOKENIZER_SECONDS = 9  # from the doctor's start
CLOCK_SECONDS = 300  # farther off, signed download addresses and certificates count as expired
GATED = ("google/gemma", "meta-llama/")  # where no answer of the hub says so
SHARED_MEMORY = Path("/dev/shm")
MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
ARTIFACTS = Path("artifacts")
CONTAINER_CACHE = Path("data/cache")
GPU_FIELDS = "name,driver_version,memory.total,memory.free,compute_cap"
NEW_DRIVER = (
    "install driver 580 or newer (Ubuntu: sudo apt-get install nvidia-driver-580-server-open nvidia-utils-580-server, "
    "then sudo reboot), or rent a machine image that has CUDA 13"
)
WATCH = "watch nvidia-smi and df in the first steps of sft and grpo"
TOOLKIT = (
    "install nvidia-container-toolkit (docs/rented-gpu.md), then: sudo nvidia-ctk runtime configure --runtime=docker "
    "&& sudo systemctl restart docker"
)


@click.command(help=__doc__)
@options.recipe
def main(recipe: Path) -> None:
    failed = 0
    for finding in examine(read_recipe(recipe)):
        failed += finding.status == "fail"
        click.echo(finding.line)
    if failed:
        click.echo(f"doctor: {failed} thing{'s' if failed > 1 else ''} to mend before make all RECIPE={recipe.stem}")
        raise SystemExit(1)
    click.echo(f"doctor: nothing stands in the way of make all RECIPE={recipe.stem}")


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to do about it unless it is fine."""

    status: Literal["ok", "warn", "fail"]
    name: str
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The finding as a line for the terminal."""
        text = f"{self.status:4}  {self.name}: {self.found}"
        return f"{text}. To do: {self.remedy}" if self.remedy else text


def examine(recipe: Recipe) -> Iterator[Finding]:
    """Yield the findings on this machine for `recipe`, in less than 10 s."""
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        devices_asked = pool.submit(ask_devices, recipe)
        engine = docker_info()
        cache = hub_cache(in_container=engine[0] == 0 and os.environ.get("RUNTIME") != "local")
        model = local_model(recipe, cache)
        tokenizer = start_tokenizer_check(recipe, model, cache)
        data_findings, urls = data_places(recipe)
        datasets = list(urls)
        if model is None and is_hub_name(recipe.model.name):
            urls[recipe.model.name] = f"{endpoint()}/{recipe.model.name}/resolve/{recipe.model.revision}/config.json"
        asked = pool.submit(ask_hub, urls)
        shape, without = shape_of(recipe, model)
        yield from gpu(recipe, shape, devices_asked.result())
        if shape is None:
            yield Finding("warn", "estimate", f"none of memory and disk: {without}", WATCH)
        yield from docker(recipe, engine)
        yield shared_memory(recipe)
        if shape is not None:
            yield system_memory(shape)
            yield from disk(recipe, shape, model, cache)
        yield from image_room(recipe, engine)
        answers = asked.result()
    yield model_finding(recipe, model, answers)
    yield from data_findings
    unpinned = {source.name for source in recipe.data.sources if not source.revision}
    for name in datasets:
        finding = hub_finding("data", name, answers[name])
        yield unpinned_finding(finding, answers[name].commit) if name in unpinned else finding
    yield token(recipe, model, answers)
    yield clock(answers)
    yield tokenizer_finding(tokenizer, recipe, started + TOKENIZER_SECONDS)


def output_of(*command: str) -> tuple[int | None, str]:
    """Return exit code and output of `command`, or its complaint; None, and why, if there is none or no answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    except FileNotFoundError:
        return None, f"there is no program {command[0]}"
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} did not answer within {COMMAND_SECONDS} s"
    if done.returncode:
        return done.returncode, done.stderr.strip() or done.stdout.strip()
    return 0, done.stdout.strip()


def gigabytes(count: float) -> str:
    """Return bytes as "12.3 GB"."""
    return f"{count / 1e9:.1f} GB"


# ---- the model's shape --------------------------------------------------------------------------------------------


def hub_cache(in_container: bool) -> Path:
    """Return where huggingface_hub keeps what it fetched: by the variables it goes by, or as docker/run sets them."""
    if in_container:
        return CONTAINER_CACHE / "huggingface" / "hub"
    return Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()


def hub_home() -> Path:
    """Return the folder of huggingface_hub's cache and login, by the variables it goes by."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or home)


def local_model(recipe: Recipe, cache: Path) -> Path | None:
    """Return the folder, of the recipe or in the hub's `cache`, that holds the whole model; None if none does."""
    name = recipe.model.name
    if name == "base-model":
        folder = ARTIFACTS / recipe.path.stem / "base-model" / "model"
    elif is_hub_name(name):
        folder = cache / f"models--{name.replace('/', '--')}" / "snapshots" / recipe.model.revision
    else:
        folder = Path(name)
    return folder if is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Say whether `folder` has config.json and every safetensors file that its index names."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        return all((folder / name).is_file() for name in json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError):  # cut short
        return False


def shape_of(recipe: Recipe, model: Path | None) -> tuple[memory.Shape | None, str]:
    """Return the shape of the recipe's model, from its config.json or the table of known ones; None, and why not."""
    if model is not None:
        try:
            return memory.shape_of(json.loads((model / "config.json").read_text()), str(model)), ""
        except UserError as error:
            return None, error.message
        except ValueError as error:
            return None, f"{model / 'config.json'} is not JSON ({error}): copy it again"
    known = memory.SHAPES.get(recipe.model.name)
    return known, "" if known else f"there is no copy of {recipe.model.name} here to read config.json from"


# ---- GPU ----------------------------------------------------------------------------------------------------------


def ask_devices(recipe: Recipe) -> tuple[int | None, str]:
    """Return exit code and output of nvidia-smi on the first GPU that GPUS names, if the recipe needs one."""
    if recipe.model.engine != "unsloth":
        return None, ""
    first = os.environ.get("GPUS", "").split(",")[0]
    chosen = [f"--id={first}"] if first.isdigit() else []
    return output_of("nvidia-smi", *chosen, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits")


def gpu(recipe: Recipe, shape: memory.Shape | None, devices: tuple[int | None, str]) -> Iterator[Finding]:
    """Yield what is to be said of driver, compute capability and GPU memory, by what nvidia-smi said of `devices`."""
    if recipe.model.engine != "unsloth":
        yield Finding("ok", "GPU", f"not needed: engine = {recipe.model.engine!r} also runs on a CPU")
        return
    if os.environ.get("GPUS") == "none":
        yield Finding("fail", "GPU", "GPUS=none, and engine = 'unsloth' needs one", "leave GPUS out, or set GPUS=0")
        return
    code, text = devices
    if code != 0:
        yield no_gpu(code, text)
        return
    name, driver, total, free, capability = (field.strip() for field in text.splitlines()[0].split(","))
    if int(driver.split(".")[0]) < MIN_DRIVER:
        yield Finding("fail", "driver", f"{driver}; CUDA 13's wheels need {MIN_DRIVER} or newer", NEW_DRIVER)
    else:
        yield Finding("ok", "driver", driver)
    yield capability_finding(name, capability, recipe.model.dtype)
    if not total.isdigit() or not free.isdigit():
        found = f"nvidia-smi tells no size ({total}), as where GPU and system share their memory"
        yield Finding("warn", "GPU memory", found, WATCH)
    elif shape is not None:
        yield from gpu_memory(recipe, shape, int(total) << 20, int(free) << 20)


def no_gpu(code: int | None, text: str) -> Finding:
    """Return what it means that nvidia-smi ended with `code` and said `text`."""
    said = " ".join(text.split())[:200]
    if "version mismatch" in text:
        return Finding("fail", "driver", f"was updated under a running one ({said})", "sudo reboot")
    if "No devices were found" in text:
        return Finding(
            "fail", "GPU", "the driver finds none", "rent a machine with a GPU, or mend GPUS (nvidia-smi -L lists them)"
        )
    if "is not a valid field" in text:
        return Finding("fail", "driver", f"is so old that nvidia-smi does not know a field ({said})", NEW_DRIVER)
    if code is None or "couldn't communicate" in text:
        return Finding("fail", "driver", f"none answers ({said})", NEW_DRIVER)
    return Finding("fail", "GPU", f"nvidia-smi failed ({code}): {said}", "sudo reboot, or take another machine")


def capability_finding(name: str, capability: str, dtype: str) -> Finding:
    """Return whether a GPU of this compute capability ("9.0") runs the locked wheels, and the recipe's dtype."""
    found = f"{name}, compute capability {capability}"
    version = tuple(int(part) for part in capability.split("."))
    if version < MIN_CAPABILITY:
        return Finding(
            "fail", "GPU", f"{found}; CUDA 13 and vLLM need 7.5 or newer",
            "take a newer GPU: L4, A10, A100, L40S, RTX 3090 or newer",
        )  # fmt: skip
    if dtype == "bfloat16" and version < BFLOAT16_CAPABILITY:
        return Finding(
            "fail", "GPU", f"{found}; [model] dtype = 'bfloat16' needs 8.0 or newer",
            "take a newer GPU (L4, A10, A100, ...), or set dtype = 'float16', in which Gemma 3 overflows",
        )  # fmt: skip
    return Finding("ok", "GPU", found)


def estimates(recipe: Recipe, shape: memory.Shape, gpu_bytes: int) -> dict[str, memory.Estimate]:
    """Return what each stage that fills the GPU needs of its `gpu_bytes`, by name."""
    common = {
        "engine": recipe.model.engine, "dtype": recipe.model.dtype, "load_in_4bit": recipe.model.load_in_4bit,
        "rank": recipe.lora.rank, "target_modules": recipe.lora.target_modules,
    }  # fmt: skip
    vllm = {} if recipe.vllm is None else {
        "vllm_memory_share": recipe.vllm.memory_share, "vllm_sequences": recipe.vllm.sequences,
        "vllm_standby": recipe.vllm.standby,
    }  # fmt: skip
    return {
        "sft": memory.sft(
            shape, **common, optimizer=recipe.sft.optimizer, micro_batch_size=recipe.sft.micro_batch_size,
            max_tokens=recipe.sft.max_tokens, checkpointing=recipe.sft.gradient_checkpointing,
        ),
        "grpo": memory.grpo(
            shape, **common, **vllm, optimizer=recipe.grpo.optimizer, micro_batch_size=recipe.grpo.micro_batch_size,
            completions_per_step=recipe.grpo.prompts_per_step * recipe.grpo.completions_per_prompt,
            prompt_tokens=recipe.data.max_prompt_tokens, completion_tokens=recipe.grpo.max_completion_tokens,
            checkpointing=recipe.grpo.gradient_checkpointing, gpu_bytes=gpu_bytes,
        ),
        "merge and gguf": memory.comparison(shape),
    }  # fmt: skip


def gpu_memory(recipe: Recipe, shape: memory.Shape, total: int, free: int) -> Iterator[Finding]:
    """Yield whether the estimates fit into the GPU's memory, `total` and `free` in bytes, and vLLM into its share."""
    for stage, estimate in estimates(recipe, shape, total).items():
        largest = sorted(estimate.parts.items(), key=lambda part: -part[1])[:4]
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest if size > 5e7)
        found = f"{stage} needs about {gigabytes(estimate.peak_bytes)} ({parts}, ...)"
        if estimate.peak_bytes <= free:
            yield Finding("ok", "GPU memory", f"{found} of {gigabytes(free)} free")
        elif stage == "merge and gguf":
            yield Finding(
                "warn", "GPU memory",
                f"{found} and {gigabytes(free)} are free: they compare on the CPU, which takes hours",
                "take a larger GPU, or run make merge gguf on another machine",
            )  # fmt: skip
        elif estimate.peak_bytes <= total:
            yield Finding(
                "fail", "GPU memory", f"{found}; {gigabytes(free)} of {gigabytes(total)} are free",
                "end what else uses the GPU (nvidia-smi lists it), or choose another with GPUS=1",
            )  # fmt: skip
        elif least_bytes(estimate, recipe, shape) <= total:
            share = "" if stage == "sft" else " or lower [vllm] memory_share"
            yield Finding(
                "warn", "GPU memory", f"{found} and there are {gigabytes(total)}: {stage} would have to step down",
                f"halve [{stage}] micro_batch_size{share} yourself, or take a larger GPU",
            )  # fmt: skip
        else:
            yield Finding(
                "fail", "GPU memory", f"{found} and there are {gigabytes(total)}",
                "take a larger GPU" + ("" if recipe.model.load_in_4bit else ", or set [model] load_in_4bit = true"),
            )  # fmt: skip
    if recipe.vllm is not None and recipe.model.engine == "unsloth":
        yield vllm_share(recipe, shape, total)


def least_bytes(estimate: memory.Estimate, recipe: Recipe, shape: memory.Shape) -> int:
    """Return what is left of `estimate` at the end of the ladder: one example at a time, vLLM with one sequence."""
    shrinking = ("layer inputs", "activations", "logits", "fragments", "KV cache")
    stays = sum(size for name, size in estimate.parts.items() if name not in shrinking)
    if "KV cache" not in estimate.parts:
        return stays
    return stays + memory.kv_bytes(shape, recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens)


def vllm_share(recipe: Recipe, shape: memory.Shape, total: int) -> Finding:
    """Return whether vLLM's share of the `total` bytes holds the weights and at least one completion's KV cache."""
    share = recipe.vllm.memory_share
    length = recipe.data.max_prompt_tokens + recipe.grpo.max_completion_tokens
    one = memory.kv_bytes(shape, length)
    held = memory.weight_bytes(shape, recipe.model.dtype, recipe.model.load_in_4bit)
    held += memory.vllm(shape, recipe.vllm.sequences)["vLLM"]
    room = int(share * total) - held
    found = f"[vllm] memory_share = {share} is {gigabytes(share * total)}, {gigabytes(held)} of it for weights and vLLM"
    if room < one:
        return Finding(
            "fail", "vLLM", f"{found}; one completion of {length:,} tokens needs {gigabytes(one)} more",
            f"raise memory_share to {math.ceil(100 * (held + one) / total) / 100:.2f} or more, twice that for speed",
        )  # fmt: skip
    side_by_side = min(room // one, recipe.vllm.sequences)
    return Finding("ok", "vLLM", f"{found}; {side_by_side} full-length completions side by side")


# ---- Docker -------------------------------------------------------------------------------------------------------


def docker_info() -> tuple[int | None, str]:
    """Return exit code and output of `docker info` as JSON; DOCKER names another client."""
    code, text = output_of(os.environ.get("DOCKER") or "docker", "info", "--format", "{{json .}}")
    errors = json.loads(text).get("ServerErrors") if code == 0 else None  # older clients end with 0 all the same
    return (1, errors[0]) if errors else (code, text)


def docker(recipe: Recipe, engine: tuple[int | None, str]) -> Iterator[Finding]:
    """Yield whether an engine answers and can hand a GPU to a container, or else whether stages can run without."""
    code, text = engine
    wanted = os.environ.get("RUNTIME", "")
    if wanted == "local":
        yield from local_runtime(recipe, "RUNTIME=local")
    elif code != 0:
        said = " ".join(text.split())[:200]
        if wanted == "docker":
            yield Finding("fail", "Docker", f"no engine answers ({said})", docker_remedy(said))
        else:
            yield from local_runtime(recipe, f"no Docker engine answers ({said}), so stages run without")
    else:
        stated = json.loads(text)
        version = stated.get("ServerVersion") or stated.get("version", {}).get("Version", "of unknown version")
        if recipe.model.engine != "unsloth" or has_gpu_runtime(stated):
            yield Finding("ok", "Docker", f"engine {version}")
        else:
            found = f"engine {version} has no NVIDIA runtime, so containers see no GPU"
            yield Finding("fail", "Docker", found, TOOLKIT)


def docker_remedy(said: str) -> str:
    """Return what to do about a Docker engine that does not answer, by what its client `said`."""
    if "permission denied" in said:
        return "sudo usermod -aG docker $USER, then log out and in again"
    if "there is no program" in said:
        return "install Docker (docs/rented-gpu.md), or use RUNTIME=local"
    return "sudo systemctl start docker"


def has_gpu_runtime(stated: dict) -> bool:
    """Say whether the engine that `stated` this can give GPUs to containers: as a runtime of its own, or by CDI."""
    if "nvidia" in (stated.get("Runtimes") or {}) or shutil.which("nvidia-container-runtime-hook"):
        return True
    found = [str(device.get("ID")) for device in stated.get("DiscoveredDevices") or []]
    files = [file for folder in CDI_FOLDERS if folder.is_dir() for file in folder.iterdir() if "nvidia" in file.name]
    return any(name.startswith("nvidia.com/gpu") for name in found) or bool(files)


def local_runtime(recipe: Recipe, why: str) -> Iterator[Finding]:
    """Yield whether stages can run in this environment itself."""
    if recipe.model.engine != "unsloth":
        yield Finding("ok", "Docker", f"not needed: {why}")
        return
    missing = [name for name in ("torch", "unsloth", "vllm") if importlib.util.find_spec(name) is None]
    missing += [] if shutil.which("cc") else ["a C compiler (Triton calls it)"]
    if missing:
        yield Finding(
            "fail", "Docker", f"{why}; and engine = 'unsloth' lacks {', '.join(missing)} here",
            "install and start Docker (docs/rented-gpu.md), and use RUNTIME=docker",
        )  # fmt: skip
    else:
        yield Finding("ok", "Docker", f"not needed: {why}, and this environment has what engine = 'unsloth' needs")


# ---- memory and disk ----------------------------------------------------------------------------------------------


def shared_memory(recipe: Recipe) -> Finding:
    """Return whether /dev/shm has room for what processes on the GPU exchange."""
    if recipe.model.engine != "unsloth":
        return Finding("ok", "/dev/shm", "not needed on a CPU")
    remedy = "in a container of your own: docker run --ipc host; else: sudo mount -o remount,size=8G /dev/shm"
    if not SHARED_MEMORY.is_dir():
        return Finding("fail", "/dev/shm", "is not there", remedy)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < MIN_SHARED_BYTES:
        return Finding("fail", "/dev/shm", f"{free / 1e6:.0f} MB free; vLLM and NCCL want 1 GB", remedy)
    return Finding("ok", "/dev/shm", f"{gigabytes(free)} free")


def system_memory(shape: memory.Shape) -> Finding:
    """Return whether this machine's memory holds the model in float32, which merge and gguf load once each."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", MEMINFO.read_text(), re.M))
    total, available = (int(fields[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    with contextlib.suppress(FileNotFoundError):
        limit = CGROUP_LIMIT.read_text().strip()
        total, available = (min(value, int(limit)) if limit.isdigit() else value for value in (total, available))
    need = memory.weight_bytes(shape, "float32") + SYSTEM_BYTES
    found = f"merge and gguf need about {gigabytes(need)}; {gigabytes(available)} of {gigabytes(total)} are available"
    if need > total:
        return Finding("fail", "memory", found, "take a machine with more memory")
    if need > available:
        return Finding("warn", "memory", found, "end other programs before merge")
    return Finding("ok", "memory", found)


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def rooms(recipe: Recipe, shape: memory.Shape) -> dict[str, memory.Room]:
    """Return what each stage of `recipe` adds to the disk, by its name."""
    return memory.disk(
        shape, types=recipe.gguf.types, rank=recipe.lora.rank, target_modules=recipe.lora.target_modules,
        merge_positions=recipe.merge.prompts * recipe.merge.positions_per_prompt,
        gguf_positions=recipe.gguf.prompts * recipe.gguf.positions_per_prompt, recommended=recipe.ollama.quantization,
        save=recipe.save,
    )  # fmt: skip


def disk(recipe: Recipe, shape: memory.Shape, model: Path | None, cache: Path) -> Iterator[Finding]:
    """Yield, for each file system that stages write to, whether there is room for those that are not finished."""
    out = ARTIFACTS / recipe.path.stem
    systems: dict[int, tuple[set[str], dict[str, memory.Room]]] = {}
    for stage, room in rooms(recipe, shape).items():
        done = model is not None if stage == "base" else (out / stage / "manifest.json").is_file()
        place = existing(cache if stage == "base" and is_hub_name(recipe.model.name) else out)
        if not done:
            places, wanted = systems.setdefault(place.stat().st_dev, (set(), {}))
            places.add(str(place))
            wanted[stage] = room
    for places, wanted in systems.values():
        need, free = memory.most_room(wanted), shutil.disk_usage(min(places)).free
        each = ", ".join(
            f"{stage} {room.kept / 1e9:.1f}{f' + {room.scratch / 1e9:.1f} for a while' if room.scratch > 1e8 else ''}"
            for stage, room in wanted.items()
            if room.kept + room.scratch > 5e7
        )
        found = f"{', '.join(sorted(places))}: {gigabytes(free)} free; needs {gigabytes(need)}"
        found += f" ({each})" if each else ""
        if need > free:
            remedy = "free some, or put artifacts/ and HF_HOME on a larger disk; fewer [gguf] types need less"
            yield Finding("fail", "disk", found, remedy)
        else:
            yield Finding("ok", "disk", found)
    if not systems:
        yield Finding("ok", "disk", "every stage is finished")


def image_room(recipe: Recipe, engine: tuple[int | None, str]) -> Iterator[Finding]:
    """Yield a warning when Docker's own folder may have too little room to build the CUDA image."""
    if recipe.model.engine != "unsloth" or os.environ.get("RUNTIME") == "local" or engine[0] != 0:
        return
    folder = Path(json.loads(engine[1]).get("DockerRootDir") or "/var/lib/docker")
    free = shutil.disk_usage(existing(folder)).free
    if free < 2 * IMAGE_BYTES:
        yield Finding(
            "warn", "disk", f"Docker's {folder} has {gigabytes(free)} free; building the CUDA image takes up to "
            f"{gigabytes(2 * IMAGE_BYTES)}", "if it is not built yet: docker system prune, or a larger disk",
        )  # fmt: skip


# ---- network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the hub answered: an HTTP status, or None and why there was none; its clock's offset from ours, seconds.

    `commit` is that of the repository at the revision that was asked for, where the hub says so.
    """

    status: int | None
    reason: str = ""
    ahead_seconds: float | None = None
    commit: str | None = None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are an answer, and not followed: urllib would take the token along to another host."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""
        return None


def endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT, as for huggingface_hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def ask_hub(urls: dict[str, str]) -> dict[str, Answer]:
    """Return the hub's answer to a HEAD request for each address, by its name, all asked at once."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return {name: Answer(None, "HF_HUB_OFFLINE is set") for name in urls}
    answers = {name: Answer(None, f"no answer within {HUB_SECONDS} s") for name in urls}
    threads = []
    for name, url in urls.items():
        # A daemon, for the look-up of a host's name knows no time limit.
        threads.append(threading.Thread(target=lambda n=name, u=url: answers.update({n: ask(u)}), daemon=True))
        threads[-1].start()
    deadline = time.monotonic() + HUB_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def ask(url: str) -> Answer:
    """Return the answer to one HEAD request."""
    token = hub_token()
    headers = {"Authorization": f"Bearer {token}"} if is_token(token) else {}
    try:
        request = urllib.request.Request(url, headers=headers, method="HEAD")
        trust = ssl.create_default_context(cafile=os.environ.get("CA_BUNDLE") or None)
        opener = urllib.request.build_opener(NoRedirect, urllib.request.HTTPSHandler(context=trust))
        with opener.open(request, timeout=HUB_SECONDS) as reply:
            return Answer(reply.status, "", ahead(reply.headers.get("Date")), reply.headers.get("X-Repo-Commit"))
    except urllib.error.HTTPError as error:
        commit = error.headers.get("X-Repo-Commit")  # a redirect comes here as well
        return Answer(error.code, str(error.reason), ahead(error.headers.get("Date")), commit)
    except (OSError, ValueError) as error:  # URLError, time-outs and TLS are OSErrors; ValueError: no such address
        return Answer(None, str(getattr(error, "reason", error)))


def ahead(date: str | None) -> float | None:
    """Return by how many seconds the clock that wrote this HTTP date is ahead of ours."""
    return None if date is None else email.utils.parsedate_to_datetime(date).timestamp() - time.time()


def hub_token() -> str:
    """Return the token in HF_TOKEN or, which no container would see, that of `hf auth login`; "" if there is none."""
    if os.environ.get("HF_TOKEN") or os.environ.get("RUNTIME") != "local":
        return os.environ.get("HF_TOKEN", "")
    stored = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    return stored.read_text().strip() if stored.is_file() else ""


def is_token(token: str) -> bool:
    """Say whether this can be sent as a token: one visible word."""
    return re.fullmatch(r"[!-~]+", token) is not None


def hub_finding(what: Literal["model", "data"], name: str, answer: Answer) -> Finding:
    """Return whether the hub would give the repository `name`."""
    if answer.status is None:
        copy = "a local folder as [model] name" if what == "model" else "make ... DATA=FOLDER"
        hint = "; behind a proxy that inspects TLS: CA_BUNDLE=FILE" if "CERTIFICATE" in answer.reason else ""
        remedy = f"mend the network, or set HF_ENDPOINT to a mirror, or give a copy ({copy}){hint}"
        found = f"{name}: no copy here, and {endpoint()} does not answer ({answer.reason})"
        return Finding("fail", what, found, remedy)
    if answer.status < 400:
        return Finding("ok", what, f"{name}: {endpoint()} has it")
    if answer.status in (401, 403):
        return Finding("fail", what, f"{name}: the hub refuses it ({answer.status})", "see token, and check the name")
    if answer.status == 404:
        return Finding("fail", what, f"{name}: not at this revision on the hub", "mend name and revision in the recipe")
    return Finding("warn", what, f"{name}: the hub answers {answer.status} {answer.reason}", "try again later")


def unpinned_finding(finding: Finding, commit: str | None) -> Finding:
    """Return what was found of a dataset, and that the recipe states no revision; `commit` is the newest, if known."""
    found = f"{finding.found}, and the recipe states no revision"
    if finding.status != "ok":
        return replace(finding, found=found)
    newest = f'"{commit}", the newest commit there' if commit else "a commit (40 hex digits) of its history"
    remedy = f"write revision = {newest}, below its name in the recipe; or make ... DATA=FOLDER"
    return Finding("fail", "data", found, remedy)


def model_finding(recipe: Recipe, model: Path | None, answers: dict[str, Answer]) -> Finding:
    """Return where the model comes from."""
    name = recipe.model.name
    if model is not None:
        return Finding("ok", "model", f"{name}: a whole copy is at {model}")
    if name == "base-model":
        return Finding("ok", "model", "made by this run")
    if is_hub_name(name):
        return hub_finding("model", name, answers[name])
    return Finding(
        "fail", "model", f"{name}: no folder with config.json and all its safetensors files",
        "mend [model] name, or copy the whole model there",
    )  # fmt: skip


def data_places(recipe: Recipe) -> tuple[list[Finding], dict[str, str]]:
    """Return findings for the sources that are on this disk, and addresses to ask the hub for the others, by name.

    DATA, or what it was the last time, is where a local copy of a hub dataset is. Datasets are read from the hub as a
    stream, whatever its cache holds. Every repository has a .gitattributes. The hub is asked for the newest one of a
    dataset whose revision the recipe does not state.
    """
    out = ARTIFACTS / recipe.path.stem
    if (out / "prepare-data" / "manifest.json").is_file():
        return [Finding("ok", "data", f"{out / 'prepare-data'} is finished")], {}
    stated = out / "data.path"
    given = os.environ.get("DATA") or (stated.read_text().strip() if stated.is_file() else "")
    findings, urls = {}, {}
    for source in recipe.data.sources:
        if source.name == "base-model":
            continue
        if is_hub_name(source.name) and not source.revision and not given:
            urls[source.name] = f"{endpoint()}/datasets/{source.name}/resolve/main/.gitattributes"
            continue
        try:
            files = sources.files_of(source, None, Path(given) if given else None)
        except UserError as error:
            findings[error.message] = Finding("fail", "data", error.message, "mend [[data.sources]], or DATA")
            continue
        if files:
            findings[source.name] = Finding("ok", "data", f"{source.name}: on this disk ({files[0]})")
        else:
            urls[source.name] = f"{endpoint()}/datasets/{source.name}/resolve/{source.revision}/.gitattributes"
    return list(findings.values()), urls


def token(recipe: Recipe, model: Path | None, answers: dict[str, Answer]) -> Finding:
    """Return whether a token is needed, and whether the one that is here opens what is gated. It is never shown."""
    name, value = recipe.model.name, hub_token()
    which = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of `hf auth login`"
    remedy = (
        f"accept the licence at {endpoint()}/{name}, make a token there that may read, and: export HF_TOKEN=... (with "
        f"RUNTIME=local a login by `hf auth login` does)"
    )
    refused = {key: answer.status for key, answer in answers.items() if answer.status in (401, 403)}
    if value and not is_token(value):
        return Finding("fail", "token", f"{which} has a space or a line break in it", "give it again, the word alone")
    if refused:
        found = f"{which} is set and does not open it" if value else "HF_TOKEN is not set"
        return Finding("fail", "token", f"{', '.join(refused)}: the hub wants one ({found})", remedy)
    if model is not None or not is_hub_name(name):
        return Finding("ok", "token", "not needed: the model is not fetched")
    if answers[name].status is None and name.startswith(GATED) and not value:
        return Finding("fail", "token", f"{name} is gated and HF_TOKEN is not set", remedy)
    if value:
        return Finding("ok", "token", f"{which} is set")
    known = "the hub gives the model without" if answers[name].status else "the model is not known to be gated"
    return Finding("ok", "token", f"not needed: {known}")


def clock(answers: dict[str, Answer]) -> Finding:
    """Return whether this machine's clock is right: by the hub's, or else that no file here is from the future."""
    remedy = "sudo timedatectl set-ntp true"
    offsets = [answer.ahead_seconds for answer in answers.values() if answer.ahead_seconds is not None]
    if offsets:
        found = f"{abs(offsets[0]):.0f} s {'behind' if offsets[0] > 0 else 'ahead of'} the hub's"
        late = abs(offsets[0]) > CLOCK_SECONDS
        return Finding("fail", "clock", found, remedy) if late else Finding("ok", "clock", found)
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.rglob("*.py"))
    if newest > time.time() + 60:
        found = f"files of this checkout are {newest - time.time():.0f} s in its future, and make goes by time"
        return Finding("fail", "clock", found, remedy)
    return Finding("ok", "clock", "not behind the files here (no network time to compare with)")


# ---- tokenizer ----------------------------------------------------------------------------------------------------


def start_tokenizer_check(recipe: Recipe, model: Path | None, cache: Path) -> subprocess.Popen | None:
    """Start `read_tokenizer` in a process of its own; None where there is no model or no llama.cpp."""
    converter = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"
    wanted = ("transformers", "llama_cpp")
    if model is None or not converter.is_file() or any(importlib.util.find_spec(name) is None for name in wanted):
        return None
    code = f"from stages import doctor; doctor.read_tokenizer({str(recipe.path)!r}, {str(model)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}, start_new_session=True,
    )  # fmt: skip


def read_tokenizer(path: str, model: str) -> None:
    """Leave with 1 and a message if llama.cpp can't take the tokenizer of the recipe at `path`.

    `model` is the folder of its model. Runs in a process of its own, without torch, which tokenizers do not need.
    """
    sys.modules["torch"] = None
    from stages.lib import llama, models

    recipe = read_recipe(Path(path))
    artifact = ARTIFACTS / recipe.path.stem / "base-model" if recipe.model.name == "base-model" else None
    try:
        llama.check_tokenizer(models.load_tokenizer(recipe, artifact), Path(model), recipe.model.name)
    except UserError as error:
        sys.exit(error.message)


def tokenizer_finding(process: subprocess.Popen | None, recipe: Recipe, deadline: float) -> Finding:
    """Return what `start_tokenizer_check` came to by `deadline`, seconds of the monotonic clock."""
    later = f"make prepare-data RECIPE={recipe.path.stem} looks before any training"
    if process is None:
        return Finding("ok", "tokenizer", f"not looked at: no copy of the model or no llama.cpp here; {later}")
    try:
        said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the converter it started as well
        process.wait()
        return Finding("warn", "tokenizer", "the look took too long and was ended", f"nothing: {later}")
    if process.returncode:
        lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
        found = lines[-1] if lines[0].startswith("Traceback") else " ".join(said.split())[:600]
        return Finding("fail", "tokenizer", found, "use another base model, or see docs/recipes.md")
    return Finding("ok", "tokenizer", "llama.cpp reads text and chat template as transformers does")


if __name__ == "__main__":
    main()
