"""ModelScope: a model and a dataset at a commit, against a stand-in that does what servers do wrong."""

from pathlib import Path

import pytest

from stages.lib import modelscope
from stages.lib.data.files import read_batches
from stages.lib.errors import UserError
from stages.lib.mirror import refuse_other_host, site_of
from stages.lib.model.locate import files_to_read
from stages.lib.recipe.tables import Source
from tests.support import mirror_server
from tests.support.mirror_server import COMMIT

WEIGHTS = bytes(range(256)) * 2000
MODEL = {
    "config.json": b'{"model_type": "gemma3_text"}', "model.safetensors": WEIGHTS, "tokenizer.json": b"{}",
    "empty.txt": b"", "consolidated.safetensors": b"x", ".gitattributes": b"x",
    "original/model.safetensors": b"x", "modeling.py": b"x",
}  # fmt: skip
READ = ["config.json", "empty.txt", "model.safetensors", "tokenizer.json"]
ROWS = b'{"question": "1 + 1?", "answer": "2", "level": 3}\n{"question": "2 + 2?", "answer": "4", "level": 1}\n'


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("MODELSCOPE_API_TOKEN", "MIRROR_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    with mirror_server.running() as running:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        running.files["models/qwen/tiny"] = dict(MODEL)
        yield running


def fetch(name: str = "qwen/tiny") -> Path:
    return modelscope.fetch("models", name, COMMIT, files_to_read)


def test_a_model_is_fetched_once_file_by_file_and_only_what_is_read(mirror):
    folder = fetch()
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == READ
    assert all((folder / name).read_bytes() == MODEL[name] for name in READ)
    assert mirror.fetched() == READ
    asked = len(mirror.asked)
    assert fetch() == folder
    assert len(mirror.asked) == asked
    (folder / "tokenizer.json").unlink()
    fetch()
    assert mirror.fetched()[len(READ) :] == ["tokenizer.json"]


def test_a_body_that_ends_early_is_gone_on_with_where_it_ended(mirror):
    mirror.cut["model.safetensors"] = 2
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [asked for path, asked, _ in mirror.asked if "model.safetensors" in path]
    assert ranges == ["", "bytes=256000-", "bytes=384000-"]


def test_what_has_arrived_is_kept_for_the_next_run(mirror):
    mirror.cut["model.safetensors"] = 4
    with pytest.raises(
        UserError, match=r"model.safetensors: http.* did not give it in 4 tries: .*what has arrived is kept"
    ):
        fetch()
    folder = modelscope.copy_folder("models", "qwen/tiny", COMMIT)
    assert not (folder / "model.safetensors").exists()
    mirror.asked.clear()
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert [asked for path, asked, _ in mirror.asked if "model.safetensors" in path] == ["bytes=480000-"]


def test_a_server_without_ranges_sends_the_file_again(mirror):
    mirror.cut["model.safetensors"], mirror.no_ranges = 1, True
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_with_another_digest_than_listed_is_refused_and_leaves_nothing(mirror):
    mirror.wrong_digest = "model.safetensors"
    with pytest.raises(
        UserError, match=r"model.safetensors: 512,000 bytes with sha256 [0-9a-f]{64} came from .*expected "
    ):
        fetch()
    folder = modelscope.copy_folder("models", "qwen/tiny", COMMIT)
    assert not list(folder.glob("*model.safetensors*"))


def test_bytes_that_changed_on_the_way_are_found(mirror):
    mirror.cut["model.safetensors"] = 4
    with pytest.raises(UserError, match="in 4 tries"):
        fetch()
    [part] = modelscope.copy_folder("models", "qwen/tiny", COMMIT).glob(".model.safetensors.part")
    part.write_bytes(b"\1" + part.read_bytes()[1:])
    with pytest.raises(UserError, match=r"with sha256 .* came from"):
        fetch()
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("status", "message", "asked"),
    [
        (404, r"tokenizer.json: not on ModelScope .*Fix name, revision or hub in the recipe", 1),
        (403, r"tokenizer.json: ModelScope refuses it \(403\).*export MODELSCOPE_API_TOKEN", 1),
        (503, r"tokenizer.json: .* did not give it in 4 tries: HTTP 503", 4),
    ],
)
def test_what_the_server_does_not_give_is_named_and_asked_for_again_only_where_that_may_help(
    mirror, status, message, asked
):
    mirror.status["tokenizer.json"] = status
    with pytest.raises(UserError, match=message):
        fetch()
    assert mirror.fetched().count("tokenizer.json") == asked


