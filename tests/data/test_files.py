"""Rows come out of every kind of file as they are in it; a bad file is refused by name, line and what it lacks."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

from stages.lib.data import files
from stages.lib.data.batch import Batch
from stages.lib.data.files import files_of_source, read_batches
from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source

DATA = Path(__file__).parents[1] / "support"
REVISION = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"q": 'one, "two"\nthree', "a": "3"}, {"q": "caf\u00e9 \u2212 \u4e94", "a": "-4"}, {"q": "last", "a": "1,200"}]


def source(name: object, **knobs: object) -> Source:
    return Source(name=str(name), use=["grpo"], **{"question": "q", "answer": "a", **knobs})


def parsed(given: Source, files: list[Path]) -> list[Batch]:
    return [piece.parsed() for piece in read_batches(given, files)]


def read(path: Path, **knobs: object) -> list[tuple[int, object, object]]:
    given = source(path, **knobs)
    return [
        (number, *values)
        for batch in parsed(given, files_of_source(given, None, None))
        for number, values in zip(batch.numbers, zip(batch.columns["q"], batch.columns["a"], strict=True), strict=True)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    elif path.suffix == ".csv":
        quoted = [",".join('"' + row[name].replace('"', '""') + '"' for name in ("q", "a")) for row in rows]
        path.write_text("\r\n".join(["q,a", *quoted]), encoding="utf-8", newline="")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    found = read(write(tmp_path / f"mine{suffix}", ROWS))
    assert [values for _, *values in found] == [[row["q"], row["a"]] for row in ROWS]


@pytest.mark.parametrize(
    ("suffix", "numbers"), [(".jsonl", [1, 2, 3]), (".json", [1, 2, 3]), (".csv", [2, 4, 5]), (".parquet", [1, 2, 3])]
)
def test_rows_are_numbered_as_an_editor_numbers_them(tmp_path: Path, suffix: str, numbers: list[int]) -> None:
    assert [number for number, *_ in read(write(tmp_path / f"mine{suffix}", ROWS))] == numbers


@pytest.mark.parametrize("size", [8, 1 << 20])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, size: int
) -> None:
    monkeypatch.setattr(files, "BATCH_BYTES", size)
    path = write(tmp_path / f"mine{suffix}", ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [values for _, *values in read(path)] == [[row["q"], row["a"]] for row in ROWS]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_where_a_file_is_cut_into_pieces_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, size: int
) -> None:
    rows = [{"q": f'question \\ " {i} {{[,]}} \u00fc', "a": str(i)} for i in range(40)]
    path = write(tmp_path / f"mine{suffix}", rows)
    monkeypatch.setattr(files, "BATCH_BYTES", size)
    monkeypatch.setattr(files, "BATCH_ROWS", size)
    assert [values for _, *values in read(path)] == [[row["q"], row["a"]] for row in rows]


def test_a_json_list_on_one_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS))
    assert [values for _, *values in read(path)] == [[row["q"], row["a"]] for row in ROWS]


def test_a_json_file_with_an_object_a_line_is_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('\n{"q": "x", "a": 1}\n\n  {"q": "y", "a": 2}\n')
    assert read(path) == [(2, "x", 1), (4, "y", 2)]


def test_columns_the_recipe_does_not_name_are_not_carried_along(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "x", "a": 1, "huge": "..."}\n')
    (batch,) = parsed(source(path), [path])
    assert batch.columns == {"q": ["x"], "a": [1]}


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_short_float_of_parquet_is_the_shortest_number_that_it_means(tmp_path: Path, kind: str) -> None:
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "mine.parquet"
    answers = pyarrow.array(np.array([0.1, 2.5, 1000.0], kind), mask=np.array([False, False, False]))
    answers = pyarrow.concat_arrays([answers, pyarrow.nulls(1, answers.type)])
    parquet.write_table(pyarrow.table({"q": ["x"] * 4, "a": answers}), path)
    (batch,) = parsed(source(path), [path])
    assert batch.columns["a"] == ["0.1", "2.5", "1000", None]


def test_a_parquet_file_that_is_damaged_amid_its_rows_is_said(tmp_path: Path) -> None:
    path = Path(
        write(tmp_path / "mine.parquet", [{"q": f"question {number}" * 20, "a": number} for number in range(3000)])
    )
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = b"\x07" * (len(content) // 2 - 100)
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"mine.parquet, after row 0: the next rows can't be read \(.*Fetch or make it again"
    ):
        list(parsed(source(path), [path]))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_max_rows_takes_the_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, limit: int
) -> None:
    monkeypatch.setattr(files, "BATCH_ROWS", 2)
    assert len(read(write(tmp_path / f"mine{suffix}", ROWS), max_rows=limit)) == min(limit, 3)


BAD = {
    "empty.jsonl": (b"", "holds no rows"),
    "blank.jsonl": (b"\n \n\n", "holds no rows"),
    "empty.json": (b"[]", "holds no rows"),
    "empty.csv": (b"q,a\n", "holds no rows"),
    "nothing.csv": (b"", "has no column 'q'; found: none"),
    "third.jsonl": (b'{"q": "x", "a": 1}\n\n{"q": "x", "a": 1\n', "line 3: not JSON"),
    "two.jsonl": (b'{"q": "x", "a": 1} {"q": "y", "a": 2}\n', "line 1: not JSON"),
    "comma.jsonl": (b'{"q": "x", "a": 1}, {"q": "y", "a": 2}\n{"q": "z", "a": 3}\n', "line 1: not JSON"),
    "split.jsonl": (b'{"q": "x"\n"a": 1}\n', "line 1: not JSON"),
    "deep.jsonl": (b'{"q": "x", "a": 1}\n' + b"[" * 100_000 + b"\n", "line 2: not JSON"),
    "list.jsonl": (b'{"q": "x", "a": 1}\n["x", 1]\n', "line 2: a JSON list; expected an object"),
    "latin.jsonl": (
        '{"q": "x", "a": 1}\n{"q": "caf\u00e9", "a": 1}\n'.encode("latin-1"),
        "line 2: not UTF-8 (byte 0xe9 at column 11)",
    ),
    "latin.csv": ("q,a\nx,1\ncaf\u00e9,2\n".encode("latin-1"), "line 3: not UTF-8 (byte 0xe9 at column 4)"),
    "latin.json": ('[\n{"q": "caf\u00e9", "a": 1}]'.encode("latin-1"), "line 2: not UTF-8 (byte 0xe9 at column 11)"),
    "utf16.jsonl": ('{"q": "x", "a": 1}\n'.encode("utf-16"), "line 1: not UTF-8 (byte 0xff at column 1)"),
    "column.jsonl": (b'{"q": "x", "anser": 1}\n', "has no column 'a'"),
    "column.csv": (b"question,a\nx,1\n", "has no column 'q'; found: question, a"),
    "semicolon.csv": (b"q;a\nx;1\n", "has no column 'q'"),
    "twice.csv": (b"q,a,a\nx,1,2\n", "found the column 'a' 2 times; expected 1"),
    "mixed.csv": (b"q,a\nx,1\ny,1,200\nz,3\n", "line 3: 3 fields; the header has 2 (q, a)"),
    "short.csv": (b'q,a\n"x\ny",1\nz\n', "line 4: 1 fields; the header has 2"),
    "quote.csv": (b'q,a\n"x"y,1\n', "line 2: not CSV"),
    "open.csv": (b'q,a\n"x,1\ny,2\n', "not CSV"),
    "cut.json": (b'[{"q": "x", "a": 1},\n{"q": "y"', "line 2, column 10: not JSON (Expecting ',' delimiter)"),
    "unclosed.json": (
        b'[{"q": "x", "a": 1}\n',
        "line 2, column 1: not JSON (Expecting ',' delimiter); expected a list of objects, found 'the end of the file'",
    ),
    "after.json": (b'[{"q": "x", "a": 1}]\n[]', "line 2, column 1: not JSON (Extra data)"),
    "nocomma.json": (
        b'[{"q": "x", "a": 1}\n{"q": "y", "a": 2}]',
        """line 2, column 1: not JSON (Expecting ',' delimiter); expected a list of objects, found '{"q": "y", "a": """,
    ),
    "trailing.json": (b'[{"q": "x", "a": 1},]', "line 1, column 2"),
    "numbers.json": (b"[1, 2]", "row 1: a JSON int; expected an object"),
    "row.json": (b'[{"q": "x", "a": 1}, ["y"]]', "row 2: a JSON list; expected an object"),
    "middle.json": (
        b'[{"q": "x", "a": 1},\n{"q": y, "a": 2},\n' + b'{"q": "z", "a": 3},' * 10 + b"]",
        "line 2, column 7: not JSON (Expecting value)",
    ),
    "deep.json": (b"[" * 100_000, "deep.json: not to be read as JSON (maximum recursion depth exceeded"),
    "digits.json": (b'[{"q": "x", "a": ' + b"9" * 5000 + b"}]", "digits.json: not to be read as JSON (Exceeds the"),
    "fake.parquet": (b"q,a\nx,1\n", "not a Parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_name_and_what_is_wrong(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(path)
    assert raised.value.exit_code == 1
    assert name in raised.value.message
    assert message in raised.value.message


def test_a_missing_column_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", ROWS)
    with pytest.raises(UserError, match=r"no column 'qq' \(did you mean 'q'\?\); found: q, a"):
        read(path, question="qq")


def test_a_json_list_too_large_for_memory_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    path = tmp_path / "my problems.json"
    path.write_bytes(b"[")
    os.truncate(path, 1_000_000_001)  # a hole, which takes no room on the disk
    with pytest.raises(UserError) as raised:
        read(path)
    assert raised.value.message == (
        f"{path}: a JSON list of 1,000,000,001 bytes, all of which would be in memory at once; expected at most "
        "1,000,000,000, or JSON Lines, one object a line. Run: "
        f"jq -c '.[]' '{path}' > '{tmp_path}/my problems.jsonl'"
    )


@pytest.mark.parametrize(("limit", "is_read"), [(85, True), (84, False)])
def test_a_json_list_may_be_as_large_as_the_limit(tmp_path: Path, monkeypatch, limit: int, is_read: bool) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS[:2]))
    assert path.stat().st_size == 85
    monkeypatch.setattr(files, "MAX_LIST_BYTES", limit)
    if is_read:
        assert len(read(path)) == 2
        return
    with pytest.raises(UserError, match=r"a JSON list of 85 bytes, .*; expected at most 84"):
        read(path)


