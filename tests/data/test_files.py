"""Rows come out of every kind of file as they are in it; a bad file is refused by name, line and what it lacks."""

import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest

from stages.lib.data import delimited, documents, files, parquet
from stages.lib.data.batch import Batch
from stages.lib.data.files import read_batches
from stages.lib.data.place import files_of_source
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
    for module in (parquet, delimited, documents):
        monkeypatch.setattr(module, "BATCH_ROWS", size)
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
    for module in (parquet, delimited, documents):
        monkeypatch.setattr(module, "BATCH_ROWS", 2)
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
    "utf16.jsonl": (b"\xff\xfe{\x00\x00", "begins as UTF-16 does and is none"),
    "cut.jsonl.gz": (gzip.compress(b'{"q": "x", "a": 1}\n' * 50)[:-9], "can't be unpacked"),
    "fake.csv.gz": (b"q,a\nx,1\n", "can't be unpacked"),
    "fake.csv.zst": (b"q,a\nx,1\n", "can't be unpacked"),
    "header.tsv": (b"x\t1\ny\t2\n", "if the file has no header line, write one above: 'q\\ta'"),
    "several.json": (b'{"one": [{"q": "x"}], "two": [{"q": "x"}]}', "found one, two"),
    "other.json": (
        b'{"version": 3}',
        "or an object that holds one; found an object with version",
    ),
    "column.jsonl": (b'{"q": "x", "anser": 1}\n', "has no column 'a'"),
    "column.csv": (b"question,a\nx,1\n", "has no column 'q'; found: question, a"),
    "semicolon.csv": (b"question;a\nx;1\n", "has no column 'q'"),
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


def zst(content: bytes) -> bytes:
    import pyarrow

    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


LINES = b'{"q": "x", "a": "1"}\n\n{"q": "caf\xc3\xa9\xe2\x80\xa8 y", "a": "2"}\n'
SPREADSHEET = 'q\ta\r\nx\t1\r\n"caf\u00e9\u2028 y"\t2\r\n'
READ = [["x", "1"], ["caf\u00e9\u2028 y", "2"]]
AS_PEOPLE_HAVE_IT = {
    "mine.NDJSON": LINES,
    "mine.jsonl.gz": gzip.compress(LINES),
    "mine.jsonl.GZ": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "mine.jsonl.zst": zst(LINES),
    "mine.jsonl": LINES.decode().encode("utf-16"),
    "list.jsonl": b"[" + LINES.replace(b"\n\n", b",") + b"]",
    "mine.tsv": SPREADSHEET.encode(),
    "mine.tsv.zst": zst(SPREADSHEET.encode()),
    "unicode.csv": SPREADSHEET.encode("utf-16"),
    "big endian.csv": b"\xfe\xff" + SPREADSHEET.encode("utf-16-be"),
    "semicolon.csv": SPREADSHEET.replace("\t", ";").encode("utf-8-sig"),
    "bar.CSV": SPREADSHEET.replace("\t", "|").encode(),
    "sep.csv": b"sep=;\r\n" + SPREADSHEET.replace("\t", ";").encode(),
    "sep unix.csv": b"\xef\xbb\xbfsep=^\n" + SPREADSHEET.replace("\t", "^").encode(),
    "data.json": json.dumps({"version": "1", "data": [{"q": q, "a": a} for q, a in READ]}).encode(),
    "split.json": json.dumps({"test": [{"q": "no", "a": "no"}], "train": [{"q": q, "a": a} for q, a in READ]}).encode(),
    "pandas.json": json.dumps({"q": {"0": "x", "7": READ[1][0]}, "a": {"0": "1", "7": "2"}}).encode(),
    "lists.json": json.dumps({"q": ["x", READ[1][0]], "a": ["1", "2"]}, indent=1).encode(),
    "lists.json.gz": gzip.compress(json.dumps({"q": ["x", READ[1][0]], "a": ["1", "2"]}).encode()),
}


@pytest.mark.parametrize("name", AS_PEOPLE_HAVE_IT)
def test_a_file_is_read_as_the_programs_of_people_write_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(AS_PEOPLE_HAVE_IT[name])
    assert [values for _, *values in read(tmp_path / name)] == READ


