"""Files that are not what their names say: made of a seed, a good file of each kind and what is done to it."""

import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

from stages.lib.errors import UserError
from stages.lib.recipe.tables import Source

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}"} for n in range(40)]
SOURCE = Source(name="rows", split="train", use=["sft"], question="question", answer="answer", solution="solution")
DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst")
Change = Callable[[bytes, random.Random], bytes]


def refusal(call: Callable[..., object], *given: object) -> str:
    """Call; return the message with which it was refused, "" if it was not. Any other error is the test's failure."""
    try:
        call(*given)
    except UserError as error:
        return error.message
    return ""


def good_rows(suffix: str) -> bytes:
    """Return a good data file with `ROWS`."""
    if suffix == ".json":
        return json.dumps(ROWS).encode()
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        lines = [mark.join(ROWS[0]), *(mark.join(row.values()) for row in ROWS)]
        return ("\n".join(lines) + "\n").encode()
    if suffix == ".parquet":
        return parquet({name: [row[name] for row in ROWS] for name in ROWS[0]})
    lines_of_json = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if suffix.endswith(".gz"):
        return gzip.compress(lines_of_json, mtime=0)
    if suffix.endswith(".zst"):
        import pyarrow

        return pyarrow.compress(lines_of_json, codec="zstd", asbytes=True)
    return lines_of_json


def parquet(columns: dict[str, list], **options: object) -> bytes:
    """Return a Parquet file of columns."""
    import pyarrow
    from pyarrow import parquet as library

    buffer = io.BytesIO()
    library.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()


def parquet_bomb(megabytes: int = 40_000) -> bytes:
    """Return some kilobytes of Parquet whose rows take so many megabytes: one long text, named in each of them."""
    import pyarrow

    text = pyarrow.array(["x" * (1 << 20)])
    indices = pyarrow.array([0] * megabytes, pyarrow.int32())
    long = pyarrow.DictionaryArray.from_arrays(indices, text)
    buffer = io.BytesIO()
    from pyarrow import parquet as library

    table = pyarrow.table({"question": long, "answer": ["1"] * megabytes, "solution": ["1"] * megabytes})
    library.write_table(table, buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()


def zeros_packed(megabytes: int) -> bytes:
    """Return the .gz of so many megabytes of zeros."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        for _ in range(megabytes):
            file.write(bytes(1 << 20))
    return buffer.getvalue()


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Change up to eight bytes."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def spliced(content: bytes, chance: random.Random) -> bytes:
    """Put a piece of the file in another place of it."""
    start, place = chance.randrange(len(content)), chance.randrange(len(content))
    return content[:place] + content[start : start + chance.randint(1, 400)] + content[place:]


def numbered(content: bytes, chance: random.Random) -> bytes:
    """Put an extreme number of 32 or 64 bits somewhere."""
    place = chance.randrange(len(content))
    number = chance.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])
    packed = chance.choice([struct.pack("<I", number), struct.pack("<Q", number << chance.randrange(32))])
    return content[:place] + packed + content[place + len(packed) :]


VALUES = [None, [], {}, "", "x", True, -1, 0, 0.5, 1e308, 10**40, float("inf"), [[]], {"a": None}, "\ud800", "9" * 4400]


def another_value(content: bytes, chance: random.Random) -> bytes:
    """Put a value of another kind somewhere into JSON, or into one of its lines; into other files an extreme number."""
    lines = content.split(b"\n")
    for texts in ([content], lines):
        place = chance.randrange(len(texts))
        try:
            whole = json.loads(texts[place])
        except (ValueError, RecursionError):
            continue
        if isinstance(whole, list | dict) and whole:
            put_somewhere(whole, chance)
            texts[place] = json.dumps(whole).encode()
            return b"\n".join(texts)
    return numbered(content, chance)


def put_somewhere(inside: list | dict, chance: random.Random) -> None:
    """Put one of `VALUES` in the place of a value, the deeper the less likely."""
    key = chance.choice([*inside] if isinstance(inside, dict) else range(len(inside)))
    if isinstance(inside[key], list | dict) and inside[key] and chance.random() < 0.6:
        put_somewhere(inside[key], chance)
    else:
        inside[key] = chance.choice(VALUES)


CHANGES: dict[str, Change] = {
    "another value inside": another_value,
    "cut": lambda content, chance: content[: chance.randrange(len(content))],
    "emptied": lambda content, chance: b"",
    "zeros": lambda content, chance: bytes(len(content)),
    "zeros at the end": lambda content, chance: content[: len(content) // 2] + bytes(len(content) // 2),
    "flipped": flipped,
    "spliced": spliced,
    "numbered": numbered,
    "noise": lambda content, chance: chance.randbytes(chance.randint(1, 5000)),
    "not UTF-8": lambda content, chance: content[:20] + b"\xff\xfe\x80" + content[20:],
    "UTF-16": lambda content, chance: content.decode("latin-1").encode("utf-16"),
    "nested": lambda content, chance: b"[" * 100_000,
    "nested objects": lambda content, chance: b'{"a":' * 100_000,
    "another value": lambda content, chance: chance.choice([b"[]", b"null", b"1", b'"text"', b"{}", b"[[]]", b"NaN"]),
    "one long number": lambda content, chance: b'{"a": ' + b"9" * 10_000 + b"}",
}

# Templates that a model's publisher would have to mean ill by.
BAD_TEMPLATES = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ 'x' * (messages | length * 10000000000) }}",
    "{% set ns = namespace(t='x') %}{% for a in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 10 ** 10 ** 10 }}",
    "(" * 20_000,
    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "{{ messages | string | center(10000000000) }}",
    "{{ '%9999999999d' | format(1) }}",
    "x" * 2_000_000,
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append({}) }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ lipsum(n=100000) }}",
]


def write_data(folder: Path, suffix: str, change: str, seed: int) -> Path:
    """Write a broken data file; return it."""
    chance = random.Random(f"{suffix} {change} {seed}")
    path = folder / f"rows{suffix}"
    path.write_bytes(CHANGES[change](good_rows(suffix), chance))
    return path
