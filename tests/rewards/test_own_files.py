"""Whose change makes a run pay anew: the user's own files, and what they import of the checkout."""

from stages.lib.rewards.own import own_reward_files


def test_own_files_count_with_what_they_import_of_the_checkout_however_deep(tmp_path, monkeypatch):
    for name, text in {
        "recipes/own.py": "import json\nfrom recipes import shared\nfrom stages.lib.answers import number\n",
        "recipes/shared.py": "def f():\n    import recipes.deep, recipes.own\n",
        "recipes/deep.py": "import this is no Python",
        "recipes/other.py": "",
        "stages/lib/answers/number.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for module in ("artifact.code", "rewards.own"):
        monkeypatch.setattr(f"stages.lib.{module}.ROOT", tmp_path)
    names = ["own.py:paid", "xmlcount", "gone.py:paid"]
    assert own_reward_files(names, tmp_path / "recipes") == {
        "own.py:paid": tmp_path / "recipes/own.py",
        "recipes/own.py": tmp_path / "recipes/own.py",
        "recipes/shared.py": tmp_path / "recipes/shared.py",
        "recipes/deep.py": tmp_path / "recipes/deep.py",
    }
