"""The program of docker/gotemplate, compiled once a test session: Go's own text/template as the judge."""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "docker" / "gotemplate"


def require(tool: str, why: str) -> None:
    """Skip the test, with the reason shown, where `tool` is not installed; in CI, which installs it, fail instead."""
    if shutil.which(tool) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{tool} is not installed: {why}")


@functools.cache
def program() -> Path:
    """Give the compiled program."""
    require("go", "these tests hold our templates against Go's text/template. Run: apt-get install golang-go")
    folder = Path(tempfile.mkdtemp(prefix="gotemplate-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / "temper-gotemplate"
    build = ["go", "build", "-buildvcs=false", "-o", str(built), "."]
    done = subprocess.run(build, cwd=SOURCES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return built
