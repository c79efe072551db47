"""What of the completions a run that is carried on keeps."""

import pytest

from stages.lib.train.rollouts import lines_until

ROWS = b'{"step": 1}\n{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "after",
    [
        b"",
        b'{"step": 3}\n',
        b'{"step": 3, "compl',
        b"\0" * 4096,  # a length that reached the disk, and content that did not
        b"\0" * 4096 + b'etion": ""}\n{"step": 4}\n',
        b"\xff\xfe\n",
        b"\n",
    ],
)
def test_completions_up_to_the_checkpoint_are_kept_whatever_a_power_cut_left_after_them(tmp_path, after):
    path = tmp_path / "completions.jsonl"
    path.write_bytes(ROWS + after)
    assert lines_until(path, 2) == ROWS


def test_no_completions_are_kept_where_there_are_none(tmp_path):
    assert lines_until(tmp_path / "completions.jsonl", 2) == b""


def test_zeros_that_a_power_cut_left_are_not_read_whole(tmp_path):
    path = tmp_path / "completions.jsonl"
    with path.open("wb") as file:
        file.write(ROWS)
        file.truncate(1 << 42)
    assert lines_until(path, 2) == ROWS
