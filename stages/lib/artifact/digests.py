"""sha256 of files. A large file's is remembered until its size, times or inode change."""

import contextlib
import hashlib
import os
import time
import zlib
from pathlib import Path

MEMORY = Path(__file__).parents[3] / "data" / "cache" / "digests"
MEMORY_BYTES = 1 << 20  # at this size it starts anew
LARGE_BYTES = 1 << 24  # a smaller file is hashed each time
SETTLED_SECONDS = 2.0  # a younger file may change again within the same tick of the file system's clock

Stamp = tuple[int, ...]


def stamp_of(path: Path) -> Stamp:
    """Return device, inode, size in bytes, mtime and ctime (ns) of a file: a write changes one of them."""
    found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path) -> str:
    """Return `sha256_of` a file; a large one is read only if its `stamp_of` is not remembered."""
    stamp = stamp_of(path)
    if path.stat().st_size < LARGE_BYTES:
        return sha256_of(path)
    known = remembered().get(stamp)
    if known is None:
        settled = time.time() - stamp[-1] / 1e9 > SETTLED_SECONDS
        known = sha256_of(path)
        if settled and stamp_of(path) == stamp:
            remember(stamp, known)
    return known


def remembered() -> dict[Stamp, str]:
    """Return the remembered digests, less those of lines that are torn, by their checksum."""
    found: dict[Stamp, str] = {}
    try:
        lines = MEMORY.read_bytes().splitlines()
    except OSError:
        return found
    for line in lines:
        record, _, checksum = line.rpartition(b" ")
        if checksum == b"%08x" % zlib.crc32(record):
            *stamp, digest = record.decode().split()
            found[tuple(map(int, stamp))] = digest
    return found


def remember(stamp: Stamp, digest: str) -> None:
    """Append a digest, in one write, as several processes may do so at once; where the disk can't be written, don't."""
    record = " ".join(map(str, (*stamp, digest))).encode()
    with contextlib.suppress(OSError):
        MEMORY.parent.mkdir(parents=True, exist_ok=True)
        if MEMORY.is_file() and MEMORY.stat().st_size > MEMORY_BYTES:
            MEMORY.unlink()
        file = os.open(MEMORY, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, b"\n%s %08x\n" % (record, zlib.crc32(record)))  # a torn line before it ends here
        finally:
            os.close(file)
