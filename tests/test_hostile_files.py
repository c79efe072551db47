"""Files that are not what they say: each is one message, in bounded time and memory."""

import gzip
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.lib.bounded import TooMuch, call_bounded
from stages.lib.data import opened
from stages.lib.data.files import read_batches
from stages.lib.data.place import files_in
from stages.lib.ends import end_ids
from stages.lib.errors import UserError
from stages.lib.machine.shape import shape_of_config
from stages.lib.model.files import model_config, refuse_quantized_base, vocabulary_size, weight_files
from stages.lib.model.fold import savable
from stages.lib.model.headers import json_object, tensors_in
from stages.lib.model.locate import local_model
from stages.lib.model.rehearsal import refuse_generation
from stages.lib.model.template import longest_rendering, try_template
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Source
from tests.support import hostile_files, recipes
from tests.support.hostile_files import SOURCE, refusal

ROOT = Path(__file__).parents[1]


def read(path: Path, source: Source = SOURCE) -> int:
    """Read a data file whole; return the number of its rows."""
    return sum(len(piece.parsed().numbers) for piece in read_batches(source, [path]))


@pytest.mark.parametrize("suffix", hostile_files.DATA)
def test_the_good_file_of_each_kind_has_all_rows(tmp_path, suffix):
    (path := tmp_path / f"rows{suffix}").write_bytes(hostile_files.good_rows(suffix))
    assert read(path) == 40


@pytest.mark.parametrize("change", hostile_files.CHANGES)
@pytest.mark.parametrize("suffix", [each for each in hostile_files.DATA if each != ".parquet"])
def test_a_broken_data_file_is_read_or_refused_by_name(tmp_path, suffix, change):
    for seed in range(4):
        path = hostile_files.write_data(tmp_path, suffix, change, seed)
        said = refusal(read, path)
        assert not said or (str(path) in said and len(said) < 1000), said


@pytest.mark.slow
@pytest.mark.parametrize("change", hostile_files.CHANGES)
def test_a_broken_parquet_file_is_read_or_refused_by_name(tmp_path, change):
    for seed in range(3):
        path = hostile_files.write_data(tmp_path, ".parquet", change, seed)
        said = refusal(read, path)
        assert not said or str(path) in said, said


# In a process of its own: the most memory of all children that a process ever had is one figure. Its own is the
# kernel's VmHWM: ru_maxrss holds also what the process that started it had.
READ = """
import re, resource, sys
from pathlib import Path
from stages.lib.errors import UserError
from tests.test_hostile_files import read
try:
    read(Path(sys.argv[1]))
except UserError as error:
    print(error.message)
own = re.search(r"^VmHWM:\\s*(\\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1]
spent, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(sum(each.ru_utime + each.ru_stime for each in (spent, children)), own, children.ru_maxrss)
"""


@pytest.mark.slow
def test_a_parquet_file_that_unpacks_to_forty_gigabytes_is_refused_in_bounded_time_and_memory(tmp_path):
    path = tmp_path / "bomb.parquet"
    path.write_bytes(hostile_files.parquet_bomb())
    assert path.stat().st_size == 838
    done = subprocess.run([sys.executable, "-c", READ, path], cwd=ROOT, capture_output=True, text=True, check=True)
    said, seconds, own, children = done.stdout.rsplit(maxsplit=3)
    assert "bomb.parquet: 838 bytes of Parquet that take more than 800 MB of memory to read" in said
    assert float(seconds) < 20  # of processor time, as other work of the machine is no fault of the reader
    assert int(own) < 600_000  # KB
    assert int(children) < 1_000_000


def test_rows_of_parquet_are_the_same_in_both_readings(tmp_path):
    (path := tmp_path / "rows.parquet").write_bytes(hostile_files.good_rows(".parquet"))
    (batch,) = read_batches(SOURCE, [path])
    assert batch.columns["answer"] == [str(n + 1) for n in range(40)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zeros.jsonl.gz", hostile_files.zeros_packed(300), r"a line of more than 67,108,864 bytes"),
        ("blank.jsonl.gz", gzip.compress(b"\n" * (300 << 20), 1), r"bytes that unpack to more than 268,435,456"),
        ("zeros.csv.gz", hostile_files.zeros_packed(100), r"a line of more than 67,108,864 bytes"),
        ("zeros.json.gz", hostile_files.zeros_packed(100), r"a line of more than 67,108,864 bytes"),
    ],
)
def test_a_packed_bomb_is_refused_before_it_fills_the_memory(tmp_path, name, content, message):
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_file_without_line_breaks_is_no_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "MAX_LINE_BYTES", 1 << 21)
    (path := tmp_path / "rows.jsonl").write_bytes(b'{"question": "' + b"x" * (4 << 20))
    with pytest.raises(UserError, match=r"rows.jsonl: a line of more than 2,097,152 bytes; expected a row a line"):
        read(path)


