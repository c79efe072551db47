"""A folder without the suffix is whole: killed anywhere, run twice at once, on a full disk, beside others' files."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from stages.lib.artifact.digests import sha256_of
from stages.lib.artifact.folder import write_artifact
from stages.lib.artifact.manifest import read_manifest
from stages.lib.errors import UserError

ROOT = Path(__file__).parents[2]
OLD, NEW = {"example": {"steps": 1}}, {"example": {"steps": 2}}
CHANGES = ("mkdir", "rename", "replace", "rmdir", "unlink")  # all ways in which artifact.py changes what a folder holds


class Killed(BaseException):
    """Stands for KILL: nothing in the stage may catch it."""


def make(out: Path, tables: dict, inputs: dict | None = None, *, seconds: float = 0.0, **options) -> None:
    """Run a stage that writes two files, curves and, on the way, a checkpoint of two files; it checks what it finds."""
    with write_artifact(out, "example", tables, inputs or {}, **options) as run:
        found = {path.name for path in run.checkpoints.glob("*")}
        assert found in (set(), {"half-a", "half-b"}), "a checkpoint that is not whole was carried on from"
        run.checkpoints.mkdir(exist_ok=True)
        for name in ("half-a", "half-b"):
            (run.checkpoints / name).write_text(json.dumps(tables))
            assert (run.checkpoints / name).read_text() == json.dumps(tables)
        (run.folder / "model").mkdir()
        (run.folder / "model" / "weights").write_text(json.dumps(tables))
        (run.folder / "notes.txt").write_text("two")
        (run.folder / "logs").mkdir()
        (run.folder / "logs" / "events").write_text(str(random.random()))
        run.metrics["loss"] = 0.5
        run.seconds["train"] = seconds


def crash_in_the_body(out: Path, tables: dict) -> None:
    """Leave what a stage leaves that was killed with a whole checkpoint and half a result."""
    with pytest.raises(Killed), write_artifact(out, "example", tables, {}) as run:
        run.checkpoints.mkdir()
        for name in ("half-a", "half-b"):
            (run.checkpoints / name).write_text(json.dumps(tables))
        (run.folder / "half of the result").write_text("")
        raise Killed


def kill_at(monkeypatch, number: int, *, after: bool) -> list[str]:
    """Let the `number`-th change of the file system from now on be the last, done or not; return the list of them."""
    seen: list[str] = []

    def deadly(name, real):
        def change(*arguments, **options):
            seen.append(name)
            if len(seen) == number and after:
                real(*arguments, **options)
            if len(seen) >= number:
                raise Killed
            return real(*arguments, **options)

        return change

    for name in CHANGES:
        monkeypatch.setattr(os, name, deadly(name, getattr(os, name)))
    return seen


def survives(monkeypatch, out: Path, tables: dict, number: int, *, after: bool) -> bool:
    """Run the stage, killed at its `number`-th change; return whether it came to its end before."""
    with monkeypatch.context() as patch:
        kill_at(patch, number, after=after)
        try:
            make(out, tables)
        except Killed:
            return False
        return True


def state(folder: Path) -> dict[str, str]:
    """Return every file under `folder` with its content, but for locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def is_whole(out: Path, *allowed: dict) -> None:
    """Raise AssertionError unless `out` is a finished artifact made with one of the `allowed` tables."""
    manifest = read_manifest(out, "example")
    assert manifest["recipe"] in allowed
    for name, described in manifest["files"].items():
        assert sha256_of(out / name) == described["sha256"]
    assert json.loads((out / "model" / "weights").read_text()) == manifest["recipe"]
    assert {path.name for path in out.iterdir()} == {"manifest.json", "outside", "model", "notes.txt", "logs"}