def test_a_repository_that_is_not_there_is_named_with_its_commit(mirror):
    with pytest.raises(UserError, match=f"qwen/huge at {COMMIT}: not on ModelScope"):
        fetch("qwen/huge")


def test_a_redirect_to_another_host_is_refused_unless_it_is_meant_and_never_gets_the_token(mirror, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    with mirror_server.running("127.0.0.2") as other:
        other.files = mirror.files
        path = f"/api/v1/models/qwen/tiny/repo?Revision={COMMIT}&FilePath=model.safetensors"
        mirror.redirect["model.safetensors"] = other.url + path
        with pytest.raises(UserError, match=r"sends this machine on to '127.0.0.2' .*export MIRROR_HOSTS=127.0.0.2"):
            fetch()
        assert other.asked == []
        monkeypatch.setenv("MIRROR_HOSTS", "cdn.example, 127.0.0.2")
        assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
        assert other.asked == [(path, "", "")]
    assert {token for _, _, token in mirror.asked} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("url", "endpoint", "is_refused"),
    [
        ("https://cdn-lfs-cn-1.modelscope.cn/x", "https://www.modelscope.cn", False),
        ("https://www.modelscope.cn./x", "https://www.modelscope.cn", False),
        ("https://modelscope.cn.evil.com/x", "https://www.modelscope.cn", True),
        ("https://cas-bridge.xethub.hf.co/x", "https://hf-mirror.com", True),
        ("http://127.0.0.2:80/x", "http://127.0.0.1:80", True),
        ("http://127.0.0.1:90/x", "http://127.0.0.1:80", False),
        ("file:///etc/passwd", "http://127.0.0.1:80", True),
    ],
)
def test_a_host_of_the_same_site_is_the_mirror_and_another_is_not(url, endpoint, is_refused, monkeypatch):
    monkeypatch.delenv("MIRROR_HOSTS", raising=False)
    refused = False
    try:
        refuse_other_host(url, endpoint, "HF_ENDPOINT")
    except UserError:
        refused = True
    assert refused is is_refused


def test_the_site_of_an_address_is_the_address():
    assert (site_of("10.1.2.3"), site_of("[::1]"), site_of("A.B.Example.com")) == ("10.1.2.3", "::1", "example.com")


@pytest.mark.parametrize("path", ["../outside.json", "/etc/outside.json", "a/../../outside.json"])
def test_a_path_that_leads_out_of_the_repository_is_refused(mirror, path):
    mirror.files["models/qwen/tiny"][path] = b"{}"
    with pytest.raises(UserError, match=r"ModelScope lists .*outside.json.*expected a path within the repository"):
        fetch()


def source(**keys: object) -> Source:
    given = {"name": "owner/sums", "use": ["sft"], "question": "question", "answer": "answer", "solution": "answer"}
    return Source(**given | {"hub": "modelscope", "revision": COMMIT} | keys)


def rows(of: Source) -> list[tuple[str, str]]:
    batches = [piece.parsed() for piece in read_batches(of, [])]
    return [pair for batch in batches for pair in zip(batch.columns["question"], batch.columns["answer"], strict=True)]


def test_a_dataset_is_read_by_its_split_of_a_listing_of_many_pages(mirror):
    files = {"data/train.jsonl": ROWS, "data/test.jsonl": b"no JSON", "README.md": b"# Sums"}
    mirror.files["datasets/owner/sums"] = files | {f"images/{number:04}.png": b"x" for number in range(250)}
    assert rows(source()) == [("1 + 1?", "2"), ("2 + 2?", "4")]
    assert mirror.fetched() == ["README.md", "data/train.jsonl"]
    asked = len(mirror.asked)
    assert rows(source()) == [("1 + 1?", "2"), ("2 + 2?", "4")]
    assert len(mirror.asked) == asked


def test_a_datasets_card_says_which_files_are_a_split(mirror):
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: parts/a*.jsonl\n---\n"
    mirror.files["datasets/owner/sums"] = {"README.md": card, "parts/a1.jsonl": ROWS, "train.jsonl": b"other"}
    assert rows(source()) == [("1 + 1?", "2"), ("2 + 2?", "4")]


def test_a_split_that_a_dataset_has_not_is_named_with_what_it_has(mirror):
    mirror.files["datasets/owner/sums"] = {"data/train.jsonl": ROWS}
    with pytest.raises(
        UserError, match=r"owner/sums on ModelScope: no file of the split 'dev'.*found data/train.jsonl$"
    ):
        rows(source(split="dev"))
