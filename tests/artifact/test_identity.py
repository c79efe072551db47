"""A stage runs again when what it reads changed, and only then; it says what, and tells make what to watch."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from stages.lib.artifact.folder import write_artifact
from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError

FILES = {"sft.jsonl": "rows", "eval.jsonl": "problems", "model/a": "weights"}


def make(out: Path, stage: str = "example", inputs: dict | None = None, **options) -> None:
    """Run `stage`, which writes `files` and, on the way, the checkpoint of its step 7; `body` is called amid it."""
    files, body = options.pop("files", FILES), options.pop("body", lambda: None)
    with write_artifact(out, stage, options.pop("tables", {}), inputs or {}, **options) as run:
        for name, text in files.items():
            (run.folder / name).parent.mkdir(exist_ok=True)
            (run.folder / name).write_text(text)
        (run.checkpoints / "checkpoint-7").mkdir(parents=True, exist_ok=True)
        body()


def is_up_to_date(*arguments, **options) -> bool:
    """Run a stage as `make` does; say whether it found nothing to do."""
    try:
        make(*arguments, **options)
    except SystemExit as ended:
        return ended.code == 0
    return False


def set_code(monkeypatch, **digests: str) -> None:
    monkeypatch.setattr("stages.lib.artifact.identity.code_digest", lambda stage: digests.get(stage, "same"))


def test_a_changed_table_input_source_or_code_is_a_reason_to_run(tmp_path, monkeypatch):
    given, source, out = tmp_path / "given", tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text("one")
    make(given, "before")
    as_before = {"inputs": {"before": (given, ["sft.jsonl"])}, "tables": {"a": {"b": 1}}, "sources": {"rows": source}}
    make(out, **as_before)
    assert is_up_to_date(out, **as_before)
    assert not is_up_to_date(out, **as_before | {"tables": {"a": {"b": 2}}})
    assert not is_up_to_date(out, **as_before)
    source.write_text("two")
    assert not is_up_to_date(out, **as_before)
    assert not is_up_to_date(given, "before", files=FILES | {"sft.jsonl": "other"}, tables={"x": {}})
    assert not is_up_to_date(out, **as_before)
    assert not is_up_to_date(out, **as_before | {"inputs": {"before": (given, ["sft.jsonl", "eval.jsonl"])}})
    set_code(monkeypatch, example="other")
    assert not is_up_to_date(out, **as_before)
    assert is_up_to_date(out, **as_before)


def test_a_wave_stops_where_what_comes_out_is_the_same(tmp_path, monkeypatch):
    data, sft, grpo = (tmp_path / name for name in ("data", "sft", "grpo"))

    def run_all() -> list[bool]:
        return [
            is_up_to_date(data, "data"),
            is_up_to_date(sft, "sft", {"data": (data, ["sft.jsonl"])}),
            is_up_to_date(grpo, "grpo", {"data": (data, ["eval.jsonl"]), "sft": (sft, ["model/*"])}),
        ]

    set_code(monkeypatch)
    assert run_all() == [False, False, False]
    set_code(monkeypatch, data="with a function that nobody calls")
    assert run_all() == [False, True, True]
    set_code(monkeypatch, data="with a function that nobody calls", sft="likewise")
    assert run_all() == [True, False, True]
    assert run_all() == [True, True, True]


@pytest.mark.parametrize(
    ("changed", "up_to_date"),
    [
        ({"sft.jsonl": "other"}, False),
        ({"eval.jsonl": "other"}, True),
        ({"model/a": "other"}, False),
        ({"model/b": "new"}, False),
        ({"model": None, "model/a": "weights"}, True),
        ({"notes": "new"}, True),
    ],
    ids=str,
)
def test_of_an_input_the_files_count_that_are_read(tmp_path, changed, up_to_date):
    given, out = tmp_path / "given", tmp_path / "out"
    reads = {"before": (given, ["sft.jsonl", "model/*"])}
    make(given, "before")
    make(out, inputs=reads)
    files = {name: text for name, text in (FILES | changed).items() if text is not None}
    make(given, "before", files=files, tables={"other": {}})
    assert is_up_to_date(out, inputs=reads) == up_to_date


def test_the_manifest_states_each_file_that_was_read(tmp_path):
    make(tmp_path / "given", "before")
    make(tmp_path / "out", inputs={"before": (tmp_path / "given", ["*.jsonl"])})
    assert read_manifest(tmp_path / "out", "example")["inputs"] == {
        "before": {
            "eval.jsonl": "c187e609c81b018134abe21bd836afc58152c1f821123506aa1a52758ec24b17",
            "sft.jsonl": "bc51e9e65d79e1c90ba544ab2eae1044ccdf8c1af7a559ba375cba4276f7d99e",
        }
    }


def test_an_input_without_the_files_that_are_read_is_refused(tmp_path):
    make(tmp_path / "given", "before")
    with pytest.raises(UserError, match=r"given: holds no grpo.jsonl, which example reads. Run: make before"):
        make(tmp_path / "out", inputs={"before": (tmp_path / "given", ["grpo.jsonl"])})


@pytest.mark.parametrize(("read", "refused"), [("sft.jsonl", True), ("eval.jsonl", False)])
def test_a_flipped_byte_of_an_input_is_found_by_who_reads_it(tmp_path, read, refused):
    make(tmp_path / "given", "before")
    (tmp_path / "given" / "sft.jsonl").write_text("rOws")
    if not refused:
        make(tmp_path / "out", inputs={"before": (tmp_path / "given", [read])})
        return
    message = (
        r"sft.jsonl: has the sha256 \w{64}; expected \w{64}, as before wrote it. Delete \S+given and run: make before"
    )
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", inputs={"before": (tmp_path / "given", [read])})
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl: there is no such file; example reads it as 'rows'"):
        make(tmp_path / "out", sources={"rows": tmp_path / "rows.jsonl"})


# --- what a change costs ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for KILL: nothing in the stage may catch it."""


