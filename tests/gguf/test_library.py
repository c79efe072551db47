"""How many threads llama.cpp gets, which spin while they wait for each other."""

import pytest

from stages.lib.gguf.library import SMALL_BYTES, threads_for


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_no_more_threads_than_the_container_may_run_at_once(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("stages.lib.gguf.library.CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    large, small = tmp_path / "large.gguf", tmp_path / "small.gguf"
    for file, size in ((large, SMALL_BYTES + 1), (small, SMALL_BYTES)):
        with file.open("wb") as opened:
            opened.truncate(size)
    assert threads_for(large) == expected
    assert threads_for(small) == 1