def is_tidy(folder: Path) -> None:
    """Raise AssertionError when anything but `out` and its lock is left in `folder`."""
    assert {path.name for path in folder.iterdir()} == {"out", ".out.unfinished.lock"}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_change_of_the_first_run_nothing_looks_finished_and_the_next_run_is_whole(
    tmp_path, monkeypatch, after
):
    for number in range(1, 100):
        folder = tmp_path / str(number)
        out = folder / "out"
        ended = survives(monkeypatch, out, NEW, number, after=after)
        if out.exists():
            is_whole(out, NEW)
        with pytest.raises(SystemExit) if ended else _nothing_or_exit():
            make(out, NEW)
        is_whole(out, NEW)
        is_tidy(folder)
        if ended:
            break
    assert 8 < number < 100


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_change_of_a_later_run_the_old_result_or_the_new_one_stands_and_the_next_run_is_whole(
    tmp_path, monkeypatch, after
):
    for number in range(1, 100):
        out = tmp_path / str(number) / "out"
        make(out, OLD)
        ended = survives(monkeypatch, out, NEW, number, after=after)
        if out.exists():
            is_whole(out, OLD, NEW)
        else:  # between two renames: both are there under other names
            assert (out.with_name("out.unfinished") / "manifest.json").is_file()
            is_whole(out.with_name("out.replaced"), OLD)
        with _nothing_or_exit():
            make(out, NEW)
        is_whole(out, NEW)
        is_tidy(out.parent)
        if ended:
            break
    assert 12 < number < 100


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_while_another_recipes_checkpoints_are_deleted_nobody_carries_on_from_their_remains(
    tmp_path, monkeypatch, after
):
    for number in range(1, 100):
        out = tmp_path / str(number) / "out"
        crash_in_the_body(out, OLD)
        if survives(monkeypatch, out, NEW, number, after=after):
            break
        shutil.copytree(out.parent, tmp_path / f"{number} again")
        for tables, folder in ((OLD, out.parent), (NEW, tmp_path / f"{number} again")):
            with _nothing_or_exit():
                make(folder / "out", tables)  # looks at the checkpoints
            is_whole(folder / "out", tables)
            is_tidy(folder)
    assert 10 < number < 100


@pytest.mark.slow
def test_killed_twice_at_any_two_changes_the_third_run_is_whole(tmp_path, monkeypatch):
    chance = random.Random(0)
    for number in range(60):
        out = tmp_path / str(number) / "out"
        make(out, OLD)
        for tables in chance.choices((OLD, NEW), k=3):
            with contextlib.suppress(SystemExit):
                survives(monkeypatch, out, tables, chance.randrange(1, 30), after=chance.random() < 0.5)
            if out.exists():
                is_whole(out, OLD, NEW)
        with _nothing_or_exit():
            make(out, NEW)
        is_whole(out, NEW)  # what is left of another recipe's run may stay: it can still be carried on from
        assert not out.with_name("out.replaced").exists()


