"""How many threads llama.cpp gets, which spin while they wait for each other."""

import math

import pytest

from stages.lib.gguf.library import SMALL_BYTES, fastest_threads, threads_for


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


@pytest.mark.parametrize(
    ("seconds", "most", "expected", "tried"),
    [
        ({1: 1.0}, 1, 1, []),
        ({2: 0.5, 1: 0.9}, 2, 2, [2, 1]),
        ({2: 8.0, 1: 1.0}, 2, 1, [2, 1]),  # beside two other programs
        ({16: 0.1, 8: 0.2, 4: 0.3}, 16, 16, [16, 8]),
        ({32: 9.0, 16: 4.0, 8: 0.4, 4: 0.2, 2: 0.25, 1: 0.5}, 32, 4, [32, 16, 8, 4, 2]),
        ({8: 0.100, 4: 0.104, 2: 0.2, 1: 0.4}, 8, 4, [8, 4, 2]),  # as fast, with half of them
        ({6: 0.2, 3: 0.1, 1: 0.3}, 6, 3, [6, 3, 1]),
    ],
)
def test_the_fastest_number_of_threads_is_found_by_trial(seconds, most, expected, tried, monkeypatch):
    clock, counts = [0.0], []

    def decode(count: int) -> None:
        clock[0] += seconds[count]
        counts.append(count)

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    assert fastest_threads(most, decode) == expected
    assert list(dict.fromkeys(counts)) == tried
    assert counts.count(most) == (1 + math.ceil(0.3 / seconds[most]) if tried else 0)
