"""Where a stage ran: read at once, and no command that hangs holds a stage up."""

import time

from stages.lib.artifact import environment
from stages.lib.artifact.environment import environment_now, output_of


def test_the_environment_names_versions_and_where_it_ran(monkeypatch):
    monkeypatch.setenv("TEMPER_IMAGE_ID", "sha256:1")
    found = environment_now()
    assert set(found) == {"python", "packages", "git", "image", "gpu", "platform", "processors"}
    assert found["packages"]["click"] == "8.5.1"
    assert found["image"] == "sha256:1"


def test_a_command_that_is_not_there_that_fails_or_that_hangs_says_nothing(monkeypatch):
    assert output_of("echo", "a b") == "a b"
    assert output_of("there-is-no-such-program") is None
    assert output_of("false") is None
    monkeypatch.setattr(environment, "COMMAND_SECONDS", 0.2)
    started = time.monotonic()
    assert output_of("sleep", "60") is None
    assert time.monotonic() - started < 10
