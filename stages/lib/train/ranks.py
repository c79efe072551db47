"""A rank: one of the processes that train together, one a GPU, as torch.distributed's variables name it.

What one rank alone finds out, such as a signal, all act on at the same step: they exchange one number at its end.
"""

import os
from pathlib import Path


def world_size() -> int:
    """Return how many processes train together; 1 where no launcher started this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


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