def test_a_row_after_a_line_that_states_the_separator_is_numbered_as_an_editor_numbers_it(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(AS_PEOPLE_HAVE_IT["sep.csv"])
    assert [number for number, *_ in read(tmp_path / "mine.csv")] == [3, 4]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_dotted_name_is_a_field_of_a_struct(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", [{"q": "x", "a": {"b": {"c": "7"}}}, {"q": "y", "a": {"b": None}}])
    (batch,) = parsed(source(path, answer="a.b.c"), [path])
    assert batch.columns == {"q": ["x", "y"], "a.b.c": ["7", None]}


def test_a_column_with_a_dot_in_its_name_is_that_column(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "x", "a.b": "1", "a": {"b": "2"}}\n')
    (batch,) = parsed(source(path, answer="a.b"), [path])
    assert batch.columns["a.b"] == ["1"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_whole_rows_are_read_where_they_are_asked_for(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", ROWS)
    batches = [piece.parsed() for piece in read_batches(source(path, answer="q"), [path], whole=True)]
    assert [row for batch in batches for row in batch.rows] == ROWS


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
    monkeypatch.setattr(documents, "MAX_WHOLE_BYTES", limit)
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
    "old shards": (
        ["data/train-00000-of-00002-0123456789abcdef.jsonl", "data/train-00001-of-00002-fedcba9876543210.jsonl"],
        ["data/train-00000-of-00002-0123456789abcdef.jsonl", "data/train-00001-of-00002-fedcba9876543210.jsonl"],
    ),
    "converted": (["main/train/0000.jsonl", "main/test/0000.jsonl"], ["main/train/0000.jsonl"]),
    "configuration in the name": (["main-train.jsonl", "main-test.jsonl"], ["main-train.jsonl"]),
    "folder of a split": (
        ["train/part-1.JSONL.GZ", "train/part-0.jsonl", "train/notes.txt", "test/part-0.jsonl"],
        ["train/part-0.jsonl", "train/part-1.JSONL.GZ"],
    ),
    "packed": (["TRAIN.jsonl", "train.jsonl.zst"], ["train.jsonl.zst"]),
    "shards": (
        ["train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "train-extra.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_is_found_in_every_layout_of_a_folder(tmp_path: Path, layout: str) -> None:
    present, expected = LAYOUTS[layout]
    for name in present:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
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
        (["mgsm_de.tsv"], "mgsm_de.tsv. For one of these files write: name = "),
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


CARDS = {
    "path": ("configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: q-*.jsonl\n", "default"),
    "paths": ("configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: [q-1.jsonl, q-2.jsonl]\n", ""),
    "table": ("configs:\n- config_name: main\n  data_files: {train: q-*.jsonl, test: r-*.jsonl}\n", "main"),
    "text": ("configs:\n- config_name: main\n  data_files: 'q-[12].jsonl'\n", "main"),
    "list": ("configs:\n- config_name: other\n  data_files: r\n- config_name: main\n  data_files: ['q-*']\n", "main"),
}


@pytest.mark.parametrize("card", CARDS)
def test_a_dataset_card_says_which_files_are_a_split(tmp_path: Path, card: str) -> None:
    front, config = CARDS[card]
    (tmp_path / "README.md").write_text(f"---\n{front}---\n# Questions\n")
    for name in ("q-2.jsonl", "q-1.jsonl", "r-1.jsonl"):
        (tmp_path / name).write_text("")
    assert [path.name for path in files_of_source(source(tmp_path, config=config), None, None)] == [
        "q-1.jsonl",
        "q-2.jsonl",
    ]


@pytest.mark.parametrize("pattern", ["../outside.jsonl", "/etc/*", "gone.jsonl", "."])
def test_a_dataset_card_names_no_file_outside_its_folder(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "outside.jsonl").write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n- data_files: {pattern!r}\n---\n")
    with pytest.raises(UserError, match=r"README.md: lists .* for the split 'train'; there is no such file"):
        files_of_source(source(tmp_path / "set"), None, None)


@pytest.mark.parametrize(
    "front", ["", "---\n---\n", "---\nlicense: mit\n---\n", "---\n- a\n---\n", "---\nconfigs: 7\n---\n"]
)
def test_a_card_without_files_leaves_the_choice_to_the_names(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(front)
    (tmp_path / "train.jsonl").write_text("")
    assert files_of_source(source(tmp_path), None, None) == [tmp_path / "train.jsonl"]


@pytest.mark.parametrize(
    "name", ["mine/questions.ndjson", "mine/questions.TSV", "mine/questions.jsonl.gz", "mine/q.csv.zst"]
)
def test_a_local_file_that_is_missing_is_not_sought_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        files_of_source(source(name), None, None)


def test_a_name_that_may_be_of_the_hub_is_told_to_be_neither_here_nor_pinned() -> None:
    with pytest.raises(UserError, match="no such file or folder, and for a dataset of that name on the hub"):
        files_of_source(source("mine/questions"), None, None)


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.xlsx").write_bytes(b"PK")
    with pytest.raises(
        UserError, match=r"mine.xlsx: can't be read as a dataset; expected a name that ends in .jsonl, "
    ):
        files_of_source(source(tmp_path / "mine.xlsx"), None, None)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl': there is no such file or folder"):
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
