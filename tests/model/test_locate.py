"""A recipe knows where its model is from the door on, and no stage's identity knows of the place."""

import re
from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.model.locate import locate_model
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Recipe

TINY = (Path(__file__).parents[2] / "recipes" / "tiny.toml").read_text()


def recipe(folder: Path, name: str = "base-model", revision: str = "", base_model: Path | None = None) -> Recipe:
    """Return the tiny recipe, lying in `folder`, with this [model] name and revision."""
    (folder / "mine.toml").write_text(
        TINY.replace('name = "base-model"', f'name = "{name}"\nrevision = "{revision}"', 1)
    )
    return read_recipe(folder / "mine.toml", base_model)


def test_the_model_that_base_model_made_is_in_its_folder(tmp_path):
    assert locate_model(recipe(tmp_path, base_model=tmp_path / "made")) == (f"{tmp_path}/made/model", None)


def test_a_model_that_base_model_is_to_make_is_asked_for_when_it_is_needed_and_not_before(tmp_path):
    read = recipe(tmp_path)
    assert read.model_folder is None
    with pytest.raises(UserError, match=r"expected the folder of that stage\. Add --base-model FOLDER"):
        locate_model(read)


def test_a_hub_name_has_a_revision_and_no_folder_even_where_a_base_model_is_given(tmp_path):
    read = recipe(tmp_path, "owner/name", "a" * 40, base_model=tmp_path)
    assert read.model_folder is None
    assert locate_model(read) == ("owner/name", "a" * 40)


def test_a_local_model_is_its_folder_which_is_looked_at_when_the_model_is_needed(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    read = recipe(tmp_path, "models/mine")
    assert locate_model(read) == ("models/mine", None)
    (tmp_path / "models" / "mine" / "config.json").unlink()
    with pytest.raises(UserError, match=re.escape("models/mine: expected a model folder with config.json")):
        locate_model(read)


def test_no_table_states_where_the_model_lies_so_a_moved_checkout_retrains_nothing(tmp_path):
    here, there = (recipe(tmp_path, base_model=tmp_path / name) for name in ("here", "there"))
    assert here.model_folder != there.model_folder
    assert here.tables("model") == there.tables("model")
    assert "folder" not in here.tables("model")["model"]


def test_a_recipe_can_not_name_the_folder_itself(tmp_path):
    (tmp_path / "mine.toml").write_text('model_folder = "/"\n' + TINY)
    with pytest.raises(UserError, match=r"mine\.toml: model_folder is not known"):
        read_recipe(tmp_path / "mine.toml")
