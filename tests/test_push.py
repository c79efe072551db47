"""Sharing: what is uploaded and what never is, to a stand-in hub over HTTP, by Xet and by LFS."""

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stages import push
from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError
from stages.lib.recipe.read import read_recipe
from stages.lib.report.repository import collect
from tests.support import hub_server, uploads

pytestmark = pytest.mark.slow

TOKEN = "hf_" + "s3cret" * 5
TRANSFERS = ["xet", "lfs", "lfs in parts"]
LARGE = {  # of the three repositories that the recipe's save asks for: what goes to storage
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.model",
    "adapter_model.safetensors", "adapter-f16.gguf", "model.q8_0.gguf", "model.q4_k_m.gguf", "parity.png",
}  # fmt: skip
REPOSITORIES = {
    "ann/tiny": {
        "README.md", "chat_template.jinja", "config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer.model",
    },
    "ann/tiny-LoRA": {
        "README.md", "adapter-f16.gguf", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json",
    },
    "ann/tiny-GGUF": {
        "Modelfile", "README.md", "model.q4_k_m.gguf", "model.q8_0.gguf", "params", "parity.json", "parity.png",
        "system", "template",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return uploads.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Return a finished run that the test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(params=["xet"])
def hub(request, tmp_path, monkeypatch) -> Iterator[hub_server.Hub]:
    """Run the stand-in, and let this process take it for the hub, in the way of transfer that the test names."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils._xet import abort_xet_session

    disable_progress_bars()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param != "xet")
    with hub_server.running(TOKEN, "ann") as server:
        server.multipart = request.param == "lfs in parts"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server
    abort_xet_session()  # the next one has its own cache


def pushed(run: Path, *more: str) -> Result:
    """Run push in this process."""
    return CliRunner().invoke(push.main, uploads.arguments(run, *more))


def is_refused(result: Result) -> str:
    """Return the message of a run that ended as a user's mistake does."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert TOKEN not in result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("hub", TRANSFERS, indirect=True)
def test_everything_arrives_whole_in_private_repositories_with_a_card(hub, run):
    result = pushed(run)
    assert result.exit_code == 0, result.output
    assert {name: set(repository.tree) for name, repository in hub.repositories.items()} == REPOSITORIES
    assert all(repository.private for repository in hub.repositories.values())
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())
    for repository in hub.repositories.values():
        assert {path for path, entry in repository.tree.items() if "lfs" in entry} == LARGE & set(repository.tree)
    weights = hub.repositories["ann/tiny"].tree["model-00001-of-00002.safetensors"]["lfs"]
    assert weights["oid"] == hashlib.sha256(uploads.bits(3, 250_000)).hexdigest()
    assert hub.repositories["ann/tiny-GGUF"].content["README.md"].startswith(b"---\nbase_model: ann/tiny\n")
    assert result.output.count("files are on the hub as they are here, by size and hash") == 3
    assert f"{weights['oid'][:16]}          250,000  model-00001-of-00002.safetensors" in result.output


@pytest.mark.parametrize("hub", TRANSFERS, indirect=True)
def test_the_token_goes_to_the_hub_and_neither_to_storage_nor_to_the_terminal(hub, run):
    result = pushed(run)
    assert result.exit_code == 0
    assert TOKEN not in result.output
    assert {token for path, token in hub.authorized if path.startswith(("/v1/", "/v2/"))} <= {"short-lived"}
    assert not [path for path, _ in hub.authorized if path.startswith("/storage/")]
    assert [path for path, token in hub.authorized if token == TOKEN]


@pytest.mark.parametrize("hub", TRANSFERS, indirect=True)
def test_pushing_again_sends_nothing_and_makes_no_commit(hub, run):
    assert pushed(run).exit_code == 0
    before = len(hub.uploads)
    result = pushed(run)
    assert result.exit_code == 0
    assert "ann/tiny: 7 of 7 files are there, 0.0 MB to go" in result.output
    assert len(hub.uploads) == before
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


@pytest.mark.parametrize("arrived", [1, 2, 3])
@pytest.mark.parametrize("hub", ["xet", "lfs"], indirect=True)
def test_an_upload_that_broke_off_goes_on_and_sends_nothing_twice(hub, run, arrived):
    hub.refuse_after = arrived
    message = is_refused(pushed(run))
    assert "403" in message
    assert len(hub.uploads) == arrived
    assert hub.repositories["ann/tiny"].commits == [] or arrived == 3  # all of a repository, or none of it
    first = set(hub.uploads)
    hub.refuse_after = None
    assert pushed(run).exit_code == 0
    rest = hub.uploads[arrived:]
    assert rest
    assert not set(rest) & first
    assert len(set(hub.uploads)) == len(hub.uploads)
    assert {name: set(repository.tree) for name, repository in hub.repositories.items()} == REPOSITORIES


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_storage_that_fails_for_good_ends_with_one_message_after_retries(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.refuse_after, hub.refuse_with = 1, 500
    message = is_refused(pushed(run))
    assert "Error: ann/tiny: the hub answered 500" in message
    assert message.endswith("Run the same again: files that have arrived are not sent again")
    assert "/storage/" not in message  # such an address is a permit to write


def test_a_commit_that_fails_leaves_content_there_that_is_not_sent_again(hub, run):
    hub.refuse_commits = True
    assert "the hub answered 503: commits are told to fail" in is_refused(pushed(run, "--what", "merged_16bit"))
    before = len(hub.uploads)
    hub.refuse_commits = False
    assert pushed(run, "--what", "merged_16bit").exit_code == 0
    assert len(hub.uploads) == before == 3


@pytest.mark.parametrize(("path", "small"), [("model.q8_0.gguf", False), ("params", True)])
def test_a_file_that_the_hub_has_otherwise_is_an_error(hub, run, path, small):
    hub.damage = path
    message = is_refused(pushed(run, "--what", "gguf"))
    assert f"ann/tiny-GGUF: {path} is not on the hub as it is here" in message


def test_a_file_of_another_run_that_is_on_the_hub_is_named_and_left(hub, run):
    hub.repositories["ann/tiny"] = hub_server.Repository(private=True)
    for path in (".gitattributes", "model.safetensors"):
        hub.repositories["ann/tiny"].tree[path] = {"type": "file", "path": path, "size": 3, "oid": "a" * 40}
    result = pushed(run, "--what", "merged_16bit")
    assert result.exit_code == 0
    assert "ann/tiny: also holds model.safetensors, which is not of this run" in result.output
    assert ".gitattributes" not in result.output
    assert "model.safetensors" in hub.repositories["ann/tiny"].tree


def test_a_changed_file_alone_is_sent(hub, run):
    assert pushed(run, "--what", "merged_16bit").exit_code == 0
    hub.repositories["ann/tiny"].tree["tokenizer.json"]["oid"] = "b" * 40
    hub.repositories["ann/tiny"].tree["tokenizer.model"]["lfs"]["oid"] = "c" * 64
    result = pushed(run, "--what", "merged_16bit")
    assert "ann/tiny: 5 of 7 files are there" in result.output
    assert hub.repositories["ann/tiny"].commits[-1]["files"] == ["tokenizer.json", "tokenizer.model"]


@pytest.mark.parametrize("token", [None, "", "  \n"])
def test_without_a_token_in_the_environment_nothing_is_asked_of_the_hub(hub, run, tmp_path, monkeypatch, token):
    (tmp_path / "token").write_text(TOKEN)  # as `hf auth login` leaves it
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert "the environment has no HF_TOKEN" in is_refused(pushed(run))
    assert hub.requests == []


def test_no_option_takes_a_token():
    assert not [name for option in push.main.params for name in option.opts if "token" in name]


def test_a_wrong_token_is_named_and_not_shown(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = is_refused(pushed(run))
    assert "the hub answered 401" in message
    assert "HF_TOKEN" in message
    assert "hf_wrong" not in message


def test_another_ones_name_is_refused_as_not_ones_own(hub, run):
    hub.owner = "bob"
    message = is_refused(pushed(run))
    assert "ann/tiny: the hub answered 403" in message
    assert "is the name yours?" in message
    assert hub.uploads == []


def test_a_hub_that_is_not_there_ends_with_one_line(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert is_refused(pushed(run)).startswith("Error: ann/tiny: ")


def test_offline_mode_is_said_to_be_on(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in is_refused(pushed(run))
    assert hub.requests == []


@pytest.mark.parametrize("more", [(), ("--public",)])
@pytest.mark.parametrize("exists", [True, False])
def test_nothing_becomes_public_unasked(hub, run, more, exists):
    if exists:
        hub.repositories["ann/tiny-LoRA"] = hub_server.Repository(private=False)
    result = pushed(run, *more)
    if not exists and not more:
        assert result.exit_code == 0
        return
    message = is_refused(result)
    assert "the upload would be public, and there is no terminal to ask on. To allow it, add YES=1 (--yes)" in message
    assert ("ann/tiny-LoRA: public already" in message) == exists
    assert ("ann/tiny: to become public" in message) == bool(more)
    assert {method for method, _ in hub.requests} == {"GET"}


def test_public_comes_last_once_everything_is_there(hub, run):
    hub.repositories["ann/tiny"] = hub_server.Repository(private=True)
    result = pushed(run, "--public", "--yes")
    assert result.exit_code == 0, result.output
    assert not any(repository.private for repository in hub.repositories.values())
    asked = [path for method, path in hub.requests if method in ("PUT", "POST") and "/api/models/" in path]
    assert [path.rpartition("/")[2] for path in asked[-3:]] == ["settings"] * 3
    assert "settings" not in " ".join(asked[:-3])


def test_a_file_that_did_not_arrive_keeps_everything_private(hub, run):
    hub.damage = "model.q8_0.gguf"
    is_refused(pushed(run, "--public", "--yes"))
    assert all(repository.private for repository in hub.repositories.values())


def environment(hub: hub_server.Hub, folder: Path) -> dict[str, str]:
    """Return the environment of a push of its own process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}


@pytest.mark.parametrize(("typed", "code"), [("n\n", 1), ("\n", 1), ("y\n", 0)])
def test_on_a_terminal_it_asks_and_takes_no_for_an_answer(hub, run, tmp_path, typed, code):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "stages.push", *uploads.arguments(run, "--what", "gguf", "--public")]
    with subprocess.Popen(
        command, cwd=uploads.ROOT, env=environment(hub, tmp_path), stdin=theirs, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        os.write(ours, typed.encode())
        output = process.communicate(timeout=60)[0]
    for end in (ours, theirs):
        os.close(end)
    assert process.returncode == code, output
    assert "ann/tiny-GGUF: to become public; everyone will be able to see" in output
    assert "Upload it? [y/N]" in output
    assert TOKEN not in output
    if code:
        assert "nothing was uploaded" in output
        assert hub.repositories == {}
    else:
        assert not hub.repositories["ann/tiny-GGUF"].private
        assert set(hub.repositories["ann/tiny-GGUF"].tree) == REPOSITORIES["ann/tiny-GGUF"]


def link(path: Path) -> None:
    """Replace a file by a symbolic link to a copy of it."""
    path.rename(path.with_name("elsewhere"))
    shutil.move(path.with_name("elsewhere"), path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def state(path: Path, **changes: object) -> None:
    """Change entries of a manifest."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SPOILT = [
    (
        lambda run: (run / "merge/manifest.json").unlink(),
        r"merge: there is none; expected the finished output of merge",
    ),
    (lambda run: (run / "merge").rename(run / "merge.unfinished"), r"merge: it was started and not finished"),
    (lambda run: (run / "gguf/model.q8_0.gguf").unlink(), r"model\.q8_0\.gguf: is gone"),
    (
        lambda run: (run / "gguf/model.q8_0.gguf").write_bytes(uploads.bits(99, 150_000)),
        r"model\.q8_0\.gguf: is not the file that gguf wrote",
    ),
    (lambda run: link(run / "gguf/model.q8_0.gguf"), r"model\.q8_0\.gguf: is a symbolic link"),
    (lambda run: (run / "merge/model/more").symlink_to("/etc"), r"more: is a symbolic link"),
    (lambda run: (run / "merge/model/.env").write_text("KEY=1"), r"\.env: was not written by merge"),
    (lambda run: (run / "grpo/adapter/optimizer.pt").write_bytes(b"x"), r"optimizer\.pt: was not written by grpo"),
    (
        lambda run: state(run / "infer/manifest.json", inputs={"grpo": {"completions.jsonl": "0" * 64}}),
        r"infer: was made from another grpo \(completions\.jsonl\) than \S*grpo, so .* Run: make infer",
    ),
    (
        lambda run: state(run / "infer/manifest.json", inputs={"sft": {"gone.safetensors": "0" * 64}}),
        r"infer: was made from another sft \(gone\.safetensors\) than \S*sft, so ",
    ),
    (  # base-model itself is not uploaded, and so not looked at
        lambda run: state(run / "grpo/manifest.json", inputs={"base-model": {"model/model.safetensors": "0" * 64}}),
        r"grpo: was made from another base-model \(model/model\.safetensors\) than the one that \S+ was made from",
    ),
    (
        lambda run: (run / "tiny.toml").write_text((run / "tiny.toml").read_text().replace("rank = 16", "rank = 8")),
        r"\[lora\] rank = 8; expected 16, with which sft was made",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[message[:40] for _, message in SPOILT])
def test_what_is_not_whole_or_not_of_one_run_is_refused_before_the_hub_is_asked(hub, run, spoil, message):
    spoil(run)
    result = pushed(run)
    is_refused(result)
    assert re.search(message, " ".join(result.output.split())), result.output
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("ann/tiny", True), ("Ann-1/a.b_c", True), ("a/b", True),
        ("tiny", False), ("ann/", False), ("/tiny", False), ("ann/tiny/x", False), ("ann/ti ny", False),
        ("ann/tiny--x", False), ("../tiny", False), ("ann/..", False), ("ann/tiny.git", False), ("ann/tiny-", False),
        ("ann/tïny", False), ("https://huggingface.co/ann/tiny", False), ("ann/" + "x" * 90, False),
        ("ann/tiny\n", False),
    ],
)  # fmt: skip
def test_names_of_the_hub(name, fits):
    if fits:
        assert push.checked_name(name) == name
        return
    with pytest.raises(UserError, match="is not a name of the hub; expected user/name"):
        push.checked_name(name)


def test_what_overrides_the_recipe_and_an_unknown_word_is_refused(hub, run):
    assert pushed(run, "--what", "merged_4bit,lora").exit_code == 0
    assert set(hub.repositories) == {"ann/tiny-4bit", "ann/tiny-LoRA"}
    assert set(hub.repositories["ann/tiny-4bit"].tree) == {"README.md", "config.json", "model.safetensors"}
    assert "'merged_16' is not known (did you mean 'merged_16bit'?)" in is_refused(pushed(run, "--what", "merged_16"))


def test_the_adapter_names_no_path_of_this_disk(hub, run):
    assert pushed(run, "--what", "lora").exit_code == 0
    settings = json.loads(hub.repositories["ann/tiny-LoRA"].content["adapter_config.json"])
    assert settings == {"base_model_name_or_path": "base-model", "r": 16, "revision": None}
    assert b"/home/ann" not in b"".join(hub.repositories["ann/tiny-LoRA"].content.values())


def test_ollama_gets_template_system_and_params_of_the_modelfile(hub, run):
    assert pushed(run, "--what", "gguf").exit_code == 0
    content = hub.repositories["ann/tiny-GGUF"].content
    assert content["template"] == b"{{range .Messages}}{{.Content}}\n{{end}}"
    assert content["system"] == b"Think,\nthen answer."
    assert json.loads(content["params"]) == {"stop": ["<end>", "<eos>"], "num_ctx": 1024, "temperature": 0.5}
    assert content["Modelfile"] == uploads.MODELFILE.encode()


@pytest.mark.parametrize("name", ["training_args.bin", "model.pt", "code.py", "README", ".env", "x.gguf.exe"])
def test_a_kind_of_file_that_may_do_harm_is_refused_even_where_its_stage_wrote_it(run, name):
    (run / "merge/model" / name).write_bytes(b"x")
    manifests = {"merge": read_manifest(run / "merge", "merge")}
    manifests["merge"]["files"][f"model/{name}"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    with pytest.raises(UserError, match=rf"{re.escape(name)}: is not uploaded; expected only \.gguf, \.jinja"):
        collect("merged_16bit", {"merge": run / "merge"}, manifests, read_recipe(run / "tiny.toml"))


def test_a_kind_that_was_not_made_is_refused_with_what_makes_it(run):
    manifests = {"merge": read_manifest(run / "merge", "merge")}
    shutil.rmtree(run / "merge/model-4bit")
    files = manifests["merge"]["files"]
    manifests["merge"]["files"] = {name: file for name, file in files.items() if not name.startswith("model-4bit/")}
    with pytest.raises(UserError, match=r"holds no merged_4bit; .* NVIDIA GPU\)\. .* run: make merge"):
        collect("merged_4bit", {"merge": run / "merge"}, manifests, read_recipe(run / "tiny.toml"))
