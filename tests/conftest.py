"""What all tests share: no network, one thread, and one small run of the stages that train."""

import os
import re
import sys

# Before torch is imported, and for the processes that tests start: at this size a second thread costs more than it
# gives, and sums in another order would be other bytes.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from pathlib import Path

import hypothesis
import pytest

from tests.support import micro
from tests.support.once import once_a_run, run_folder

hypothesis.settings.register_profile("no clock", deadline=None)  # a busy machine is no fault of a test
hypothesis.settings.load_profile("no clock")

run_folder()  # of this process, before it starts others

os.fsync = lambda file: None  # no test's files have to outlive a power cut


def pytest_configure(config: pytest.Config) -> None:
    """With `-m "not torch"`, let an import of torch fail, so that a test that needs it and does not say so is found."""
    if "not torch" in config.option.markexpr:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's way to say: none


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "not torch"`, leave out a file that imports torch at its top."""
    if "not torch" not in config.option.markexpr or collection_path.suffix != ".py":
        return None
    return True if re.search(r"^(import|from) torch\b", collection_path.read_text(), re.MULTILINE) else None


@once_a_run
def micro_run() -> Path:
    folder = run_folder() / "micro"
    folder.mkdir(exist_ok=True)
    micro.write_recipe(folder)
    for stage in micro.INPUTS:
        result = micro.run(stage, folder)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def finished() -> Path:
    """Return a folder with micro.toml and the artifacts base-model, prepare-data, sft, grpo and infer made with it."""
    return micro_run()
