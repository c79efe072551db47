"""Findings on the GPU: its driver, its compute capability, its free memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from stages.lib.machine.findings import Finding, command_output, gigabytes
from stages.lib.machine.memory import gpu_memory_findings
from stages.lib.machine.shape import Shape
from stages.lib.recipe.tables import Recipe

MIN_DRIVER = 580  # the oldest that CUDA 13 supports (CUDA 13.0 release notes, table 3)
MIN_CAPABILITY = (7, 5)  # the oldest that CUDA 13 compiles for; vLLM asks for no less, bitsandbytes for 6.0
BFLOAT16_CAPABILITY = (8, 0)
GPU_FIELDS = "name,driver_version,memory.total,memory.free,compute_cap"
NEW_DRIVER = (
    "install driver 580 or newer (Ubuntu: sudo apt-get install nvidia-driver-580-server-open nvidia-utils-580-server, "
    "then sudo reboot), or rent a machine image that has CUDA 13"
)
WATCH = "watch nvidia-smi and df in the first steps of sft and grpo"


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi describes it, by `GPU_FIELDS`; memory in MiB, or a word where it tells none."""

    name: str
    driver: str
    total: str
    free: str
    capability: str

    @property
    def tells_memory(self) -> bool:
        """Say whether nvidia-smi tells its memory: not where GPU and system share it."""
        return self.total.isdigit() and self.free.isdigit()

    @property
    def room(self) -> str:
        """Its memory, as in "143.1 GB of 143.8 GB free"."""
        if not self.tells_memory:
            return "memory unknown"
        return f"{gigabytes(int(self.free) << 20)} of {gigabytes(int(self.total) << 20)} free"


def ask_devices(recipe: Recipe) -> tuple[int | None, str]:
    """Return exit code and output of nvidia-smi on the GPUs that GPUS names, if the recipe needs one."""
    if recipe.model.engine != "unsloth":
        return None, ""
    gpus = os.environ.get("GPUS", "")
    chosen = [f"--id={gpus}"] if gpus.replace(",", "").isdigit() else []
    return command_output("nvidia-smi", *chosen, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits")


def chosen_cards(devices: tuple[int | None, str]) -> list[Card]:
    """Return the GPUs that GPUS names, from the answer of `ask_devices`: the first where it is left out."""
    code, text = devices
    if code != 0:
        return []
    cards = [Card(*(field.strip() for field in line.split(","))) for line in text.splitlines()]
    gpus = os.environ.get("GPUS", "")
    return cards if gpus == "all" or "," in gpus else cards[:1]


def gpu_findings(recipe: Recipe, shape: Shape | None, devices: tuple[int | None, str]) -> Iterator[Finding]:
    """Yield the findings on driver, compute capability and GPU memory, from `devices`, the answer of `ask_devices`."""
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
    cards = chosen_cards(devices)
    driver = cards[0].driver
    if int(driver.split(".")[0]) < MIN_DRIVER:
        yield Finding("fail", "driver", f"{driver}; CUDA 13's wheels need {MIN_DRIVER} or newer", NEW_DRIVER)
    else:
        yield Finding("ok", "driver", driver)
    for name, capability in dict.fromkeys((card.name, card.capability) for card in cards):
        yield capability_finding(name, capability, recipe.model.dtype)
    unknown = [card for card in cards if not card.tells_memory]
    if unknown:
        found = f"nvidia-smi tells no size ({unknown[0].total}), as it does where GPU and system share their memory"
        yield Finding("warn", "GPU memory", found, WATCH)
    elif shape is not None:
        least = min(cards, key=lambda card: int(card.free))  # each GPU holds the whole model
        yield from gpu_memory_findings(recipe, shape, int(least.total) << 20, int(least.free) << 20)


def no_gpu(code: int | None, text: str) -> Finding:
    """Return the finding on an nvidia-smi that ended with `code` and the complaint `text`."""
    complaint = " ".join(text.split())[:200]
    if "version mismatch" in text:
        return Finding("fail", "driver", f"was updated while the old one runs ({complaint})", "sudo reboot")
    if "No devices were found" in text:
        remedy = "rent a machine with a GPU, or fix GPUS (nvidia-smi -L lists them)"
        return Finding("fail", "GPU", "the driver finds none", remedy)
    if "is not a valid field" in text:
        return Finding("fail", "driver", f"is so old that nvidia-smi does not know a field ({complaint})", NEW_DRIVER)
    if code is None or "couldn't communicate" in text:
        return Finding("fail", "driver", f"none answers ({complaint})", NEW_DRIVER)
    return Finding("fail", "GPU", f"nvidia-smi failed ({code}): {complaint}", "sudo reboot, or take another machine")


def capability_finding(name: str, capability: str, dtype: str) -> Finding:
    """Return whether a GPU of this compute capability ("9.0") runs the locked wheels, and the recipe's dtype."""
    found = f"{name}, compute capability {capability}"
    version = tuple(int(part) for part in capability.split("."))
    if version < MIN_CAPABILITY:
        remedy = "take a newer GPU: L4, A10, A100, L40S, RTX 3090 or newer"
        return Finding("fail", "GPU", f"{found}; CUDA 13 and vLLM need 7.5 or newer", remedy)
    if dtype == "bfloat16" and version < BFLOAT16_CAPABILITY:
        remedy = "take a newer GPU (L4, A10, A100, ...), or set dtype = 'float16', in which Gemma 3 overflows"
        return Finding("fail", "GPU", f"{found}; [model] dtype = 'bfloat16' needs 8.0 or newer", remedy)
    return Finding("ok", "GPU", found)
