"""The code of a stage counts where it can change what comes out, on every Python the same."""

import shutil
from pathlib import Path

import pytest

from stages.lib.artifact import code
from stages.lib.artifact.code import code_digest

ROOT = Path(__file__).parents[2]

EDITS = [
    ("lib/recipe/tables.py", "MAX_VLLM_RANK = 512", "MAX_VLLM_RANK = 256", False),
    ("lib/recipe/read.py", "def ", "class Nothing: ...\n\n\ndef ", True),
    ("lib/recipe/rules.py", "def ", "class Nothing: ...\n\n\ndef ", True),
    ("lib/train/callbacks.py", "def ", "class Nothing: ...\n\n\ndef ", True),  # progress
    ("lib/train/checkpoints.py", "def ", "class Nothing: ...\n\n\ndef ", True),
    ("lib/train/health.py", "def ", "class Nothing: ...\n\n\ndef ", True),
    ("lib/train/ladder.py", "def ", "class Nothing: ...\n\n\ndef ", False),
    ("lib/gguf/types.py", "GGUF_TYPES", "OTHER = GGUF_TYPES", True),
    ("sft.py", '"Fine-tune', '"Now fine-tune', True),  # the module's docstring
    ("sft.py", "import click\n", "import click  # options\n", True),
    ("sft.py", "import click\n", "\n\n# A comment.\nimport click\n", True),
    ("lib/train/run.py", '"""What SFT', '"""All that SFT', True),
    ("lib/train/run.py", '"""Save the adapter', '"""Keep the adapter', True),  # a function's
    ("lib/rewards/xml.py", "import", "import nothing\nimport", True),  # sft does not reach it
    ("gguf.py", "import", "import nothing\nimport", True),
    ("sft.py", '"shuffle_dataset": False', '"shuffle_dataset": True', False),
    ("lib/machine/room.py", "20_000_000", "20_000_001", True),
    ("sft.py", "packing_strategy", "packing_strateg", False),
    ("lib/train/run.py", '"adapter"', '"adapters"', False),
    ("lib/errors.py", "exit_code = 1", "exit_code = 2", True),  # the frame: it changes no result
    ("lib/artifact/manifest.py", '"manifest.json"', '"made.json"', True),
    ("lib/model/locate.py", '"trust_remote_code": False', '"trust_remote_code": None', False),
    (
        "lib/answers/formats.py",
        'answer_open="<answer>"',
        'answer_open="<result>"',
        False,
    ),  # by way of model/
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "same"), EDITS)
def test_code_counts_where_the_stage_reaches_it_but_comments_and_docstrings_do_not(
    tmp_path, monkeypatch, file, old, new, same
):
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "ROOT", tmp_path)
    before = code_digest("sft")
    path = tmp_path / "stages" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert (code_digest("sft") == before) == same


@pytest.mark.slow
def test_a_stage_with_a_hyphen_finds_its_code():
    names = ("prepare-data", "ollama-modelfile", "base-model", "there is no such stage")
    assert len({code_digest(name) for name in names}) == 4


@pytest.mark.slow
def test_the_limits_of_a_proof_are_code_of_the_stage_that_proves(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "ROOT", tmp_path)
    before = code_digest("gguf")
    with (tmp_path / "stages" / "lib" / "gguf" / "types.py").open("a") as file:
        file.write("GGUF_TYPES['f16'] = 1.0\n")
    assert code_digest("gguf") != before


@pytest.mark.parametrize(
    "line",
    [
        "from stages.lib.answers import stats",
        "import stages.lib.answers.stats",
        "def f():\n    from stages.lib.answers.stats import wilson",
    ],
)
def test_a_module_counts_however_it_is_imported(tmp_path, monkeypatch, line):
    for name, text in (("stages/example.py", line), ("stages/lib/answers/stats.py", "a = 1")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    before = code_digest("example")
    (tmp_path / "stages/lib/answers/stats.py").write_text("a = 2")
    assert code_digest("example") != before


@pytest.mark.parametrize("line", ["import own", "from own import part", "import own.part", "from own.part import f"])
def test_what_python_runs_when_a_package_is_imported_counts(tmp_path, monkeypatch, line):
    (tmp_path / "own").mkdir()
    for name in ("__init__", "part"):
        (tmp_path / "own" / f"{name}.py").touch()
    monkeypatch.setattr(code, "ROOT", tmp_path)
    assert "own/__init__.py" in code.imported_modules(line)
    assert ("own/part.py" in code.imported_modules(line)) == ("part" in line)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ('x = (\n    "a"\n    "b"\n)', 'x = (\n    "a"  # why\n    # so\n\n    "b"\n)', True),
        ('x = (\n    f"{a}"\n    f"b{c}"\n)', 'x = (\n    f"{a}"  # why\n    # so\n\n    f"b{c}"\n)', True),
        ('x = """a\n# b\n"""', 'x = """a\n"""', False),
        ('x = f"""{a}\n# b\n"""', 'x = f"""{a}\n"""', False),
        ('x = f"""{a}\n\n"""', 'x = f"""{a}\n"""', False),
        ('x = """a  \n"""', 'x = """a\n"""', False),
        ("x = '\x0c\u2028'\ny = 1", "x = '\x0c\u2028'\ny = 1  # why\n", True),
        ("x = '\x0c#a'", "x = '\x0c#b'", False),
    ],
)
def test_a_comment_between_the_pieces_of_a_string_is_one_and_what_is_in_the_string_is_none(before, after, same):
    assert (code.without_comments(before) == code.without_comments(after)) == same
