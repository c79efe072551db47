"""Whatever stands in a file that comes from outside, what reads it gives a value or one message, and no other error.

TEMPER_FUZZ=N takes N examples of each; left out, what fits a minute in all.
"""

import json
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.lib.answers import formats
from stages.lib.answers.number import canonical_number
from stages.lib.artifact.manifest import is_emptied, manifest_in, stage_of
from stages.lib.data.files import read_batches
from stages.lib.data.place import files_in
from stages.lib.errors import UserError
from stages.lib.machine.shape import FAMILIES, shape_of_config
from stages.lib.model.files import refuse_quantized_base, vocabulary_size
from stages.lib.model.headers import json_object, tensors_in
from stages.lib.ollama import modelfile
from stages.lib.recipe.read import read_recipe
from tests.support import hostile_files
from tests.support.hostile_files import SOURCE, refusal
from tests.support.recipes import RECIPES

EXAMPLES = int(os.environ.get("TEMPER_FUZZ", "300"))
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None,
    derandomize="TEMPER_FUZZ" not in os.environ,
)  # fmt: skip
pytestmark = pytest.mark.slow  # half a minute for make check
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4),
    max_leaves=12,
)
changes = st.tuples(st.sampled_from(sorted(hostile_files.CHANGES)), st.integers(0, 2**32))


def changed(content: bytes, change: tuple[str, int]) -> bytes:
    return hostile_files.CHANGES[change[0]](content, random.Random(change[1]))


@fuzzed
@given(change=changes, name=st.sampled_from(["tiny", "qwen3-1.7b-dapo", "tiny-gym"]))
def test_a_recipe(tmp_path, change, name):
    path = tmp_path / "recipe.toml"
    path.write_bytes(changed((RECIPES / f"{name}.toml").read_bytes(), change))
    said = refusal(read_recipe, path)
    assert not said or said.startswith(str(path))


@fuzzed
@given(table=st.sampled_from(["model", "data", "sft", "grpo", "gguf", "format"]), values=st.dictionaries(
    st.sampled_from(["name", "steps", "seed", "sources", "types", "template_kwargs", "max_mean_kl", "dtype"]), values,
    min_size=1, max_size=3,
))  # fmt: skip
def test_values_of_any_type_in_a_recipe(tmp_path, table, values):
    from stages.lib.recipe.write import as_toml
    from tests.support.recipes import read_tables

    tables = read_tables()
    tables[table] |= values
    path = tmp_path / "recipe.toml"
    try:
        path.write_text(as_toml(tables))
    except (TypeError, ValueError, AttributeError, UserError, UnicodeEncodeError):
        return  # what TOML has no word for
    said = refusal(read_recipe, path)
    assert not said or said.startswith(str(path))


@fuzzed
@given(change=changes, suffix=st.sampled_from([each for each in hostile_files.DATA if each != ".parquet"]))
def test_a_data_file(tmp_path, change, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(changed(hostile_files.good_rows(suffix), change))
    said = refusal(lambda: [piece.parsed() for piece in read_batches(SOURCE, [path])])
    assert not said or str(path) in said


@fuzzed
@given(rows=st.lists(values | st.fixed_dictionaries({"question": values, "answer": values, "solution": values})))
def test_rows_of_any_value(tmp_path, rows):
    for name, text in (("a.jsonl", "\n".join(map(json.dumps, rows))), ("a.json", json.dumps(rows))):
        (tmp_path / name).write_text(text)
        said = refusal(lambda path: [piece.parsed() for piece in read_batches(SOURCE, [path])], tmp_path / name)
        assert not said or name in said


@fuzzed
@given(content=st.binary(max_size=300) | values.map(lambda value: json.dumps(value).encode()))
def test_a_manifest(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    assert manifest_in(path, "sft") is None
    assert stage_of(path) is None or isinstance(stage_of(path), str)
    assert is_emptied(path) == (not content.strip(b"\0"))


GOOD = {
    "stage": "sft", "recipe": {}, "sources": {}, "metrics": {}, "environment": {}, "wall": {}, "code": "1",
    "inputs": {"prepare-data": {"sft.jsonl": "cd"}}, "files": {"adapter/a.json": {"bytes": 3, "sha256": "ab"}},
}  # fmt: skip


@fuzzed
@given(change=st.dictionaries(st.sampled_from(sorted(GOOD)), values, min_size=1, max_size=2))
def test_a_manifest_with_other_values(tmp_path, change):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(GOOD | change))
    found = manifest_in(path, "sft")
    assert found is None or all(set(entry) >= {"bytes", "sha256"} for entry in found["files"].values())


@fuzzed
@given(header=values | st.dictionaries(st.text(max_size=5), values, max_size=3), data=st.binary(max_size=64))
def test_a_safetensors_header(tmp_path, header, data):
    path = tmp_path / "a.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    said = refusal(tensors_in, path)
    assert not said or str(path) in said
    path.write_bytes(data)
    assert str(path) in refusal(tensors_in, path)


@fuzzed
@given(content=st.binary(max_size=200))
def test_a_config(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    said = refusal(json_object, path)
    assert not said or said.startswith(str(path))


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 512,
    "intermediate_size": 64, "num_key_value_heads": 4, "tie_word_embeddings": True, "quantization_config": None,
}  # fmt: skip


@fuzzed
@given(change=st.dictionaries(st.sampled_from([*LLAMA, "text_config", "vision_config"]), values, min_size=1),
       family=st.sampled_from(FAMILIES))  # fmt: skip
def test_a_config_with_other_values(tmp_path, change, family):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"model_type": family} | change))
    sizes: list = []
    for read in (
        lambda: sizes.append(shape_of_config(json_object(path), str(path)).parameters),
        lambda: vocabulary_size(tmp_path),
        lambda: refuse_quantized_base(tmp_path, str(path)),
    ):
        said = refusal(read)
        assert not said or str(path) in said
    assert all(type(each) is int and each >= 0 for each in sizes)