LAYOUTS = {
    "plain": (["train.jsonl"], ["train.jsonl"]),
    "csv": (["train.csv", "test.csv"], ["train.csv"]),
    "snapshot": (
        ["main/train-00000-of-00001.jsonl", "other/train-00000-of-00001.jsonl"],
        ["main/train-00000-of-00001.jsonl"],
    ),
    "data": (["data/train-00000-of-00001.jsonl", "README.md"], ["data/train-00000-of-00001.jsonl"]),
    "shards": (
        ["train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "train-extra.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_is_found_in_every_layout_of_a_folder(tmp_path: Path, layout: str) -> None:
    present, expected = LAYOUTS[layout]
    for name in present:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"q": "x", "a": 1}\n')
    found = files_of_source(source(tmp_path, config="main"), None, None)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == expected


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (["test.jsonl", "notes.txt"], "no file of the split 'train'; expected train.jsonl, .json, .csv or .parquet"),
        (["test.jsonl"], "found test.jsonl"),
        ([], "found nothing"),
        (["train.jsonl", "train.csv"], "more than once (train.csv, train.jsonl)"),
        (["train.jsonl", "train-00000-of-00001.jsonl"], "more than once"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "has 2 of the 3 files"),
    ],
)
def test_a_folder_that_does_not_say_which_file_is_meant_is_refused(
    tmp_path: Path, present: list[str], message: str
) -> None:
    for name in present:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError) as raised:
        files_of_source(source(tmp_path), None, None)
    assert message in raised.value.message


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.xlsx").write_bytes(b"PK")
    with pytest.raises(
        UserError, match=r"mine.xlsx: can't be read as a dataset; expected a name that ends in .jsonl, "
    ):
        files_of_source(source(tmp_path / "mine.xlsx"), None, None)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: there is no such file or folder"):
        files_of_source(source(tmp_path / "nowhere.jsonl"), None, None)


