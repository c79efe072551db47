"""make verify reads every byte that a manifest states, under every name, and says of each stage what it found."""

import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stages import verify
from tests.support import micro, uploads

pytestmark = pytest.mark.slow  # makes whole runs to damage

STAGES = ("base-model", "prepare-data", "sft", "grpo", "infer", "merge", "gguf", "ollama-modelfile")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Return the folder of a finished run with all stages, written once."""
    return uploads.write_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def run(tmp_path, written) -> Path:
    """Return a copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def verified(run: Path, *options: str) -> Result:
    arguments = ["--recipe", str(run / "tiny.toml"), "--artifacts", str(run), *options]
    return CliRunner().invoke(verify.main, arguments)


def flip(path: Path) -> None:
    """Flip a bit of a file, and leave its size and its times as they are."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("option", "said"), [((), "are byte for byte what"), (("--quick",), "have the size")])
def test_a_whole_run_is_a_line_a_stage(run, option, said):
    result = verified(run, *option)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*STAGES, str(run)]
    assert lines[3] == f"grpo: 5 files, 0.0 MB, {said} the manifest states"
    assert lines[-1] == f"{run}: whole, and all of one run"


@pytest.mark.parametrize("stage", STAGES)
def test_a_flipped_bit_anywhere_is_found_and_what_to_run_is_said_but_not_by_a_quick_look(run, stage):
    name = sorted(uploads.FILES[stage])[-1]
    flip(run / stage / name)
    assert verified(run, "--quick").exit_code == 0
    result = verified(run)
    assert result.exit_code == 1
    expected = rf"{stage}: \S+/{re.escape(name)}: has the sha256 \w{{64}}; expected \w{{64}}, as {stage} wrote it\. "
    assert re.search(rf"^{expected}Delete {run / stage} and run: make {stage}$", result.output, re.MULTILINE)
    assert f"Error: {run}: {stage} is not whole, as said above" in result.output


@pytest.mark.parametrize("option", [(), ("--quick",)])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "gguf/model.q8_0.gguf").unlink(), r"gguf: \S+q8_0.gguf: is gone; expected 150000 bytes"),
        (
            lambda run: (run / "gguf/parity.json").write_bytes(b""),
            r"gguf: \S+parity.json: has 0 bytes; expected 3 bytes",
        ),
        (lambda run: shutil.rmtree(run / "infer"), r"infer: \S+infer: there is none; .* Run: make infer"),
        (lambda run: (run / "sft/manifest.json").unlink(), r"sft: \S+sft: there is none; expected the finished output"),
        (
            lambda run: (run / "sft/manifest.json").write_bytes(b""),
            r"sft: \S+sft: its manifest.json is empty, as after a power cut",
        ),
        (lambda run: (run / "sft").rename(run / "sft.unfinished"), r"sft: \S+sft: it was started and not finished"),
    ],
)
def test_what_is_not_there_is_named_also_by_a_quick_look(run, option, spoil, message):
    spoil(run)
    result = verified(run, *option)
    assert result.exit_code == 1
    assert re.search(message, result.output)
    assert "Traceback" not in result.output


def test_a_file_with_two_names_is_read_under_both(run):
    (run / "ollama-modelfile/model.q8_0.gguf").unlink()
    os.link(run / "gguf/model.q8_0.gguf", run / "ollama-modelfile/model.q8_0.gguf")
    assert verified(run).exit_code == 0
    flip(run / "gguf/model.q8_0.gguf")
    result = verified(run)
    assert result.output.count("model.q8_0.gguf: has the sha256") == 2
    assert f"Error: {run}: gguf, ollama-modelfile are not whole, as said above" in result.output


def test_no_remembered_digest_counts(run, monkeypatch):
    monkeypatch.setattr("stages.lib.artifact.digests.LARGE_BYTES", 0)
    monkeypatch.setattr("stages.lib.artifact.digests.remembered", lambda: defaultdict(lambda: "0" * 64))
    assert verified(run).exit_code == 0


def test_artifacts_of_two_runs_are_not_whole_together(run):
    (run / "grpo/completions.jsonl").write_bytes(b"[]\n")
    micro.restate(run / "grpo", "completions.jsonl")
    result = verified(run, "--quick")
    assert result.exit_code == 1
    assert "infer: was made from another grpo (completions.jsonl) than" in result.output
    assert "Run: make infer" in result.output


def test_what_score_base_found_counts_where_grpo_goes_by_it(run):
    from stages.lib.artifact.folder import write_artifact

    def score(text: str) -> None:
        with write_artifact(run / "score-base", "score-base", {"at": {"text": text}}, {}) as made:
            (made.folder / "grpo.jsonl").write_text(text)

    score("one")
    result = verified(run)
    assert (result.exit_code, "score-base: 1 files" in result.output) == (0, True)
    flip(run / "score-base/grpo.jsonl")
    assert "score-base is not whole" in verified(run).output