yaml_pieces = [
    "configs:", "\n", "  ", "- ", "data_files:", "path: ", "split: train", "config_name: default", "&a ", "*a", "<<: ",
    "{", "}", "[", "]", ",", "!!timestamp ", "!!set ", "? ", ": ", "|", ">", "'", '"', "**/", "*", "../", "%", "\t",
    "9" * 9,
]  # fmt: skip
CARD = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: "


@fuzzed
@given(parts=st.lists(st.sampled_from(yaml_pieces) | st.text(max_size=6), max_size=20), begin=st.booleans())
def test_a_dataset_card(tmp_path, parts, begin):
    (tmp_path / "train.jsonl").write_bytes(hostile_files.good_rows(".jsonl"))
    front = (CARD * begin + "".join(parts)).encode(errors="replace")
    (tmp_path / "README.md").write_bytes(b"---\n" + front + b"\n---\n")
    found: list = []
    said = refusal(lambda: found.extend(files_in(tmp_path, SOURCE)))
    assert said or found == [tmp_path / "train.jsonl"]
    assert not said or str(tmp_path) in said


MODELFILE = 'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "a"\nSYSTEM """two\nlines"""\n'
pieces = ['"""', '"', "FROM ", "PARAMETER ", "TEMPLATE ", "\n", "#", " ", "\x00", "\ufeff", "stop", "'", "\u2028"]


@fuzzed
@given(parts=st.lists(st.sampled_from(pieces) | st.text(max_size=6), max_size=25), begin=st.booleans(),
       end=st.binary(max_size=4))  # fmt: skip
def test_a_modelfile(tmp_path, parts, begin, end):
    path = tmp_path / "Modelfile"
    path.write_bytes((MODELFILE * begin + "".join(parts)).encode(errors="replace") + end)
    said = refusal(modelfile.read, path)
    assert not said or said.startswith(str(path))


tags = [
    "<answer>",
    "</answer>",
    "<reasoning>",
    "</reasoning>",
    "<think>",
    "</think>",
    "\\boxed{",
    "}",
    "\n",
    "####",
    "12",
]


@fuzzed
@given(
    parts=st.lists(st.sampled_from(tags) | st.text(max_size=6), max_size=25), name=st.sampled_from([*formats.FORMATS])
)
def test_an_answer(parts, name):
    text = "".join(parts)
    found = formats.get(name).read(text)
    assert found is None or isinstance(found.answer, str)


@fuzzed
@given(text=st.text(max_size=60) | st.text("0123456789.,-+eE/%$ ()", max_size=60))
def test_a_number(text):
    canonical_number(text)


@pytest.mark.parametrize("value", ["9" * 5000, "1e999999999", "-" * 9999, "1/" * 5000, "\u0661" * 40, "1_000"])
def test_a_number_that_costs_more_than_it_is_worth(value):
    canonical_number(value)
