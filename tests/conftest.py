"""What all tests share: no network, one thread, and one small run of the stages that train."""

import os

# Before torch is imported, and for the processes that tests start: at this size a second thread costs more than it
# gives, and sums in another order would be other bytes.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from pathlib import Path

import pytest

from tests.support import micro


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with micro.toml and the artifacts base-model, prepare-data, sft, grpo and infer made with it."""
    folder = tmp_path_factory.mktemp("finished")
    micro.write_recipe(folder)
    for stage in micro.INPUTS:
        result = micro.run(stage, folder)
        assert result.exit_code == 0, result.output
    return folder