@pytest.mark.parametrize(
    "front",
    ["[" * 20_000, "a: 2024-13-45", "a: &a [*a]", "configs: 7", "configs: [{data_files: [{path: [], split: a}]}]"],
)
def test_a_dataset_card_that_is_not_yaml_or_says_nonsense_is_no_traceback(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    (tmp_path / "train.jsonl").write_bytes(hostile_files.good_rows(".jsonl"))
    said = refusal(files_in, tmp_path, SOURCE)
    assert not said or "README.md: its first lines are not YAML" in said


MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "front",
    [MERGED, "a: !!timestamp x", "a: " + "9" * 5000, "a: !!python/object:os.system x", "? {a: b}\n: c", "a: !!int x"],
    ids=lambda text: text[:20],
)
def test_a_dataset_card_holds_texts_lists_and_tables_and_takes_no_time(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    (tmp_path / "train.jsonl").write_bytes(hostile_files.good_rows(".jsonl"))
    start = time.process_time()
    said = refusal(files_in, tmp_path, SOURCE)
    assert not said or "README.md: its first lines are not YAML" in said
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "pattern", ["**x/a", "*" * 40 + "a", "x" * 5000, "[!", "a\0b", "/".join(["**"] * 30) + "/*", "../*", "/*", ".", ""]
)
def test_a_pattern_of_a_dataset_card_that_names_no_file_here_is_refused(tmp_path, pattern):
    (tmp_path / "/".join("a" * 24)).mkdir(parents=True)
    (tmp_path / "train.jsonl").write_bytes(hostile_files.good_rows(".jsonl"))
    front = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n")
    assert "for the split 'train'; there is no such file" in refusal(files_in, tmp_path, SOURCE)


# ---- a model's files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"vocab_size": ', r"config.json: is not JSON \(Expecting value"),
        (b"[1, 2]", r"config.json: holds a JSON list; expected an object"),
        (b'{"a": "\xff"}', r"config.json: is not UTF-8 \(byte 7\); expected a JSON object"),
        (b"", r"config.json: is not JSON"),
        (b"[" * 100_000, r"config.json: is not JSON \(maximum recursion"),
        (b'{"a": ' + b"9" * 9999 + b"}", r"config.json: is not JSON \(Exceeds the limit"),
    ],
)
def test_a_config_that_is_no_json_object_is_named_with_what_it_is(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        model_config(tmp_path)


def test_a_config_of_many_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"config.json: has 1,099,511,627,776 bytes; expected JSON of at most"):
        json_object(tmp_path / "config.json")


