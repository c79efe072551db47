"""Where a stage ran: packages, git revision, image, GPU, machine."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = (
    "accelerate", "bitsandbytes", "click", "datasets", "llama-cpp-python", "math-verify", "numpy", "peft", "protobuf",
    "safetensors", "sentencepiece", "tokenizers", "torch", "transformers", "triton", "trl", "unsloth", "unsloth_zoo",
    "vllm", "xformers",
)  # fmt: skip
COMMAND_SECONDS = 10.0


def environment_now() -> dict[str, Any]:
    """Return where a stage ran: package versions, git revision, image id, GPU and driver, processor count."""
    versions = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    root = Path(__file__).parents[3]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git": output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "image": os.environ.get("TEMPER_IMAGE_ID"),
        "gpu": output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
    }


def output_of(*command: str) -> str | None:
    """Return a command's output; None when it is not installed, failed or took too long: a driver can hang."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
