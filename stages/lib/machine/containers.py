"""Findings on the container engine, its GPU runtime, shared and system memory."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.lib.machine.disk import SYSTEM_BYTES
from stages.lib.machine.findings import Finding, command_output, gigabytes
from stages.lib.machine.memory import weight_bytes
from stages.lib.machine.shape import Shape
from stages.lib.recipe.tables import Recipe

MIN_SHARED_BYTES = 1 << 30  # Docker's own default is 64 MB
SHARED_MEMORY = Path("/dev/shm")
MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CDI_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
TOOLKIT = (
    "install nvidia-container-toolkit (docs/rented-gpu.md), then: sudo nvidia-ctk runtime configure --runtime=docker "
    "&& sudo systemctl restart docker"
)


def docker_info() -> tuple[int | None, str]:
    """Return exit code and output of `docker info` as JSON; DOCKER names another client."""
    code, text = command_output(os.environ.get("DOCKER") or "docker", "info", "--format", "{{json .}}")
    errors = json.loads(text).get("ServerErrors") if code == 0 else None  # older clients end with 0 all the same
    return (1, errors[0]) if errors else (code, text)


def docker_findings(recipe: Recipe, engine: tuple[int | None, str]) -> Iterator[Finding]:
    """Yield whether an engine answers and can give a container a GPU; without one, whether stages can run here."""
    code, text = engine
    runtime = os.environ.get("RUNTIME", "")
    if runtime == "local":
        yield from local_runtime(recipe, "RUNTIME=local")
    elif code != 0:
        complaint = " ".join(text.split())[:200]
        if runtime == "docker":
            yield Finding("fail", "Docker", f"no engine answers ({complaint})", docker_remedy(complaint))
        else:
            yield from local_runtime(recipe, f"no Docker engine answers ({complaint}), so stages run without")
    else:
        info = json.loads(text)
        version = info.get("ServerVersion") or info.get("version", {}).get("Version", "of unknown version")
        if recipe.model.engine != "unsloth" or has_gpu_runtime(info):
            yield Finding("ok", "Docker", f"engine {version}")
        else:
            found = f"engine {version} has no NVIDIA runtime, so containers see no GPU"
            yield Finding("fail", "Docker", found, TOOLKIT)


def docker_remedy(complaint: str) -> str:
    """Return what to do about a Docker engine that does not answer, by its client's `complaint`."""
    if "permission denied" in complaint:
        return "sudo usermod -aG docker $USER, then log out and in again"
    if "there is no program" in complaint:
        return "install Docker (docs/rented-gpu.md), or use RUNTIME=local"
    return "sudo systemctl start docker"


def has_gpu_runtime(info: dict) -> bool:
    """Return whether an engine with this `docker info` can give containers GPUs: by a runtime of its own, or by CDI."""
    if "nvidia" in (info.get("Runtimes") or {}) or shutil.which("nvidia-container-runtime-hook"):
        return True
    devices = [str(device.get("ID")) for device in info.get("DiscoveredDevices") or []]
    files = [file for folder in CDI_FOLDERS if folder.is_dir() for file in folder.iterdir() if "nvidia" in file.name]
    return any(name.startswith("nvidia.com/gpu") for name in devices) or bool(files)


def local_runtime(recipe: Recipe, why: str) -> Iterator[Finding]:
    """Yield whether stages can run in this environment itself."""
    if recipe.model.engine != "unsloth":
        yield Finding("ok", "Docker", f"not needed: {why}")
        return
    missing = [name for name in ("torch", "unsloth", "vllm") if importlib.util.find_spec(name) is None]
    missing += [] if shutil.which("cc") else ["a C compiler (Triton calls it)"]
    if missing:
        found = f"{why}; and engine = 'unsloth' lacks {', '.join(missing)} here"
        yield Finding("fail", "Docker", found, "install and start Docker (docs/rented-gpu.md), and use RUNTIME=docker")
    else:
        yield Finding("ok", "Docker", f"not needed: {why}, and this environment has what engine = 'unsloth' needs")


def shared_memory_finding(recipe: Recipe) -> Finding:
    """Return whether /dev/shm has room for what the GPU's processes exchange."""
    if recipe.model.engine != "unsloth":
        return Finding("ok", "/dev/shm", "not needed on a CPU")
    remedy = "in a container of your own: docker run --ipc host; else: sudo mount -o remount,size=8G /dev/shm"
    if not SHARED_MEMORY.is_dir():
        return Finding("fail", "/dev/shm", "is not there", remedy)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < MIN_SHARED_BYTES:
        return Finding("fail", "/dev/shm", f"{free / 1e6:.0f} MB free; vLLM and NCCL want 1 GB", remedy)
    return Finding("ok", "/dev/shm", f"{gigabytes(free)} free")


def system_memory_finding(shape: Shape) -> Finding:
    """Return whether this machine's memory holds the model in float32, which merge and gguf load once each."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", MEMINFO.read_text(), re.M))
    total, available = (int(fields[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    with contextlib.suppress(FileNotFoundError):
        limit = CGROUP_LIMIT.read_text().strip()
        total, available = (min(value, int(limit)) if limit.isdigit() else value for value in (total, available))
    need = weight_bytes(shape, "float32") + SYSTEM_BYTES
    found = f"merge and gguf need about {gigabytes(need)}; {gigabytes(available)} of {gigabytes(total)} are available"
    if need > total:
        return Finding("fail", "memory", found, "take a machine with more memory")
    if need > available:
        return Finding("warn", "memory", found, "end other programs before merge")
    return Finding("ok", "memory", found)
