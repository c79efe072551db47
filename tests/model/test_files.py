"""Which weights a folder holds; a model that the hub does not give is a message, whatever library asked for it."""

import json
import struct

import huggingface_hub.constants
import pytest

from stages.lib.errors import UserError
from stages.lib.model.files import fetching_model, model_folder, weight_files, weight_shapes, whole_model_folder

SHARDS = ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("fetch", [model_folder, whole_model_folder])
def test_a_model_that_the_hub_does_not_give_is_said_with_what_to_run(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"nobody/nothing at a{40}: the hub did not give it: .* Run: make doctor"):
        fetch("nobody/nothing", "a" * 40)


def test_what_is_no_matter_of_the_hub_keeps_its_own_error():
    with pytest.raises(FileNotFoundError), fetching_model("folder", None):
        raise FileNotFoundError("folder/config.json")


@pytest.mark.parametrize(
    ("files", "read"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["consolidated.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["consolidated.safetensors", *SHARDS], SHARDS),
    ],
)
def test_weights_are_those_that_transformers_reads_and_a_second_copy_beside_them_is_not(tmp_path, files, read):
    save_weights(tmp_path, files)
    assert [path.name for path in weight_files(tmp_path)] == read
    assert sorted(weight_shapes(tmp_path)) == [f"{name}.weight" for name in read]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["model-1.safetensors"],
            r"1 of the 2 shards that model\.safetensors\.index\.json names are missing: model-2\.s",
        ),
        (
            ["consolidated.safetensors"],
            r"expected a model's weights, model\.safetensors or .*; found consolidated\.safet",
        ),
        ([], r"found no safetensors file"),
    ],
)
def test_weights_that_are_not_all_there_are_named(tmp_path, files, message):
    save_weights(tmp_path, files)
    with pytest.raises(UserError, match=message):
        weight_shapes(tmp_path)


def save_weights(folder, files: list[str]) -> None:
    """Write safetensors files of one tensor each, empty, and the index of two shards where one is among them."""
    for name in files:
        header = json.dumps({f"{name}.weight": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header)
    if "model-1.safetensors" in files:
        index = {"weight_map": {f"{name}.weight": name for name in SHARDS}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