def kill() -> None:
    raise Killed


CHANGES = [
    ({"tables": {"sft": {"steps": 9, "beta": {"x": 2}}}}, "[sft] beta.x = 2, before 1"),
    ({"tables": {"sft": {"steps": 8, "beta": {"x": 1}}}}, "[sft] steps = 8, before 9"),
    ({"tables": {"sft": {"beta": {"x": 1}}}}, "[sft] steps = None, before 9"),
    ({"tables": {"sft": {"steps": 1, "beta": {"x": 3}}}}, "[sft] beta.x = 3, before 1; [sft] steps = 1, before 9"),
    ({"code": "other"}, "the code of example"),
    ({"rows": "other"}, "own.py:paid"),
    ({"files": FILES | {"model/a": "other"}}, "model/a of before"),
    ({"files": FILES | {"model/b": "new"}, "code": "other"}, "the code of example; model/b of before"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_what_throws_checkpoints_away_is_named_before_the_work_begins(tmp_path, monkeypatch, capsys, change, said):
    source, given, out = tmp_path / "own.py", tmp_path / "given", tmp_path / "out"
    source.write_text("one")
    set_code(monkeypatch)
    make(given, "before")
    options = {
        "tables": {"sft": {"steps": 9, "beta": {"x": 1}}},
        "sources": {"own.py:paid": source},
        "inputs": {"before": (given, ["model/*"])},
    }
    with pytest.raises(Killed):
        make(out, body=kill, **options)
    capsys.readouterr()
    with pytest.raises(Killed):
        make(out, body=kill, **options)
    assert capsys.readouterr() == (f"example: carrying on from {out}.unfinished/checkpoints\n", "")

    source.write_text(change.pop("rows", "one"))
    set_code(monkeypatch, **({"example": change.pop("code")} if "code" in change else {}))
    make(given, "before", files=change.pop("files", FILES), tables={"remade": {}})
    capsys.readouterr()
    messages = []
    make(out, body=lambda: messages.append(capsys.readouterr()), **options | change)
    assert messages == [("", f"example: starts anew, 7 steps are lost. Changed: {said}\n")]


# --- replaced while it is read ----------------------------------------------------------------------------------------


def rewritten(path: Path, text: str) -> None:
    path.with_name("new").write_text(text)
    path.with_name("new").replace(path)


REPLACED = {
    "another file in its place": lambda path: rewritten(path, "other"),
    "rewritten": lambda path: path.write_text("other"),
    "rewritten with an old time": lambda path: (path.write_text("rowS"), os.utime(path, (1, 1))),
    "gone": lambda path: path.unlink(),
    "the whole folder is gone": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize("what", ["input", "source"])
def test_what_is_replaced_while_it_is_read_ends_the_stage_and_nothing_is_carried_on_from(
    tmp_path, capsys, what, replace
):
    given, source, out = tmp_path / "given", tmp_path / "data" / "rows.jsonl", tmp_path / "out"
    source.parent.mkdir()
    source.write_text("rows")
    make(given, "before")
    shutil.copytree(tmp_path, tmp_path / "kept")
    path = {"input": given / "sft.jsonl", "source": source}[what]
    options = {"inputs": {"before": (given, ["sft.jsonl"])}, "sources": {"rows": source}}
    with pytest.raises(UserError, match=rf"{path}: was replaced while example read it, so nothing was finished"):
        make(out, body=lambda: replace(path), **options)
    assert not out.exists()
    for name in ("given", "data"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(tmp_path / "kept" / name, tmp_path / name)
    capsys.readouterr()
    make(out, **options)
    said = "example: starts anew, 7 steps are lost. Changed: what they were made from is not known\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ValueError("a row cut in two"), UserError("sft.jsonl, line 3: is not JSON")])
def test_what_is_replaced_is_named_also_when_the_stage_fails_on_it(tmp_path, error):
    make(tmp_path / "given", "before")

    def fail(replaced: bool) -> None:
        if replaced:
            rewritten(tmp_path / "given" / "sft.jsonl", "other")
        raise error

    inputs = {"before": (tmp_path / "given", ["sft.jsonl"])}
    with pytest.raises(type(error), match=str(error)):
        make(tmp_path / "out", inputs=inputs, body=lambda: fail(replaced=False))
    with pytest.raises(UserError, match=r"sft.jsonl: was replaced while example read it, so nothing was finished"):
        make(tmp_path / "out", inputs=inputs, body=lambda: fail(replaced=True))
    assert not (tmp_path / "out").exists()


HARMLESS = {
    "the same bytes in its place": lambda path: rewritten(path, "rows"),
    "another name for it": lambda path: os.link(path, path.with_name("linked")),
    "touched": lambda path: path.touch(),
    "a file that is not read": lambda path: path.with_name("eval.jsonl").write_text("other"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_an_input_that_still_holds_the_same_does_not_end_the_stage(tmp_path, change):
    make(tmp_path / "given", "before")
    make(
        tmp_path / "out",
        inputs={"before": (tmp_path / "given", ["sft.jsonl"])},
        body=lambda: change(tmp_path / "given" / "sft.jsonl"),
    )
    assert read_manifest(tmp_path / "out", "example")["stage"] == "example"


# --- what make looks at -----------------------------------------------------------------------------------------------


def outside(out: Path) -> list[str]:
    *names, last = (out / "outside").read_bytes().split(b"\0")
    assert last == b""  # each name is ended
    return [os.fsdecode(name) for name in names]


def test_make_is_told_the_absolute_paths_of_what_was_read_from_outside(tmp_path, monkeypatch):
    folder = tmp_path / "a folder\nwith -print"
    folder.mkdir()
    for name in ("rows.jsonl", "v1"):
        (folder / name).write_text("rows")
    (folder / "link").symlink_to("v1")
    monkeypatch.chdir(tmp_path)
    own = Path(folder.name)
    sources = {"rows": own / "rows.jsonl", "linked": own / "link", "its folder": own}
    make(tmp_path / "out", sources=sources)
    assert outside(tmp_path / "out") == [
        str(path) for path in (folder, *(folder / n for n in ("link", "rows.jsonl", "v1")))
    ]
    manifest = read_manifest(tmp_path / "out", "example")
    assert set(manifest["sources"]) == {"rows", "linked"}  # a folder has no digest
    assert "outside" not in manifest["files"]
    make(tmp_path / "none")
    assert (tmp_path / "none" / "outside").read_bytes() == b""


def test_data_that_moved_is_no_reason_to_run_and_make_is_told_its_new_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text("rows")
    make(tmp_path / "out", sources={"rows": tmp_path / "rows.jsonl"})
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    assert is_up_to_date(tmp_path / "out", sources={"rows": tmp_path / "moved.jsonl"})
    assert outside(tmp_path / "out") == [str(tmp_path / "moved.jsonl")]


def newer(out: Path, *paths: Path) -> list[str]:
    """Return which of `paths` make would take for changed since `out` was looked at."""
    command = ["find", *map(str, paths), "-maxdepth", "0", "-newercm", str(out / "manifest.json"), "-printf", "%f\n"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_what_is_edited_while_the_stage_runs_is_newer_than_its_manifest_until_it_was_looked_at(tmp_path, monkeypatch):
    recipe, before, out = tmp_path / "tiny.toml", tmp_path / "before.toml", tmp_path / "out"
    before.write_text("a = 1")
    time.sleep(0.02)  # the clock of a file system has ticks of some milliseconds
    monkeypatch.setattr("stages.lib.artifact.folder.STARTED", time.time())
    time.sleep(0.02)
    make(out, body=lambda: recipe.write_text("a = 1"))
    assert newer(out, recipe, before) == ["tiny.toml"]
    monkeypatch.setattr("stages.lib.artifact.folder.STARTED", time.time())
    assert is_up_to_date(out)
    assert newer(out, recipe, before) == []


def test_the_environment_is_that_of_the_start(tmp_path, monkeypatch):
    revision = ["a"]
    monkeypatch.setattr("stages.lib.artifact.folder.environment_now", lambda: {"git": revision[0]})
    make(tmp_path / "out", body=lambda: revision.__setitem__(0, "b"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["environment"] == {"git": "a", "world_size": 1}