@pytest.mark.parametrize("value", ["x", [], 7, True])
def test_a_quantization_that_is_no_object_is_named(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": value}))
    with pytest.raises(UserError, match=r"config.json: quantization_config is '.*'; expected an object"):
        refuse_quantized_base(tmp_path, "a model")


GENERATION = {"bos_token_id": 2, "do_sample": False, "eos_token_id": [5, 1], "pad_token_id": 0}


@pytest.mark.slow
@pytest.mark.parametrize("value", hostile_files.VALUES, ids=lambda value: ascii(value)[:20])
def test_a_generation_config_that_passes_before_training_is_read_and_written_after_it(tmp_path, value):
    from transformers import GenerationConfig

    for name in (*GENERATION, "temperature", "top_k", "cache_implementation", "watermarking_config", "bad_words_ids"):
        (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION | {name: value}))
        said = refusal(refuse_generation, tmp_path, "a model")
        if said:
            assert "generation_config.json" in said
            assert value is not None
        else:
            read = GenerationConfig.from_pretrained(tmp_path)
            assert all(type(end) is int for end in end_ids(read))
            savable(read).save_pretrained(tmp_path / "written")
            assert (tmp_path / "written" / "generation_config.json").is_file()


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "merges.txt"])
def test_what_is_read_whole_is_not_read_when_it_is_too_large(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    recipe = read_recipe(recipes.write_tables(tmp_path / "mine.toml", of_folder(tmp_path)))
    with pytest.raises(UserError, match=rf"{name}: has 1,099,511,627,776 bytes; expected at most 134,217,728"):
        local_model(recipe)


COLUMNS = {"question": "question", "answer": "answer", "solution": "solution"}


def of_folder(folder: Path) -> dict:
    """Return the tables of a recipe for a model's folder."""
    tables = recipes.read_tables()
    del tables["base_model"]
    tables["model"] |= {"name": str(folder)}
    tables["data"]["sources"] = [
        {"name": "a.jsonl", "split": "train", "use": ["sft", "grpo", "eval"], "shares": [0.4, 0.4, 0.2], **COLUMNS}
    ]
    return tables


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 512,
    "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0.5, 1e308, 10**40, float("nan")], ids=str)
@pytest.mark.parametrize("name", LLAMA)
def test_a_size_that_is_none_is_refused_or_left_out(name, value):
    found = []
    said = refusal(lambda: found.append(shape_of_config(LLAMA | {name: value}, "config.json")))
    assert said.startswith("config.json: ") != bool(found)
    if found:
        assert value is None  # as in a file that leaves it out
        assert 0 < found[0].linear_parameters < found[0].parameters < 1_000_000


@pytest.mark.parametrize("value", [None, "512", [], {"vocab_size": True}, {"text_config": []}, {"vocab_size": 1.5}])
def test_a_vocabulary_without_a_size_is_named(tmp_path, value):
    config = value if isinstance(value, dict) else {"vocab_size": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: vocab_size is .*; expected a number"):
        vocabulary_size(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../b"}}]
)
def test_an_index_of_shards_names_files_beside_it(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json: weight_map is not names of files beside it, by tensor"):
        weight_files(tmp_path)


def safetensors(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin: object, end: object, dtype: object = "F32", shape: object = (4,)) -> dict:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not JSON", r"is not JSON"),
        (b"[]", r"holds a JSON list; expected an object"),
        (b'{"a": ' * 60_000, r"is not JSON \(maximum recursion"),
        ({"a": tensor(0, 32, shape=(8,))}, r"is cut short: \d+ bytes of \d+"),
        ({"a": tensor(0, 8, shape=(2,))}, r"has \d+ bytes; its header states \d+"),
        ({"a": tensor(0, 16, shape=(5,))}, r"gives 'a', F32 \[5\], the bytes 0 to 16; expected 20 of them"),
        ({"a": tensor(0, 16), "b": tensor(0, 16)}, r"its tensors overlap or leave a gap at byte 16"),
        ({"a": tensor(4, 16, shape=(3,))}, r"its tensors overlap or leave a gap at byte 0"),
        ({"a": tensor(16, 0)}, r"gives 'a', F32 \[4\], the bytes 16 to 0; expected 16 of them"),
        ({"a": tensor(-1, 15)}, r"does not state what 'a' is"),
        ({"a": tensor(0, 1 << 70)}, r"does not state what 'a' is"),
        ({"a": tensor(0, 16, shape=(-4,))}, r"does not state what 'a' is"),
        ({"a": tensor(0, 16, shape=(1 << 62, 1 << 62))}, r"gives 'a'"),
        ({"a": tensor(0, 16, shape="4")}, r"does not state what 'a' is"),
        ({"a": tensor(0, True)}, r"does not state what 'a' is"),
        ({"a": tensor(0, 16, dtype=7)}, r"does not state what 'a' is"),
        ({"a": 7}, r"does not state what 'a' is: 7"),
        ({"a": {"dtype": "F32", "shape": [4]}}, r"does not state what 'a' is"),
    ],
)
def test_a_safetensors_header_that_does_not_fit_its_file_is_refused(tmp_path, header, message):
    with pytest.raises(UserError, match=rf"model.safetensors: (its header )?{message}"):
        tensors_in(safetensors(tmp_path / "model.safetensors", header))


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "is cut short"),
        (50, "is cut short"),
        (1 << 63, "would have 9,223,372,036,854,775,808"),
        (100_000_001, "would"),
    ],
)
def test_a_header_longer_than_any_is_not_read(tmp_path, length, message):
    with pytest.raises(UserError, match=message):
        tensors_in(safetensors(tmp_path / "a.safetensors", b"{}", b"", length))
    (tmp_path / "a.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(UserError, match="is cut short"):
        tensors_in(tmp_path / "a.safetensors")


def test_what_a_whole_header_states_is_returned_also_of_a_dtype_that_is_not_known(tmp_path):
    header = {"b": tensor(16, 24, "F8_NEW", (5,)), "a": tensor(0, 16), "__metadata__": {"format": "pt"}}
    found = tensors_in(safetensors(tmp_path / "a.safetensors", header, bytes(24)))
    assert found == {"a": ("F32", [4]), "b": ("F8_NEW", [5])}


@given(seed=st.integers(0, 10**9), change=st.sampled_from(sorted(hostile_files.CHANGES)))
@settings(max_examples=200, deadline=None)
def test_any_change_of_a_safetensors_file_is_read_or_refused(tmp_path_factory, seed, change):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    good = safetensors(path, {"a": tensor(0, 16), "b": tensor(16, 24, "F16", (2, 2))}, bytes(24)).read_bytes()
    path.write_bytes(hostile_files.CHANGES[change](good, random.Random(seed)))
    said = refusal(tensors_in, path)
    assert not said or str(path) in said
    shutil.rmtree(path.parent)


# ---- chat templates -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("template", hostile_files.BAD_TEMPLATES, ids=lambda text: text[:40])
def test_a_template_that_loops_or_makes_gigabytes_is_refused_and_another_ends_in_time(template):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = refusal(try_template, template, {"bos_token": "<s>"})
    assert not said or said.startswith("the chat template ")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "takes more than 2 s of processor time to render"),
        (1, "makes more than 1,048,576 characters"),
        (2, "takes more than 500 MB of memory"),
        (4, "takes more than 500 MB of memory"),
        (8, "is nested too deeply to be read"),
        (11, "has 2,000,000 characters; expected at most 1,048,576"),
    ],
)
@pytest.mark.slow
def test_what_a_template_takes_too_much_of_is_said(number, message):
    with pytest.raises(UserError, match=f"the chat template {message}"):
        try_template(hostile_files.BAD_TEMPLATES[number], {})


