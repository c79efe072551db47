"""A manifest is read whatever stands in it, to a bound, and believed only if a stage could have written it."""

import json
import os
from pathlib import Path

import pytest

from stages.lib.artifact.manifest import MAX_BYTES, is_emptied, manifest_in, object_in, stage_of

ENTRY = {"bytes": 3, "sha256": "ab"}
GOOD = {
    "stage": "sft", "recipe": {}, "sources": {}, "metrics": {}, "environment": {}, "wall": {}, "code": "1",
    "inputs": {"prepare-data": {"sft.jsonl": "cd"}}, "files": {"adapter/a..b.json": ENTRY},
}  # fmt: skip


def written(folder: Path, value: object) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps(value))
    return path


def test_a_manifest_of_this_stage_is_returned_as_it_stands(tmp_path):
    assert manifest_in(written(tmp_path, GOOD), "sft") == GOOD
    assert manifest_in(written(tmp_path, GOOD), "grpo") is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "a//b", "", ".", "a/.", "a\0b", "..", "a/"])
def test_a_file_outside_the_folder_is_in_no_manifest(tmp_path, name):
    assert manifest_in(written(tmp_path, GOOD | {"files": {name: ENTRY}}), "sft") is None


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"a": 3}},
        {"files": {"a": {"bytes": "3", "sha256": "ab"}}},
        {"files": {"a": {"bytes": True, "sha256": "ab"}}},
        {"files": {"a": {"bytes": 3}}},
        {"inputs": {"prepare-data": []}},
        {"inputs": {"prepare-data": {"a": 1}}},
        {"inputs": 1},
        {"metrics": None},
        {"wall": "long"},
        {"environment": []},
        {"recipe": 0},
        {"sources": ""},
    ],
)
def test_what_no_stage_writes_is_no_manifest(tmp_path, change):
    assert manifest_in(written(tmp_path, GOOD | change), "sft") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 9,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b'{"stage": "sft"',
        b"1" * 9_999,
        b"[1]",
        b"null",
    ],
)
def test_what_is_no_object_states_nothing(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    assert object_in(path) == {}
    assert stage_of(path) is None


@pytest.mark.parametrize("stage", [["sft"], 1, None, {}])
def test_a_stage_is_a_name(tmp_path, stage):
    assert stage_of(written(tmp_path, {"stage": stage})) is None


def test_a_file_of_many_gigabytes_is_not_read_whole(tmp_path):
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # of zeros, and of no room on the disk
    assert object_in(path) == {}
    assert is_emptied(path)
    with path.open("r+b") as file:
        file.write(b'{"stage": "sft"}' + b" " * MAX_BYTES)
    assert object_in(path) == {}


def test_a_pipe_and_a_folder_of_that_name_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", tmp_path / "pipe" / "below"):
        assert object_in(path) == {}
        assert not is_emptied(path)
