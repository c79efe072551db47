"""What a disk does to a stage in its midst: it fills, has no inode left, takes no path so long, is read-only, fails."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.errors import UserError, chain

# Of a full disk: the words of the system, and those of torch.save, which name no cause.
NOT_WRITTEN = (
    os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "PytorchStreamWriter failed writing", "inline_container.cc",
)  # fmt: skip
UNWRITTEN = "a file can't be written; the disk has"
FULL_BYTES = 1 << 20  # with less free a disk is full: numpy and llama.cpp say of one only that something failed
FULL_FILES = 2
REMEDIES = {
    errno.EROFS: "Mount it so that it can be written, or put artifacts/ on another disk",
    errno.EIO: "The disk or its connection is at fault: dmesg says more. Put artifacts/ on another disk",
}


@contextlib.contextmanager
def naming_disk_faults(folder: Path) -> Iterator[None]:
    """Raise `UserError`, with the cause and what to do, when the body fails because of the disk that holds `folder`."""
    said_elsewhere = threading.excepthook

    def say(failed: Any) -> None:  # TensorBoard's thread meets the full disk as well, and would show where
        if getattr(failed.exc_value, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            said_elsewhere(failed)

    threading.excepthook = say
    try:
        yield
    except Exception as error:  # OSError, safetensors' own, RuntimeError of torch, and what they became on the way
        message = disk_fault(error, folder)
        if message is None:
            raise
        raise UserError(message) from error
    finally:
        threading.excepthook = said_elsewhere


def disk_fault(error: Exception, folder: Path) -> str | None:
    """Return what is to be said of an error that the disk of `folder`, or that of the file it names, caused.

    None for an error of another cause.
    """
    if isinstance(error, UserError) and UNWRITTEN in error.message:
        return None  # a rank has said it
    causes = list(chain(error))
    failed = [each for each in causes if isinstance(each, OSError)]
    place = existing(folder)
    for cause in failed:
        named = str(cause.filename2 or cause.filename or folder)  # of a copy, where it goes
        if cause.errno == errno.ENAMETOOLONG:
            longest = max(len(os.fsencode(part)) for part in (*Path(named).parts, ""))
            return (
                f"{named[:200]}...: the path is too long: {len(os.fsencode(named)):,} bytes, {longest:,} in its "
                f"longest name; expected less than 4,096, and at most 255 in a name. Put the checkout, or --out, at a "
                f"shorter path"
            )
        if cause.errno in REMEDIES:
            return f"{named}: {os.strerror(cause.errno)}. {REMEDIES[cause.errno]}"
        if cause.errno == errno.ENOSPC and existing(Path(named)).stat().st_dev != place.stat().st_dev:
            place = existing(Path(named))  # such as /tmp
    found = os.statvfs(place)
    free, has_no_inode = found.f_bavail * found.f_frsize, found.f_files > 0 and found.f_favail <= FULL_FILES
    said = [line.strip() for each in causes for line in str(each).splitlines() if any(w in line for w in NOT_WRITTEN)]
    if not said and free >= FULL_BYTES and not has_no_inode:
        return None
    reason = [*said, *str(error).strip().splitlines()[-1:], type(error).__name__][0].strip()[:500]
    lack = "no inode left, which every file needs" if has_no_inode else f"{free / 1e9:.2f} GB free"
    return (
        f"{place}: {UNWRITTEN} {lack} ({reason}). "
        f"{'Delete files there' if has_no_inode else 'Free some'} and run the same command again: it goes on from what "
        f"is finished, and from the last checkpoint"
    )


def existing(path: Path) -> Path:
    """Return the folder `path`, or the nearest above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