def test_a_template_of_a_kind_that_is_published_passes_and_its_longest_rendering_is_known():
    template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    try_template(template, {"eos_token": "</s>"})
    # a system prompt, three questions and three answers: seven contents of one character, each after its role
    assert longest_rendering(template, {}) == 7 + len("<system>" + 3 * "<user>" + 3 * "<assistant>")


# ---- processes ----------------------------------------------------------------------------------------------------

POOL = """
import os, signal
from stages.lib.bounded import process_pool
pool = process_pool(2)
print(*{pool.submit(os.getpid).result() for _ in range(8)}, flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's end is Linux's")
@pytest.mark.slow
def test_a_process_of_a_pool_ends_with_the_one_that_started_it_also_by_kill():
    with subprocess.Popen([sys.executable, "-c", POOL], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        numbers = [int(number) for number in owner.stdout.readline().split()]
        assert numbers
        assert all(Path(f"/proc/{number}").exists() for number in numbers)
        owner.kill()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        assert time.monotonic() < until
        time.sleep(0.05)


CONVERTER = """
import os, sys, time
print(os.path.basename(sys.argv[0]), sys.argv[1:], os.path.basename(sys.path[0]), __name__, file=open("said", "w"))
print(os.getpid(), file=open("number.new", "w"), flush=True)
os.rename("number.new", "number")
time.sleep(60)
"""
OWNER = """
import sys
from pathlib import Path
from stages.lib.gguf import convert
convert.HOME = Path(sys.argv[1])
convert.run_converter(["a b", "--c"], "slow.py")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's end is Linux's")
@pytest.mark.slow
def test_llama_cpps_converter_ends_with_the_stage_that_runs_it_also_by_kill(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "slow.py").write_text(CONVERTER)
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", OWNER, str(home)], cwd=tmp_path, env=variables) as owner:
        until = time.monotonic() + 30
        while not (tmp_path / "number").is_file():
            assert owner.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        owner.kill()
    number = (tmp_path / "number").read_text().strip()
    until = time.monotonic() + 10
    while Path(f"/proc/{number}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert (tmp_path / "said").read_text() == "slow.py ['a b', '--c'] home __main__\n"


# ---- the process with bounds --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bounded_call_returns_what_the_function_returns_and_raises_what_it_raises():
    assert call_bounded(longest_rendering, "ab", {}, seconds=5, megabytes=200) == 2
    with pytest.raises(UserError, match="more than 1,048,576 characters"):
        call_bounded(longest_rendering, "{{ 'x' * 2000000 }}", {}, seconds=5, megabytes=200)
    with pytest.raises(RuntimeError, match=r"(?s)longest_rendering ended with 1:\n.*TypeError"):
        call_bounded(longest_rendering, 7, {}, seconds=5, megabytes=200)
    with pytest.raises(TooMuch, match="more than 1 s of processor time"):
        call_bounded(longest_rendering, hostile_files.BAD_TEMPLATES[0], {}, seconds=1, megabytes=200)
