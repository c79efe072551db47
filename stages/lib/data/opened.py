"""A data file as bytes of UTF-8, whatever it is packed with: plain, .gz, .zst, or UTF-16 as Excel writes it."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from stages.lib.errors import UserError
from stages.lib.recipe.tables import PACKED_SUFFIXES

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MAX_LINE_BYTES = 1 << 26  # more is a file without line breaks, of another kind than its name says
UNPACKED_BYTES, UNPACKED_TIMES = 1 << 28, 100  # what is packed may hold so many bytes, or so many times its own
MAX_WHOLE_BYTES = 1_000_000_000  # of a file that is read whole: a JSON list or object, and UTF-16


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Give a file's bytes of UTF-8, after any byte order mark.

    Raises `UserError` for a packed file that can't be unpacked, and for UTF-16 that is none or too large.
    """
    name = path.name.lower()
    with path.open("rb") as file:
        stream = file
        if name.endswith(".gz"):
            stream = io.BufferedReader(Unpacked(gzip.GzipFile(fileobj=file), path))
        elif name.endswith(".zst"):
            import pyarrow

            stream = io.BufferedReader(Unpacked(pyarrow.CompressedInputStream(file, "zstd"), path))
        try:
            head = stream.peek(3)[:3]
            if head[:2] in UTF_16_MARKS:
                stream = from_utf_16(path, stream)
            elif head == BYTE_ORDER_MARK:
                stream.read(3)
            yield stream
        except (EOFError, zlib.error, OSError) as error:
            if stream is file:
                raise
            raise UserError(f"{path}: can't be unpacked ({error}). Fetch or make it again") from error


class Unpacked(io.RawIOBase):
    """What a packed file holds, up to a bound: a few kilobytes can be packed to hold a disk full of zeros."""

    def __init__(self, packed: Any, path: Path) -> None:
        self.packed, self.path, self.count = packed, path, 0
        self.most = max(UNPACKED_BYTES, UNPACKED_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer`; return the number of bytes. Raises `UserError` beyond the bound."""
        part = self.packed.read(len(buffer))
        buffer[: len(part)] = part
        self.count += len(part)
        if self.count > self.most:
            raise UserError(
                f"{self.path}: {self.path.stat().st_size:,} bytes that unpack to more than {self.most:,}; expected at "
                f"most {UNPACKED_TIMES} times as many. Unpack it, and see what it holds"
            )
        return len(part)


def lines_of(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield the lines of a stream of `opened`. Raises `UserError` for one longer than `MAX_LINE_BYTES`."""
    while line := rest_of_line(file, path):
        yield line


def rest_of_line(file: IO[bytes], path: Path) -> bytes:
    """Return what is left of the line that a stream is in. Raises `UserError` as `lines_of` does."""
    line = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise UserError(
            f"{path}: a line of more than {MAX_LINE_BYTES:,} bytes; expected a row a line. Is it what its name says?"
        )
    return line


def from_utf_16(path: Path, stream: IO[bytes]) -> io.BufferedReader:
    """Return a stream of UTF-16 as one of UTF-8; it is read whole."""
    raw = stream.read(MAX_WHOLE_BYTES + 1)
    if len(raw) > MAX_WHOLE_BYTES:
        raise UserError(f"{path}: more than {MAX_WHOLE_BYTES:,} bytes of UTF-16; save it as UTF-8")
    try:
        return io.BufferedReader(io.BytesIO(raw.decode("utf-16").encode()))  # type: ignore[type-var]  # BytesIO is no RawIOBase
    except UnicodeError as error:
        raise UserError(f"{path}: begins as UTF-16 does and is none ({error}); save it as UTF-8") from error


def is_as_stored(path: Path) -> bool:
    """Return whether the bytes that `opened` gives lie in the file just so, after any byte order mark."""
    with path.open("rb") as file:
        return not path.name.lower().endswith(PACKED_SUFFIXES) and file.read(2) not in UTF_16_MARKS


def decoded(raw: bytes, path: Path, line: int) -> str:
    """Return `raw`, which begins at `line`, as text. Raises `UserError` that names the byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {column}). Convert a file of "
            f"another encoding: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8{path.suffix}"
        ) from error
