"""HF_ENDPOINT: a model and a dataset come from the mirror alone, in a process that is set up as make does it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import mirror_server
from tests.support.mirror_server import COMMIT

ROOT = Path(__file__).parents[1]
LOAD = """
import sys
from stages.lib.model.files import fetching_model
with fetching_model("owner/tiny", sys.argv[1]):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("owner/tiny", revision=sys.argv[1], use_safetensors=True)
print("loaded", sum(weight.numel() for weight in model.parameters()))
"""
READ = """
import sys
from stages.lib.data.files import read_batches
from stages.lib.recipe.tables import Source
source = Source("owner/sums", ["sft"], "question", "answer", solution="answer", revision=sys.argv[1])
print("read", [each.parsed().columns for each in read_batches(source, [])])
"""
ROWS = b'{"question": "1 + 1?", "answer": "2"}\n'


@pytest.fixture
def mirror():
    with mirror_server.running() as running:
        running.files["datasets/owner/sums"] = {"train.jsonl": ROWS, "README.md": b"# Sums\n"}
        yield running


@pytest.fixture
def with_model(mirror, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    mirror.files["models/owner/tiny"] = files
    return mirror


def run(program: str, mirror: mirror_server.Mirror, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    unwanted = ("HF_HUB_OFFLINE", "HF_TOKEN", "MIRROR_HOSTS")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    given = {"HF_ENDPOINT": mirror.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"} | variables
    return subprocess.run(
        [sys.executable, "-c", program, COMMIT], cwd=ROOT, env=kept | given, capture_output=True, text=True, check=False
    )


@pytest.mark.torch
@pytest.mark.slow
def test_a_model_comes_from_the_mirror_also_where_that_announces_xet_storage(with_model, tmp_path):
    with mirror_server.running("127.0.0.2") as storage:
        with_model.xet = storage.url
        done = run(LOAD, with_model, tmp_path)
        assert "loaded" in done.stdout, done.stderr
        assert storage.asked == []
    assert "model.safetensors" in with_model.fetched()


@pytest.mark.torch
@pytest.mark.slow
def test_a_mirror_that_sends_on_to_another_host_is_named_at_once(with_model, tmp_path):
    with mirror_server.running("127.0.0.2") as other:
        other.files = with_model.files
        with_model.redirect["model.safetensors"] = f"{other.url}/owner/tiny/resolve/{COMMIT}/model.safetensors"
        done = run(LOAD, with_model, tmp_path)
        assert done.returncode == 1
        assert "sends this machine on to '127.0.0.2' for a file" in done.stderr
        assert other.asked == []
        done = run(LOAD, with_model, tmp_path, MIRROR_HOSTS="127.0.0.2")
        assert "loaded" in done.stdout, done.stderr
        assert "model.safetensors" in other.fetched()


@pytest.mark.slow
def test_a_mirror_with_xet_left_on_is_refused(mirror, tmp_path):
    done = run(READ, mirror, tmp_path, HF_HUB_DISABLE_XET="0")
    assert done.returncode == 1
    assert "large files would come past the mirror. Run: export HF_HUB_DISABLE_XET=1" in done.stderr


@pytest.mark.slow
def test_a_dataset_is_read_from_the_mirror(mirror, tmp_path):
    done = run(READ, mirror, tmp_path)
    assert "read [{'question': ['1 + 1?'], 'answer': ['2']}]" in done.stdout, done.stderr
    assert "train.jsonl" in mirror.fetched()


@pytest.mark.slow
def test_a_dataset_that_the_mirror_does_not_give_is_named(mirror, tmp_path):
    mirror.files.clear()
    done = run(READ, mirror, tmp_path)
    assert done.returncode == 1
    assert "owner/sums: the hub did not give split 'train' of configuration 'default'" in done.stderr