@pytest.mark.parametrize("below", ["", "gsm8k", "openai/gsm8k"])
def test_data_stands_in_for_the_hub(tmp_path: Path, below: str) -> None:
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / below / "train.jsonl").write_text("")
    given = source("openai/gsm8k", revision=REVISION, config="main")
    assert files_of_source(given, None, None) == []
    assert files_of_source(given, None, tmp_path) == [tmp_path / below / "train.jsonl"]


def test_problems_of_the_base_model_are_found_by_their_split(tmp_path: Path) -> None:
    (tmp_path / "problems").mkdir()
    (tmp_path / "problems" / "eval.jsonl").write_text("")
    given = source("base-model", split="eval")
    assert files_of_source(given, tmp_path, None) == [tmp_path / "problems" / "eval.jsonl"]
    with pytest.raises(UserError, match="give --base-model FOLDER"):
        files_of_source(given, None, None)


def hub(monkeypatch: pytest.MonkeyPatch, rows: object) -> list[dict]:
    """Put a stand-in for `datasets` in place; return the calls it gets."""
    calls: list[dict] = []

    def load_dataset(name: str, config: str | None, **options: object) -> object:
        calls.append({"name": name, "config": config, **options})
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_the_hub_is_asked_for_the_pinned_revision_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, [{"q": "x", "a": "1", "other": 0}, {"q": "y", "a": None}])
    given = source("openai/gsm8k", revision=REVISION, config="main", split="test")
    (batch,) = parsed(given, [])
    assert calls == [
        {"name": "openai/gsm8k", "config": "main", "split": "test", "revision": REVISION, "streaming": True}
    ]
    assert batch.columns == {"q": ["x", "y"], "a": ["1", None]}
    assert batch.where(1) == "openai/gsm8k (test), row 2"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ConnectionError("no route"), f"the hub did not give split 'train' of configuration 'default' at {REVISION}"),
        (FileNotFoundError("no such dataset"), "no such dataset"),
        (ValueError("Bad split"), "Bad split"),
        ([], "holds no rows"),
        ([{"question": "x", "a": 1}], "has no column 'q'"),
    ],
)
def test_what_the_hub_does_not_give_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, rows: object, message: str
) -> None:
    hub(monkeypatch, rows)
    with pytest.raises(UserError) as raised:
        parsed(source("openai/gsm8k", revision=REVISION), [])
    assert message in raised.value.message
    if isinstance(rows, Exception):
        assert "DATA=FOLDER" in raised.value.message


@pytest.mark.parametrize(
    ("folder", "config", "split", "question", "answer", "expected"),
    [
        ("gsm8k", "main", "test", "question", "answer", "#### 32,550"),
        ("dapo", "en", "train", "prompt", "solution", "-4"),
        ("openmath", "", "cot", "problem", "expected_answer", "\\sqrt{2}"),
    ],
)
def test_the_published_sets_are_read_by_their_published_columns(
    folder, config, split, question, answer, expected
) -> None:
    given = source("x/y", revision=REVISION, config=config, split=split, question=question, answer=answer)
    (batch,) = parsed(given, files_of_source(given, None, DATA / folder))
    assert batch.columns[answer][1].endswith(expected)