class _nothing_or_exit:
    """A block that ends by itself or, being up to date, with exit code 0."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        return kind is SystemExit and error.code == 0


@pytest.mark.slow
def test_killed_by_the_system_at_random_moments_the_folder_is_absent_or_whole(tmp_path):
    out = tmp_path / "out"
    program = (
        "import itertools, sys\nfrom pathlib import Path\nfrom stages.lib import artifact\n"
        "from stages.lib.artifact import folder\nfrom tests.artifact.test_folder import make\n"
        "folder.environment_now = dict\n"
        "for steps in itertools.count(int(sys.argv[2])):\n"
        "    make(Path(sys.argv[1]), {'example': {'steps': steps}})\n"
    )
    chance = random.Random(0)
    found = set()
    for start in range(0, 8000, 1000):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(out), str(start)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline().startswith("example: finished")  # the first of many
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.02 + 0.15 * chance.random())
        process.kill()
        process.communicate()
        if out.exists():
            found.add(read_manifest(out, "example")["recipe"]["example"]["steps"])
            is_whole(out, read_manifest(out, "example")["recipe"])
    make(out, NEW)
    is_whole(out, NEW)
    is_tidy(tmp_path)
    assert len(found) > 4


def test_the_manifest_comes_last_and_by_rename(tmp_path, monkeypatch):
    seen = []
    for name in CHANGES:
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, real=real, **rest: (seen.append((name, *given)), real(*given, **rest))
        )
    make(tmp_path / "out", NEW)
    written = [(name, *(Path(path).name for path in given if not isinstance(path, int))) for name, *given in seen]
    manifest = written.index(("replace", "manifest.json.tmp", "manifest.json"))
    assert ("rename", "out.unfinished", "out") in written[manifest:]
    assert not [change for change in written[manifest:] if change[0] in ("mkdir", "replace")][1:]


def test_files_and_folders_are_on_the_disk_before_the_manifest_and_that_before_its_folder_has_its_name(
    tmp_path, monkeypatch
):
    out, calls = tmp_path / "out", []
    replace, rename = os.replace, os.rename

    def note(what: str) -> None:
        calls.append(what.removeprefix(f"{tmp_path}/").replace("out.unfinished", "*"))

    monkeypatch.setattr(os, "fsync", lambda file: note(str(Path(f"/proc/self/fd/{file}").readlink())))
    monkeypatch.setattr(os, "replace", lambda old, new: (note(f"replace {new}"), replace(old, new)))
    monkeypatch.setattr(os, "rename", lambda old, new: (note(f"rename {new}"), rename(old, new)))
    make(out, NEW)
    before, after = calls[: calls.index("*/manifest.json.tmp")], calls[calls.index("*/manifest.json.tmp") :]
    assert {"*/model/weights", "*/notes.txt", "*/logs/events", "*/outside", "*/model", "*/logs", "*"} <= set(before)
    assert before.index("*/model/weights") < before.index("*/model")
    assert before[-1] == "*"
    where = str(tmp_path)
    assert after == ["*/manifest.json.tmp", f"replace {where}/*/manifest.json", "*", "*", f"rename {out}", where]


def test_a_second_run_writes_nothing_but_the_manifests_time(tmp_path, capsys):
    out = tmp_path / "out"
    make(out, NEW)
    for path in (path for path in out.rglob("*") if path.is_file()):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    before = state(tmp_path)
    with pytest.raises(SystemExit) as ended:
        make(out, NEW)
    assert ended.value.code == 0
    assert "example: up to date" in capsys.readouterr().out
    assert state(tmp_path) == before
    changed = [path.name for path in out.rglob("*") if path.is_file() and path.stat().st_mtime != 1_000_000_000]
    assert changed == ["manifest.json"]


def test_two_runs_manifests_differ_in_environment_and_wall_alone(tmp_path, monkeypatch):
    make(tmp_path / "a" / "out", NEW, seconds=1.0)
    monkeypatch.setattr("stages.lib.artifact.folder.environment_now", lambda: {"python": "3.14"})
    make(tmp_path / "b" / "out", NEW, seconds=2.0)
    first, second = (json.loads((tmp_path / name / "out" / "manifest.json").read_text()) for name in "ab")
    assert {key for key in first if first[key] != second[key]} == {"environment", "wall"}
    assert set(first["files"]) == {"model/weights", "notes.txt"}  # no curves
    assert first["wall"]["train"] == 1.0


# --- what is refused --------------------------------------------------------------------------------------------------


def put(path: Path, text: str = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


OTHERS = json.dumps({"stage": "another", "files": {}})
FOREIGN = {
    "a file in --out": ({"out/thesis.txt": "mine"}, "holds 'thesis.txt', which example did not write"),
    "a file deep in --out": ({"out/a/b/thesis.txt": "mine"}, "holds 'a/b/thesis.txt'"),
    "two files": ({"out/a": "mine", "out/b": "mine"}, "holds 'a' and 1 more"),
    "a hidden file": ({"out/.git/config": "mine"}, "holds '.git/config'"),
    "curves without a manifest": ({"out/logs/events": "mine"}, "holds 'logs/events'"),
    "another stage's artifact": ({"out/manifest.json": OTHERS}, "holds 'manifest.json'"),
    "a manifest that is none": ({"out/manifest.json": "{"}, "holds 'manifest.json'"),
    "a manifest without files": (
        {"out/manifest.json": '{"stage": "example"}', "out/mine": "x"},
        "holds 'manifest.json' and 1 more",
    ),
    "a manifest that is a list": ({"out/manifest.json": "[]"}, "holds 'manifest.json'"),
    "a manifest nested 100,000 deep": ({"out/manifest.json": "[" * 100_000}, "holds 'manifest.json'"),
    "a manifest that is a folder": ({"out/manifest.json/a": "", "out/mine": ""}, "holds 'manifest.json/a' and 1 more"),
    "--out is a file": ({"out": "mine"}, "out: is a file; expected a folder"),
    "a foreign unfinished folder": ({"out.unfinished/thesis.txt": "mine"}, "unfinished: was not made by example"),
    "an unfinished folder that is a file": ({"out.unfinished": "mine"}, "unfinished: was not made by example"),
    "another stage's unfinished folder": (
        {"out.unfinished/identity.json": OTHERS, "out.unfinished/checkpoints/1": "mine"},
        "unfinished: was not made by example",
    ),
    "another stage's result without its name": (
        {"out.unfinished/manifest.json": OTHERS, "out.unfinished/weights": "mine"},
        "unfinished: was not made by example",
    ),
}


@pytest.mark.parametrize(("files", "message"), FOREIGN.values(), ids=FOREIGN)
def test_what_this_stage_did_not_write_is_named_and_left_alone(tmp_path, files, message):
    for name, text in files.items():
        put(tmp_path / name, text)
    before = state(tmp_path)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", NEW)
    assert state(tmp_path) == before


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_folder_that_can_not_be_replaced_is_no_out(tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"--out {re.escape(out)}: expected the name of a folder for example to write"):
        make(Path(out), NEW)
    assert not state(tmp_path)


@pytest.mark.parametrize("name", ["out/thesis.txt", "out/model/thesis.txt", "out.replaced/thesis.txt"])
def test_a_file_put_there_while_the_stage_ran_is_not_lost_and_neither_is_the_result(tmp_path, name):
    out = tmp_path / "out"
    make(out, OLD)
    with (
        pytest.raises(UserError, match=r"thesis.txt', which example did not write"),
        write_artifact(out, "example", NEW, {}) as run,
    ):
        (run.folder / "weights").write_text("new")
        put(tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    with pytest.raises(SystemExit):
        make(out, NEW)
    assert (out / "weights").read_text() == "new"


def test_a_foreign_link_to_a_folder_is_not_lost(tmp_path):
    make(tmp_path / "out", OLD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds 'link'"):
        make(tmp_path / "out", NEW)
    assert (tmp_path / "out" / "link").is_symlink()


def test_empty_folders_are_no_reason_to_refuse(tmp_path):
    (tmp_path / "out" / "empty").mkdir(parents=True)
    (tmp_path / "out.unfinished").mkdir()
    make(tmp_path / "out", NEW)
    is_whole(tmp_path / "out", NEW)


def test_a_folder_that_can_not_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file/deep: example can't write there .*; expected a folder of yours on a disk"
    ):
        make(tmp_path / "file" / "deep" / "out", NEW)


def test_a_full_disk_is_found_before_the_stage_starts_and_both_sizes_are_named(tmp_path, monkeypatch):
    make(tmp_path / "out", OLD)
    crash_in_the_body(tmp_path / "out", NEW)
    before = state(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 1_230_000_000))
    with pytest.raises(UserError, match=r"the disk has 1.23 GB free; example needs 4.50 GB"):
        make(tmp_path / "out", NEW, room_bytes=4_500_000_000)
    assert state(tmp_path) == before
    make(tmp_path / "out", NEW, room_bytes=1_230_000_000)


def test_room_is_looked_for_on_the_disk_that_will_hold_the_folder(tmp_path, monkeypatch):
    asked = []
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(Path(path)), real(path))[1])
    make(tmp_path / "a" / "out", NEW, room_bytes=1)
    assert asked == [tmp_path / "a"]


def test_two_runs_at_once_are_refused_and_the_first_ends_well(tmp_path):
    out = tmp_path / "out"
    with write_artifact(out, "example", NEW, {}) as run:
        (run.folder / "half").write_text("")
        with pytest.raises(UserError, match="another process is running example there"):
            make(out, OLD)
        with pytest.raises(UserError, match="another process is running example there"):
            make(out, NEW)
        (run.folder / "half").unlink()
        (run.folder / "weights").write_text("")
    assert set(read_manifest(out, "example")["files"]) == {"weights"}


def damage(folder: Path, how: str) -> None:
    match how:
        case "unfinished":
            folder.rename(folder.with_name(folder.name + ".unfinished"))
        case "absent":
            shutil.rmtree(folder)
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "truncated":
            (folder / "notes.txt").write_text("t")
        case "flipped":
            (folder / "notes.txt").write_text("twO")
        case "without outside":
            (folder / "outside").unlink()
        case "lost":
            (folder / "model" / "weights").unlink()
        case "half a manifest":
            (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:100])
        case "another stage":
            (folder / "manifest.json").write_text(OTHERS)
        case "no list of files":
            (folder / "manifest.json").write_text('{"stage": "example"}')
        case "nested":
            (folder / "manifest.json").write_text("[" * 100_000)
        case "emptied":
            (folder / "manifest.json").write_text("\0" * 700)
        case "a folder":
            (folder / "manifest.json").unlink()
            (folder / "manifest.json").mkdir()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unfinished", r"given: it was started and not finished; .* Run: make example"),
        ("absent", r"given: there is none; expected the finished output of example there. Run: make example"),
        ("no manifest", r"given: there is none"),
        ("truncated", r"notes.txt: has 1 bytes; expected 3 bytes, as example wrote it"),
        ("lost", r"weights: is gone; expected \d+ bytes"),
        (
            "flipped",
            r"notes.txt: has the sha256 3660a\w{59}; expected 3fc4c\w{59}, as example wrote it. Delete .*given",
        ),
        ("half a manifest", r"given: its manifest.json is not one that a stage wrote.*or delete .*given and run: make"),
        (
            "no list of files",
            r"manifest.json: is not as example writes it. Delete .*given and run: make",
        ),
        ("nested", r"given: its manifest.json is not one that a stage wrote.*or delete .*given and run: make"),
        ("emptied", r"given: its manifest.json is empty, as after a power cut. Run: make example"),
        ("a folder", r"given: there is none; expected the finished output of example there. Run: make example"),
        ("another stage", r"given: holds the output of 'another'; expected that of 'example'"),
    ],
)
def test_an_input_that_is_not_whole_is_refused_and_nothing_is_written(tmp_path, how, message):
    make(tmp_path / "given", NEW)
    damage(tmp_path / "given", how)
    before = state(tmp_path)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", NEW, {"example": (tmp_path / "given", ["*"])})
    assert state(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"example: \S+notes.txt: has 1 bytes; expected 3 bytes. It is made again\n"),
        ("lost", r"example: \S+weights: is gone; expected 25 bytes. It is made again\n"),
        (
            "flipped",
            r"example: \S+notes.txt: has the sha256 3660a7592\w{55}; expected 3fc4ccfe7\w{55}. It is made again\n",
        ),
        ("without outside", r"example: \S+outside: is gone. It is made again\n"),
    ],
)
def test_a_result_that_lost_something_is_made_again_and_that_is_said(tmp_path, capsys, how, message):
    make(tmp_path / "out", NEW)
    damage(tmp_path / "out", how)
    capsys.readouterr()
    make(tmp_path / "out", NEW)
    assert re.fullmatch(message, capsys.readouterr().err)
    is_whole(tmp_path / "out", NEW)


@pytest.mark.parametrize("emptied", ["", "\0" * 700], ids=["empty", "NUL"])
def test_an_artifact_whose_manifest_a_power_cut_emptied_is_made_again_and_nothing_of_it_is_lost(
    tmp_path, capsys, emptied
):
    out = tmp_path / "out"
    make(out, OLD)
    (out / "thesis.txt").write_text("mine")
    (out / "manifest.json").write_text(emptied)
    make(out, NEW)
    assert f"{out}: its manifest.json is empty, so it is made again. The old files are in {out}.emptied" in (
        capsys.readouterr().err
    )
    is_whole(out, NEW)
    assert (tmp_path / "out.emptied" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "out.emptied" / "model" / "weights").read_text() == json.dumps(OLD)
    (out / "manifest.json").write_text(emptied)
    with pytest.raises(UserError, match=r"its manifest.json is empty, and \S+out.emptied is in the way of it"):
        make(out, NEW)


def test_an_error_in_the_stage_leaves_the_old_result_and_the_checkpoints(tmp_path, capsys):
    make(tmp_path / "out", OLD)
    crash_in_the_body(tmp_path / "out", NEW)
    is_whole(tmp_path / "out", OLD)
    with write_artifact(tmp_path / "out", "example", NEW, {}) as run:
        assert {path.name for path in run.checkpoints.iterdir()} == {"half-a", "half-b"}
        assert not (run.folder / "half of the result").exists()
    assert "example: carrying on from" in capsys.readouterr().out
