"""What npm's packages say: tests/npm is installed by its lock into a folder of the test run."""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.once import once_a_run, run_folder

NPM = Path(__file__).parents[1] / "npm"


@once_a_run
def npm_folder() -> Path:
    """Return a folder with the programs of tests/npm and their packages."""
    require("npm", "npm")
    folder = run_folder() / "npm"
    shutil.copytree(NPM, folder, ignore=shutil.ignore_patterns("node_modules"))
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@functools.cache
def quoted_templates() -> dict[str, str]:
    """Return published chat templates, those of GGUF files on the hub, by the names of Ollama's models."""
    package = npm_folder() / "node_modules" / "@huggingface" / "ollama-utils"
    source = (package / "src" / "chat-template-automap.ts").read_text()
    quoted = re.findall(r'model: "library/([^"]+)",\s*gguf: ("(?:[^"\\]|\\.)*")', source)
    return {name: json.loads(text) for name, text in quoted}


def require(program: str, package: str) -> str:
    """Return where `program` is. Without it a test is skipped; in CI, which installs it, that is a failure."""
    found = shutil.which(program)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"{program} is not installed. On Debian: apt-get install {package}"
        )
    return found
