"""A disk that fills, has no inode left or takes no path so long: one message, and the next run goes on."""

import errno
import re
import threading
from pathlib import Path

import pytest

from stages.lib import disk
from stages.lib.artifact.digests import sha256_of
from stages.lib.errors import UserError
from tests.support import disks, micro

FULL = 4096  # bytes free, as a stage sees them at the end of a full disk


class Free:
    def __init__(self, size: int, files: int = 1000) -> None:
        self.f_bavail, self.f_frsize, self.f_files, self.f_favail = size, 1, 1000, files


def fault(error: Exception, cause: Exception | None = None, folder: Path = Path("/")) -> str | None:
    error.__cause__ = cause
    return disk.disk_fault(error, folder)


@pytest.mark.parametrize(
    ("error", "cause", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), None, "[Errno 28] No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), None, "[Errno 122] Disk quota exceeded"),
        (ValueError("while serializing: No space left on device (os error 28)"), None, "while serializing: No space l"),
        (ValueError("generating"), OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on dev"),
        (RuntimeError("[enforce fail at inline_container.cc:659]"), None, "[enforce fail at inline_container.cc:659]"),
    ],
)
def test_a_full_disk_is_known_by_the_words_of_whatever_wrote_to_it(error, cause, reason, monkeypatch):
    monkeypatch.setattr(disk.os, "statvfs", lambda path: Free(1_230_000_000))
    assert fault(error, cause).startswith(f"/: a file can't be written; the disk has 1.23 GB free ({reason}")


def test_what_names_no_cause_is_of_the_disk_only_when_that_is_full(monkeypatch):
    error = UserError("model: llama.cpp's converter failed (1):\n  OSError: 384 requested and 0 written")
    monkeypatch.setattr(disk.os, "statvfs", lambda path: Free(1_230_000_000))
    assert fault(error) is None
    monkeypatch.setattr(disk.os, "statvfs", lambda path: Free(FULL))
    assert "0.00 GB free (OSError: 384 requested and 0 written). Free some" in fault(error)
    monkeypatch.setattr(disk.os, "statvfs", lambda path: Free(1_230_000_000, files=0))
    assert "no inode left, which every file needs (OSError: 384 requested and 0 written). Delete" in fault(error)


def test_a_disk_without_a_count_of_inodes_has_enough_of_them(monkeypatch):
    free = Free(1_230_000_000, files=0)
    free.f_files = 0  # as on btrfs
    monkeypatch.setattr(disk.os, "statvfs", lambda path: free)
    assert fault(ValueError("another")) is None


def test_an_error_of_another_kind_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError, match="a slip"), disk.naming_disk_faults(tmp_path):
        raise KeyError("a slip")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_a_disk_that_fails_or_can_not_be_written_is_said_to(number, tmp_path):
    said = pytest.raises(UserError, match=r"^/a/b: (Read-only file system|Input/output error)\. .*another disk$")
    with said, disk.naming_disk_faults(tmp_path):
        raise OSError(number, "x", "/a/b")


@pytest.mark.parametrize(("number", "shown"), [(errno.ENOSPC, 0), (errno.EDQUOT, 0), (errno.EIO, 1)])
def test_a_thread_that_meets_the_full_disk_shows_no_traceback_of_its_own(number, shown, tmp_path, capsys):
    def write():
        raise OSError(number, "x")

    before = threading.excepthook
    threading.excepthook = lambda failed: print(failed.exc_value)
    try:
        with disk.naming_disk_faults(tmp_path):
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()
    finally:
        threading.excepthook = before
    assert capsys.readouterr().out.count("Errno") == shown


def test_a_path_that_is_too_long_is_named_with_both_lengths(tmp_path):
    said = pytest.raises(UserError, match=r"the path is too long: [\d,]+ bytes, 300 in its longest name; expected")
    with said, disk.naming_disk_faults(tmp_path):
        (tmp_path / ("x" * 300)).mkdir()
    deep = tmp_path.joinpath(*["y" * 200] * 21)
    said = pytest.raises(UserError, match=r"the path is too long: 4,\d\d\d bytes, 200 in its longest name; expected")
    with said, disk.naming_disk_faults(tmp_path):
        deep.mkdir(parents=True)


def test_a_stage_whose_out_is_too_long_a_path_says_so(tmp_path):
    recipe = micro.write_recipe(tmp_path)
    result = micro.run("base-model", tmp_path, tmp_path / ("x" * 250), recipe)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert re.search(r"^Error: \S+x{50}\S+: .*(too long|File name too long)", result.output), result.output


@pytest.fixture(scope="module")
def everything() -> Path:
    """Return a folder with a finished artifact of every stage, and micro.toml."""
    return disks.all_stages()


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("size", "inodes"), [(16 << 10, 1000), (1 << 30, 6)], ids=["room", "inodes"])
@pytest.mark.parametrize("stage", disks.INPUTS)
def test_a_stage_whose_disk_fills_says_so_once_and_its_next_run_makes_the_same_bytes(
    everything, tmp_path, stage, size, inodes
):
    filled = disks.run_on_small_disk(stage, everything, tmp_path, size, inodes)
    assert "Traceback" not in filled.said
    lack = "no inode left, which every file needs" if inodes == 6 else r"0\.00 GB free"
    assert len(re.findall(rf"^Error: \S+: a file can't be written; the disk has {lack}", filled.said, re.M)) == 1
    assert (filled.code, filled.code_again) == (1, 0), filled.said_again
    assert f"{stage}: finished" in filled.said_again
    manifest = micro.vouched(everything / stage)
    assert micro.vouched(filled.result / stage) == manifest
    for name, entry in manifest["files"].items():
        assert sha256_of(filled.result / stage / name) == entry["sha256"]


@pytest.mark.torch
def test_logits_for_which_the_disk_has_no_room_are_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    import numpy

    from stages.lib import distance

    def full(file, start, size):
        assert size >= 4 * 3 * 5
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distance.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        texts = [distance.Text([1, 2, 3, 4], [0, 1, 2])]
        distance.store_logits(tmp_path / "a.npy", texts, 5, [numpy.zeros((3, 5), "float32")])
