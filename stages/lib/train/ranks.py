"""A rank: one of the processes that train together, one a GPU, as torch.distributed's variables name it.

What one rank alone finds out, such as a signal, all act on at the same step: they exchange one number at its end.
"""

import os
from pathlib import Path

# In the environment of a process that samples by itself, one of several: its number and theirs, as in "1/2". It has
# none of torch.distributed's variables: with those, vLLM and accelerate would wait for partners.
SHARE = "TEMPER_SHARE"


def world_size() -> int:
    """Return how many processes train together; 1 where no launcher started this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return int(os.environ.get("RANK") or share()[0])


def share() -> tuple[int, int]:
    """Return the number of this process among those that sample, from 0, and how many they are; (0, 1) alone."""
    number, _, count = os.environ.get(SHARE, "0/1").partition("/")
    return int(number), int(count)


def is_first() -> bool:
    """Say whether this is rank 0, which alone writes checkpoints, completions, curves and the adapter."""
    return rank() == 0


def largest(value: int) -> int:
    """Return the largest `value` of all ranks; all of them call this at the same place."""
    if world_size() == 1:
        return value
    import torch
    from accelerate import PartialState

    number = torch.tensor(value, device=PartialState().device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number)


def lacks_random_state(checkpoint: Path) -> bool:
    """Say whether a checkpoint has no random state for this rank: another number of processes wrote it."""
    name = "rng_state.pth" if world_size() == 1 else f"rng_state_{rank()}.pth"
    return not (checkpoint / name).is_file()
