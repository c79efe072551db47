"""A large file is hashed once, until it changes; what the memory of that holds of nonsense does no harm."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.lib.artifact import digests
from stages.lib.artifact.digests import digest_of

ROOT = Path(__file__).parents[2]
ONE, TWO = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))


@pytest.fixture(autouse=True)
def read(tmp_path, monkeypatch) -> list[str]:
    """Return the names of the files that were read from now on; every file is large and settled at once."""
    names: list[str] = []
    real = digests.sha256_of
    monkeypatch.setattr(digests, "MEMORY", tmp_path / "cache" / "digests")
    monkeypatch.setattr(digests, "LARGE_BYTES", 1)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(digests, "sha256_of", lambda path: (names.append(path.name), real(path))[1])
    return names


def test_a_file_is_read_once_also_when_its_folder_gets_its_name(tmp_path, read):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "weights").write_text("one")
    assert [digest_of(tmp_path / "out.unfinished" / "weights") for _ in range(3)] == [ONE] * 3
    (tmp_path / "out.unfinished").rename(tmp_path / "out")
    assert digest_of(tmp_path / "out" / "weights") == ONE
    assert read == ["weights"]


@pytest.mark.parametrize("how", ["written", "old time put back", "renamed over", "another inode", "longer"])
def test_a_file_that_changed_is_read_again(tmp_path, read, how):
    path, other = tmp_path / "weights", tmp_path / "other"
    path.write_text("one")
    before = path.stat()
    assert digest_of(path) == ONE
    other.write_text("two")
    match how:
        case "written":
            path.write_text("two")
        case "old time put back":
            path.write_text("two")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_mtime_ns == before.st_mtime_ns
        case "renamed over":
            other.rename(path)
        case "another inode":
            path.unlink()
            path.write_text("two")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "longer":
            with path.open("a") as file:
                file.write("two")
    assert digest_of(path) == (hashlib.sha256(b"onetwo").hexdigest() if how == "longer" else TWO)
    assert read == ["weights", "weights"]


def test_a_small_file_and_one_that_has_just_changed_are_read_each_time(tmp_path, read, monkeypatch):
    (tmp_path / "weights").write_text("one")
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 2.0)
    assert [digest_of(tmp_path / "weights") for _ in range(2)] == [ONE, ONE]
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(digests, "LARGE_BYTES", 4)
    assert [digest_of(tmp_path / "weights") for _ in range(2)] == [ONE, ONE]
    assert read == ["weights"] * 4
    assert not digests.MEMORY.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    path, real = tmp_path / "weights", digests.sha256_of
    path.write_text("one")
    monkeypatch.setattr(digests, "sha256_of", lambda path: (real(path), path.write_text("two"))[0])
    assert digest_of(path) == ONE
    monkeypatch.setattr(digests, "sha256_of", real)
    assert digest_of(path) == TWO


def spoilt(memory: Path, how: str) -> None:
    line = memory.read_bytes()
    match how:
        case "cut":
            memory.write_bytes(line[:-5])
        case "a digit of the digest":
            memory.write_bytes(line.replace(ONE[:8].encode(), b"00000000"))
        case "a digit of the size":
            memory.write_bytes(line.replace(b" 3 ", b" 4 "))
        case "noise":
            memory.write_bytes(bytes(range(256)) * 9)
        case "NUL":
            memory.write_bytes(bytes(4096))
        case "empty":
            memory.write_bytes(b"")
        case "a folder":
            memory.unlink()
            memory.mkdir()


@pytest.mark.parametrize(
    "how", ["cut", "a digit of the digest", "a digit of the size", "noise", "NUL", "empty", "a folder"]
)
def test_a_spoilt_memory_is_as_good_as_none(tmp_path, read, how):
    path = tmp_path / "weights"
    path.write_text("one")
    assert digest_of(path) == ONE
    spoilt(digests.MEMORY, how)
    assert digest_of(path) == ONE
    assert read == ["weights", "weights"]
    assert digest_of(path) == ONE
    assert len(read) == (3 if how == "a folder" else 2)  # after a torn line there is room for a whole one


def test_a_memory_that_grew_large_starts_anew(tmp_path, read, monkeypatch):
    monkeypatch.setattr(digests, "MEMORY_BYTES", 1000)
    for number in range(100):
        (tmp_path / str(number)).write_text("one")
        assert digest_of(tmp_path / str(number)) == ONE
    assert digests.MEMORY.stat().st_size < 1200
    assert 0 < len(digests.remembered()) < 10


def test_several_processes_remember_at_once(tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom stages.lib.artifact import digests\n"
        "digests.MEMORY = Path(sys.argv[1])\n"
        "for number in range(500): digests.remember((int(sys.argv[2]), number, 0, 0, 0), '%064x' % number)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(digests.MEMORY), str(number)], cwd=ROOT)
        for number in range(3)
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert digests.remembered() == {
        (process, number, 0, 0, 0): f"{number:064x}" for process in range(3) for number in range(500)
    }
