"""A finding of doctor, and the output of a command within a time limit."""

import subprocess
from dataclasses import dataclass
from typing import Literal

COMMAND_SECONDS = 5  # nvidia-smi and docker, side by side


@dataclass(frozen=True)
class Finding:
    """The result of one check; unless it is fine, the remedy."""

    status: Literal["ok", "warn", "fail"]
    name: str
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The finding as a line for the terminal."""
        text = f"{self.status:4}  {self.name}: {self.found}"
        return f"{text}. To do: {self.remedy}" if self.remedy else text


def command_output(*command: str) -> tuple[int | None, str]:
    """Return exit code and output, or complaint, of `command`; None, and why, if it does not exist or answer."""
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
