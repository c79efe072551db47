"""Modelfiles: what is written is what Ollama reads, and what it would read otherwise is refused."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.errors import UserError
from stages.lib.ollama import modelfile


def read(tmp_path, text):
    path = tmp_path / "Modelfile"
    path.write_text(text, encoding="utf-8")
    return modelfile.read(path)


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("FROM ./a.gguf\n", [("from", "./a.gguf")]),
        ("from   ./a.gguf  \n", [("from", "./a.gguf")]),
        ("# a comment\n\n  FROM a\nPARAMETER stop <|end|>\n", [("from", "a"), ("parameter stop", "<|end|>")]),
        ('FROM a\nPARAMETER stop "a b"\nPARAMETER top_k 0',
         [("from", "a"), ("parameter stop", "a b"), ("parameter top_k", "0")]),
        ('FROM a\nTEMPLATE """{{.System}}\n# no comment\n"x" """\n',
         [("from", "a"), ("template", '{{.System}}\n# no comment\n"x" ')]),
        ('FROM a\nSYSTEM """"quoted""""\n', [("from", "a"), ("system", '"quoted"')]),
        ('FROM a\nSYSTEM "two\nlines"\n', [("from", "a"), ("system", "two\nlines")]),
        ('FROM a\nSYSTEM """cut here"""\nSYSTEM b', [("from", "a"), ("system", "cut here"), ("system", "b")]),
        ('FROM a\nSYSTEM """a\u00a0b\u200bc\x07d"""\n', [("from", "a"), ("system", "abcd")]),
        ('FROM a\nSYSTEM """ kept \n"""\n', [("from", "a"), ("system", " kept \n")]),
    ],
)  # fmt: skip
def test_a_modelfile_is_read_as_ollama_reads_it(tmp_path, text, commands):
    assert read(tmp_path, text) == commands


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TEMPLATE x\n", "has no FROM line"),
        ("FROM a\nTEMPLAT x\n", "line 2: 'TEMPLAT' is not a command"),
        ('FROM a\nSYSTEM """open\n\n', "line 2: the value of system has no end; expected closing marks"),
        ('FROM a\nSYSTEM """cut"""\nrest"""\n', 'line 3: \'rest"""\' is not a command'),
    ],
)
def test_a_broken_modelfile_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"FROM a\xff\n", "is not UTF-8 (byte 6); expected a Modelfile"),
        (b"FROM a\n" * (3 << 20), "has more than 16,777,216 bytes; expected a Modelfile"),
        (b'FROM "a\n' + b"b\n" * 1_000_000, "line 1: the value of from has no end"),
    ],
    ids=["not UTF-8", "too large", "a long value without an end"],
)
def test_what_is_no_modelfile_is_refused_in_seconds(tmp_path, content, message):
    path = tmp_path / "Modelfile"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(UserError, match=re.escape(message)):
        modelfile.read(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('an """ inside', 'holds """'),
        ('ends in """', 'holds """'),
        ("no\u00a0break", r"holds '\\xa0', which is not printable"),
        ("zero\u200bwidth", r"holds '\\u200b'"),
        ("carriage\r\nreturn", r"holds '\\r'"),
        ("nul\0", r"holds '\\x00'"),
    ],
)
def test_a_value_that_ollama_would_read_otherwise_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        modelfile.command("SYSTEM", value)
    with pytest.raises(UserError, match=message):
        modelfile.parameter("stop", value)


TEXT = st.text(st.one_of(st.sampled_from('"\n\t #{}<>'), st.characters(codec="utf-8")), min_size=1, max_size=30)


@given(st.lists(TEXT, min_size=4, max_size=4))
def test_whatever_is_not_refused_comes_back_as_it_was(tmp_path_factory, values):
    template, system, stop, license_text = values
    try:
        text = "FROM ./a.gguf\n" + modelfile.command("TEMPLATE", template) + modelfile.command("SYSTEM", system)
        text += modelfile.parameter("stop", stop) + modelfile.command("LICENSE", license_text)
    except UserError:
        return
    assert read(tmp_path_factory.getbasetemp(), text) == [
        ("from", "./a.gguf"),
        ("template", template),
        ("system", system),
        ("parameter stop", stop),
        ("license", license_text),
    ]


def test_numbers_are_written_bare():
    assert modelfile.parameter("temperature", 0.7) == "PARAMETER temperature 0.7\n"
    assert modelfile.parameter("num_ctx", 4096) == "PARAMETER num_ctx 4096\n"
    assert modelfile.parameter("stop", "<|end|>") == 'PARAMETER stop "<|end|>"\n'
