"""What the tests of artifacts leave out: git and nvidia-smi, which are slow."""

import pytest


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    monkeypatch.setattr("stages.lib.artifact.folder.environment_now", lambda: {"python": "3.11"})
