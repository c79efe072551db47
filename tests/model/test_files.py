"""A model that the hub does not give is a message, whatever library asked for it."""

import huggingface_hub.constants
import pytest

from stages.lib.errors import UserError
from stages.lib.model.files import fetching_model, model_folder, whole_model_folder


@pytest.mark.parametrize("fetch", [model_folder, whole_model_folder])
def test_a_model_that_the_hub_does_not_give_is_said_with_what_to_run(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"nobody/nothing at a{40}: the hub did not give it: .* Run: make doctor"):
        fetch("nobody/nothing", "a" * 40)


def test_what_is_no_matter_of_the_hub_keeps_its_own_error():
    with pytest.raises(FileNotFoundError), fetching_model("folder", None):
        raise FileNotFoundError("folder/config.json")
