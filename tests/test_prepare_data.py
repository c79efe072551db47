"""The three sets hold what the sources have, less what must not be in them, and a bad row never goes unnoticed."""

import json
import multiprocessing
import os
import re
import shutil
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stages import prepare_data
from stages.lib.answers import formats
from stages.lib.answers.grade import canonical
from stages.lib.data.files import read_batches
from stages.lib.data.fingerprint import BAND_ROWS, BANDS
from stages.lib.data.problem import completion_of, problem_of
from stages.lib.data.rows import most_tokens
from stages.lib.data.sets import helpers
from stages.lib.data.shapes import Unusable
from stages.lib.errors import UserError
from stages.lib.model.files import refuse_quantized_base
from stages.lib.recipe.read import build_table, read_recipe
from stages.lib.recipe.tables import Source
from stages.lib.report.figures import PrepareDataFigures, figures_of
from tests.support import micro
from tests.support.recipes import read_tables, write_tables

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "support"
REVISION = "0123456789abcdef0123456789abcdef01234567"
GSM8K = {"name": "openai/gsm8k", "revision": REVISION, "config": "main", "style": "gsm8k"}
COLUMNS = {"question": "question", "answer": "answer"}
WORKED = {**COLUMNS, "solution": "solution"}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokenizers of these tests are no real ones, so llama.cpp is not asked; the list says for which it is."""
    asked: list[str] = []
    monkeypatch.setattr(prepare_data, "rehearse_beside", lambda *_: {"base": 1.0, "adapter": 0.0, "gguf": 0.0})
    monkeypatch.setattr(prepare_data, "check_tokenizer", lambda recipe, *rest: asked.append(recipe.model.name))
    return asked


def write_recipe(folder: Path, sources: list[dict[str, Any]], **knobs: Any) -> Path:
    """Write the tiny recipe with other sources; `knobs` are keys of [data], or whole tables' changes by table name."""
    tables = read_tables()
    tables.pop("base_model")
    tables["data"] = {
        "max_prompt_tokens": 500, "ngram_words": 5, "near_duplicate_jaccard": 0.8, "contamination_overlap": 0.6,
    }  # fmt: skip
    tables["model"] |= {"name": str(folder / "model"), "revision": ""}
    tables["format"] = {"name": "xml"}
    tables["sft"]["max_tokens"] = 5000
    tables["merge"]["prompts"] = tables["gguf"]["prompts"] = 1
    tables["grpo"] |= {"prompts_per_step": 1, "micro_batch_size": 8}
    for name, value in knobs.items():
        if isinstance(value, dict):
            tables[name] |= value
        else:
            tables["data"][name] = value
    tables["data"]["sources"] = [{**COLUMNS, **source} for source in sources]
    return write_tables(folder / "recipe.toml", tables)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Letters:
    """A ruler that counts letters, so that a test can say how long a prompt is."""

    system_prompt = "Be brief."

    def tokens(self, conversations: list[tuple[str, ...]]) -> list[int]:
        return [sum(map(len, texts)) for texts in conversations]


def prepare(folder: Path, sources: list[dict[str, Any]], located: list[list[Path]] | None = None, **knobs: Any) -> dict:
    """Run the stage's work without a tokenizer; return its metrics."""
    recipe = read_recipe(write_recipe(folder, sources, **knobs))
    out = folder / "out"
    out.mkdir()
    located = located or [[Path(source["name"])] for source in sources]
    with helpers(located) as pool:
        return prepare_data.prepare(recipe, located, Letters(), out, pool)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_bytes().splitlines()]


def numbered(start: int, stop: int) -> list[dict[str, Any]]:
    """Rows no two of which are alike."""
    return [
        {"question": f"Number {i}, {i * 7919} and {i * i + 1}?", "answer": i, "solution": f"It is {i}."}
        for i in range(start, stop)
    ]


def three_sets(
    folder: Path,
    train: list[dict[str, Any]],
    evaluation: list[dict[str, Any]] | None = None,
    stated: dict[str, Any] | None = None,
    **knobs: Any,
) -> dict:
    evaluation = numbered(9000, 9003) if evaluation is None else evaluation
    return prepare(
        folder,
        [
            {"name": write_rows(folder / "train.jsonl", train), "use": ["sft", "grpo"], **WORKED, **(stated or {})},
            {"name": write_rows(folder / "eval.jsonl", evaluation), "use": ["eval"]},
        ],
        **knobs,
    )


# What a row becomes


def test_a_row_becomes_a_conversation_in_each_of_its_sets(tmp_path: Path) -> None:
    three_sets(
        tmp_path, [{"question": " How much is\n3 \u2212 5? ", "answer": "$\u22122.0", "solution": " 3 - 5 = -2 "}]
    )
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How much is\n3 \u2212 5?"}]
    (example,) = rows_of(tmp_path, "sft")
    written = "<reasoning>\n3 - 5 = -2\n</reasoning>\n<answer>\n$\u22122.0\n</answer>"
    assert list(example) == ["id", "prompt", "answer", "kind", "completion"]
    assert example == {
        "id": example["id"],
        "prompt": prompt,
        "answer": "$\u22122.0",
        "kind": "number",
        "completion": [{"role": "assistant", "content": written}],
    }
    row = {"id": example["id"], "prompt": prompt, "answer": "$\u22122.0", "kind": "number"}
    assert rows_of(tmp_path, "grpo") == [row]
    assert len(example["id"]) == 16


@pytest.mark.parametrize(
    "question",
    ['"quoted" \\ {"a": 1}', "tab\t and \x01 control", "\u2028 line separator", "\U0001f600", "{{ x }} {% y %} %s {0}"],
)
def test_any_text_survives_the_way_into_a_set(tmp_path: Path, question: str) -> None:
    three_sets(tmp_path, [{"question": f"Q: {question}.", "answer": 1, "solution": f"S: {question}."}])
    (example,) = rows_of(tmp_path, "sft")
    assert example["prompt"][1]["content"] == f"Q: {question}."
    assert f"S: {question}." in example["completion"][0]["content"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" 1,200\n", "1,200"),
        ("$19.25", "$19.25"),
        (18.0, "18.0"),
        (-3, "-3"),
        ("\u22124", "\u22124"),
        ("It is 7 dollars.", "It is 7 dollars."),
        (100 / 3, "33.333333333333336"),
        (1e20, "1e+20"),
        (r"\boxed{4}", r"\boxed{4}"),
        (["7"], "7"),
    ],
)
def test_an_answer_is_taught_and_kept_as_the_dataset_writes_it(tmp_path: Path, answer: object, expected: str) -> None:
    three_sets(tmp_path, [{"question": "q", "answer": answer, "solution": "s"}])
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == [expected]
    (example,) = rows_of(tmp_path, "sft")
    assert example["completion"][0]["content"].endswith(f"<answer>\n{expected}\n</answer>")


@pytest.mark.parametrize(
    ("stated", "answer", "kept", "taught", "kind"),
    [
        ({"answers": "text"}, "Yes", "Yes", "Yes", "text"),
        ({"answers": "text"}, True, "True", "True", "text"),
        ({"answers": "text"}, ["UK", "Britain"], '["UK", "Britain"]', "UK", "text"),
        ({"answers": "text"}, 'a "quoted" \\ one', 'a "quoted" \\ one', 'a "quoted" \\ one', "text"),
        ({"answers": "choice"}, "(B)", "(B)", "(B)", "choice"),
        ({"answers": "math"}, r"2\sqrt{2}", r"2\sqrt{2}", r"2\sqrt{2}", "math"),
        ({"decimal": ","}, "1.234", "1.234", "1.234", "number decimal=,"),
        ({"tolerance": 0.001}, 0.1 + 0.2, "0.30000000000000004", "0.30000000000000004", "number tolerance=0.001"),
    ],
)
def test_a_row_has_the_kind_that_its_source_states(tmp_path: Path, stated, answer, kept, taught, kind) -> None:
    three_sets(tmp_path, [{"question": "q", "answer": answer, "solution": "s"}], stated=stated)
    (row,) = rows_of(tmp_path, "grpo")
    assert (row["answer"], row["kind"]) == (kept, kind)
    assert rows_of(tmp_path, "sft")[0]["completion"][0]["content"].endswith(f"<answer>\n{taught}\n</answer>")


def test_gsm8k_solutions_lose_their_calculator_marks_and_their_last_line(tmp_path: Path) -> None:
    located = [[DATA / "gsm8k" / "train.jsonl"], [DATA / "gsm8k" / "test.jsonl"]]
    metrics = prepare(tmp_path, gsm8k_sources(), located)
    assert [made["rows"] for made in metrics["sources"]] == [8, 3]
    examples = rows_of(tmp_path, "sft")
    assert [row["answer"] for row in examples] == ["1,200", "-5", "5.50", "18", "21", "69", "23", "35"]
    assert examples[0]["completion"][0]["content"] == (
        "<reasoning>\nEach tray holds 24 rolls.\n24 * 50 = 1,200 rolls.\n</reasoning>\n<answer>\n1,200\n</answer>"
    )
    assert [row["answer"] for row in rows_of(tmp_path, "eval")] == ["700", "32,550", "4"]


def gsm8k_folders() -> list[Path]:
    """The committed sample, and the real files where they lie."""
    real = Path(os.environ.get("GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))
    return [DATA / "gsm8k", *([real] if real.is_dir() else [])]


@pytest.mark.parametrize("folder", gsm8k_folders(), ids=lambda folder: folder.parent.name)
def test_every_answer_of_gsm8k_is_read(folder: Path) -> None:
    for path in (folder / "train.jsonl", folder / "test.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            _, answer, worked = problem_of(row["question"], row["answer"], None, "gsm8k")
            assert answer == row["answer"].rpartition("####")[2].strip()
            assert Fraction(canonical("number", answer)) == Fraction(answer.replace(",", ""))
            written = completion_of(worked, answer, "gsm8k", formats.get("xml"))
            assert "<<" not in written
            assert "####" not in written


def test_dapo_is_read_by_its_published_columns(tmp_path: Path) -> None:
    source = {
        "name": "open-r1/DAPO-Math-17k-Processed",
        "revision": REVISION,
        "config": "en",
        "question": "prompt",
        "answer": "solution",
        "use": ["grpo"],
    }
    others = {
        "name": write_rows(tmp_path / "more.jsonl", numbered(0, 40)),
        "use": ["sft", "eval"],
        "shares": [0.5, 0.5],
        **WORKED,
    }
    prepare(
        tmp_path, [source, others], [[DATA / "dapo" / "en" / "train-00000-of-00001.parquet"], [tmp_path / "more.jsonl"]]
    )
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == ["24", "-4", "72", "144", "43"]


def test_openmath_gives_sft_its_thoughts_and_drops_what_is_not_a_number(tmp_path: Path) -> None:
    source = {
        "name": "unsloth/OpenMathReasoning-mini", "revision": REVISION, "split": "cot", "style": "think",
        "use": ["sft"], "question": "problem", "answer": "expected_answer", "solution": "generated_solution",
        "unreadable": "drop",
    }  # fmt: skip
    others = {
        "name": write_rows(tmp_path / "more.jsonl", numbered(0, 40)),
        "use": ["grpo", "eval"],
        "shares": [0.5, 0.5],
    }
    metrics = prepare(
        tmp_path,
        [source, others],
        [[DATA / "openmath" / "data" / "cot-00000-of-00001.parquet"], [tmp_path / "more.jsonl"]],
        format={"name": "think"},
        rewards={"functions": ["check_answer"], "weights": [1.0]},
    )
    assert metrics["sources"][0]["dropped"] == {"unreadable answer": 2}
    assert [row["answer"] for row in rows_of(tmp_path, "sft")] == ["17", r"\frac{1}{3}", "2"]
    assert rows_of(tmp_path, "sft")[0]["completion"][0]["content"] == (
        "The root of 144 is 12 and the root of 25 is 5.\nTogether that is 17.\n\n\n"
        "The roots are 12 and 5, so the sum is \\(\\boxed{17}\\).</think><SOLUTION>17</SOLUTION>"
    )
    listed = [line for line in rows_of(tmp_path, "removed") if line["set"] is None]
    assert [line["where"] for line in listed] == [
        f"unsloth/OpenMathReasoning-mini (cot) cot-00000-of-00001.parquet:{n}" for n in (2, 5)
    ]


# What is refused, or dropped

GOOD = {"question": "q", "answer": "1", "solution": "s"}
UNUSABLE = {
    "no question": [{**GOOD, "question": " "}, {"answer": "1"}, {**GOOD, "question": 5}],
    "no answer": [
        {"question": "q", "solution": "s"},
        *({**GOOD, "answer": found} for found in (None, "  ", True, [], [None], {})),
    ],
    "unreadable answer": [{**GOOD, "answer": found} for found in ("42 or 43", "x", float("nan"), "3,5")],
    "no solution": [{"question": "q", "answer": "1"}, {**GOOD, "solution": ""}, {**GOOD, "solution": 5}],
    "unusable solution": [{**GOOD, "solution": "see <answer>"}],
    "not Unicode": [{**GOOD, "question": "half \ud83d"}, {**GOOD, "solution": "\udc00"}],
}
CASES = [(reason, row) for reason, rows in UNUSABLE.items() for row in rows]


@pytest.mark.parametrize(("reason", "row"), CASES)
def test_an_unusable_row_is_refused_by_file_and_line(tmp_path: Path, reason: str, row: dict) -> None:
    with pytest.raises(UserError) as raised:
        three_sets(tmp_path, [*numbered(0, 3), row, *numbered(3, 5)])
    assert f"train.jsonl, line 4: {reason}" in raised.value.message
    assert 'set unreadable = "drop"' in raised.value.message


@pytest.mark.parametrize(("reason", "row"), CASES)
def test_an_unusable_row_is_dropped_and_counted_when_the_recipe_says_so(tmp_path: Path, reason: str, row: dict) -> None:
    name = write_rows(tmp_path / "train.jsonl", [*numbered(0, 3), row, *numbered(3, 5)])
    evaluated = write_rows(tmp_path / "eval.jsonl", numbered(9000, 9003))
    metrics = prepare(
        tmp_path,
        [
            {"name": name, "use": ["sft"], "unreadable": "drop", **WORKED},
            {"name": evaluated, "use": ["grpo", "eval"], "shares": [0.5, 0.5]},
        ],
    )
    only_sft = reason in ("no solution", "unusable solution")
    assert metrics["sources"][0]["dropped"] == ({} if only_sft else {reason: 1})
    assert metrics["sets"]["sft"]["dropped"] == ({reason: 1} if only_sft else {})
    assert len(rows_of(tmp_path, "sft")) == 5
    (line,) = rows_of(tmp_path, "removed")
    assert (line["reason"], line["where"], line["set"]) == (
        reason,
        f"{name} (train) train.jsonl:4",
        "sft" if only_sft else None,
    )


def test_a_row_without_a_solution_still_goes_to_grpo(tmp_path: Path) -> None:
    rows = [*numbered(0, 2), {"question": "q", "answer": "1", "solution": ""}]
    prepare(
        tmp_path,
        [
            {"name": write_rows(tmp_path / "a.jsonl", rows), "use": ["sft", "grpo"], "unreadable": "drop", **WORKED},
            {"name": write_rows(tmp_path / "b.jsonl", numbered(9000, 9002)), "use": ["eval"]},
        ],
    )
    assert (len(rows_of(tmp_path, "sft")), len(rows_of(tmp_path, "grpo"))) == (2, 3)


def test_a_truncated_thought_is_not_learnt(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="truncated"):
        completion_of("<think>\nlet me see", "1", "think", formats.get("think"))


def test_a_gsm8k_answer_without_its_mark_is_refused() -> None:
    with pytest.raises(Unusable, match="no '####'"):
        problem_of("q", "so it is 5", None, "gsm8k")


# Duplicates and contamination


def test_two_answers_to_one_question_are_counted_and_listed(tmp_path: Path) -> None:
    rows = [
        *({"question": "How much is it?", "answer": answer, "solution": "s"} for answer in ("0.5", "1/2", "2")),
        *numbered(0, 2),
    ]
    metrics = three_sets(tmp_path, rows)
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == ["0.5", "0", "1"]
    dropped = {"exact duplicate": 1, "exact duplicate, other answer": 1}
    assert metrics["sets"]["sft"]["dropped"] == metrics["sets"]["grpo"]["dropped"] == dropped
    listed = [row for row in rows_of(tmp_path, "removed") if row["reason"] == "exact duplicate, other answer"]
    assert [(row["set"], row["where"][-1], row["like_where"][-1]) for row in listed] == [
        ("sft", "3", "1"),
        ("grpo", "3", "1"),
    ]


def answered(*answers: object) -> list[dict[str, Any]]:
    return [{**row, "answer": answer} for row, answer in zip(numbered(0, len(answers)), answers, strict=True)]


def test_what_reads_two_ways_beside_decimal_commas_is_refused_until_the_source_states_its_separators(tmp_path) -> None:
    rows = answered("1.234", "12,500", "3,5", "1.234,56", "7")
    with pytest.raises(UserError) as refused:
        three_sets(tmp_path, rows, stated={"unreadable": "drop"})
    message = str(refused.value)
    assert re.search(r"train.jsonl, line 1: '1.234' reads two ways, since .* decimals follow a comma", message)
    assert re.search(r"line 3: '3,5'\)\. State decimal = \",\" for .*train.jsonl in the recipe, or \"\.\"", message)


@pytest.mark.parametrize(
    ("decimal", "kept"), [(",", ["1.234", "12,500", "3,5", "1.234,56", "7"]), (".", ["1.234", "12,500", "7"])]
)
def test_a_source_that_states_its_separators_is_read_by_them(tmp_path: Path, decimal: str, kept: list[str]) -> None:
    rows = answered("1.234", "12,500", "3,5", "1.234,56", "7")
    three_sets(tmp_path, rows, stated={"unreadable": "drop", "decimal": decimal})
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == kept


@pytest.mark.parametrize("answers", [("1.234", "12.5", "7"), ("1,234", "0.125", "3.5"), (1.234, "3,500", "2")])
def test_one_sort_of_separators_is_read_without_a_word(tmp_path: Path, answers: tuple[object, ...]) -> None:
    three_sets(tmp_path, answered(*answers))
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == list(map(str, answers))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("3,5", r"line 1: unreadable answer: '3,5' has a decimal comma: state decimal = \",\"\. Fix the row, or set"),
        (
            "red",
            r"unreadable answer: can't be read as one number: 'red' \(no numbers\? State answers = \"math\", \"text\"",
        ),
        ("3 PM", r"unreadable answer: can't be read as one number: '3 PM'"),
    ],
)
def test_an_answer_of_another_kind_is_refused_with_what_to_state(tmp_path: Path, answer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        three_sets(tmp_path, answered(answer))


def test_exact_duplicates_go_within_a_set_and_the_first_stays(tmp_path: Path) -> None:
    rows = [*numbered(0, 3), {**numbered(1, 2)[0], "question": "NUMBER 1 ,  7919 and 2 ?"}]
    metrics = three_sets(tmp_path, rows)
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == ["0", "1", "2"]
    assert metrics["sets"]["sft"]["dropped"] == metrics["sets"]["grpo"]["dropped"] == {"exact duplicate": 1}
    first, second = rows_of(tmp_path, "removed")
    where = f"{tmp_path}/train.jsonl (train) train.jsonl:"
    assert first == {
        "id": rows_of(tmp_path, "sft")[1]["id"], "set": "sft", "reason": "exact duplicate", "where": where + "4",
        "like": rows_of(tmp_path, "sft")[1]["id"], "like_where": where + "2", "likeness": 1.0,
    }  # fmt: skip
    assert second == {**first, "set": "grpo"}


LONG = (
    "A gardener plants 12 rows of 30 tulips each and the deer eat every third one. "
    "How many tulips are left in the garden at the end?"
)


@pytest.mark.parametrize(("threshold", "left"), [(0.5, 1), (0.95, 2), (1.0, 2)])
def test_near_duplicates_go_by_the_threshold_of_the_recipe(tmp_path: Path, threshold: float, left: int) -> None:
    rows = [{"question": text, "answer": 240, "solution": "s"} for text in (LONG, LONG.replace("gardener", "woman"))]
    three_sets(tmp_path, rows, near_duplicate_jaccard=threshold)
    assert len(rows_of(tmp_path, "grpo")) == left


def test_the_same_words_with_another_number_or_sign_are_not_an_exact_duplicate(tmp_path: Path) -> None:
    rows = [{"question": f"What is 3 {sign} {n}?", "answer": 1, "solution": "s"} for sign in "+-*" for n in (4, 5)]
    three_sets(tmp_path, rows)
    assert len(rows_of(tmp_path, "grpo")) == 6


def test_nothing_too_close_to_an_eval_problem_is_trained_on(tmp_path: Path) -> None:
    train = [
        *numbered(0, 2),
        {"question": f"Here is a riddle for you. {LONG} Think hard!", "answer": 240, "solution": "s"},
    ]
    metrics = three_sets(tmp_path, train, [*numbered(9000, 9002), {"question": LONG, "answer": 240}])
    assert [row["answer"] for row in rows_of(tmp_path, "sft")] == ["0", "1"]
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == ["0", "1"]
    assert len(rows_of(tmp_path, "eval")) == 3
    assert metrics["sets"]["grpo"]["dropped"] == {"too close to eval": 1}
    lines = rows_of(tmp_path, "removed")
    assert [(line["set"], line["likeness"]) for line in lines] == [("sft", 1.0), ("grpo", 1.0)]
    assert {line["like"] for line in lines} == {rows_of(tmp_path, "eval")[2]["id"]}


def test_an_eval_problem_itself_is_never_trained_on_however_short(tmp_path: Path) -> None:
    three_sets(
        tmp_path,
        [*numbered(0, 2), {"question": "3 + 4 = ?", "answer": 7, "solution": "s"}],
        [{"question": "3+4=?", "answer": 7}],
    )
    assert [row["answer"] for row in rows_of(tmp_path, "sft")] == ["0", "1"]


def test_a_duplicate_across_sources_is_seen(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", numbered(0, 3)), write_rows(tmp_path / "b.jsonl", numbered(2, 5))
    e = write_rows(tmp_path / "e.jsonl", numbered(9000, 9002))
    metrics = prepare(
        tmp_path,
        [{"name": a, "use": ["sft", "grpo"], **WORKED}, {"name": b, "use": ["grpo"]}, {"name": e, "use": ["eval"]}],
    )
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == ["0", "1", "2", "3", "4"]
    assert metrics["sets"]["grpo"]["dropped"] == {"exact duplicate": 1}


# Splitting


def shared(folder: Path, rows: list[dict], **source: Any) -> dict[str, set[str]]:
    folder.mkdir()
    given = {
        "name": write_rows(folder / "all.jsonl", rows),
        "use": ["sft", "grpo", "eval"],
        "shares": [0.2, 0.5, 0.1],
        **WORKED,
        **source,
    }
    prepare(folder, [given])
    return {name: {row["id"] for row in rows_of(folder, name)} for name in ("sft", "grpo", "eval")}


def test_shares_split_by_the_question_alone(tmp_path: Path) -> None:
    few = shared(tmp_path / "few", numbered(0, 1000))
    more = shared(tmp_path / "more", [*numbered(1000, 1500), *reversed(numbered(0, 1000))])
    assert not few["sft"] & few["grpo"]
    assert not few["sft"] & few["eval"]
    assert not few["grpo"] & few["eval"]
    assert [
        0.17 < len(few["sft"]) / 1000 < 0.23,
        0.46 < len(few["grpo"]) / 1000 < 0.54,
        0.07 < len(few["eval"]) / 1000 < 0.13,
    ] == [True] * 3
    for name in few:
        assert few[name] <= more[name]


def test_max_rows_reads_the_first_rows_only(tmp_path: Path) -> None:
    metrics = three_sets(tmp_path, numbered(0, 5))
    assert metrics["sources"][0]["rows"] == 5
    (tmp_path / "again").mkdir()
    name = write_rows(tmp_path / "again" / "train.jsonl", numbered(0, 5))
    sources = [
        {"name": name, "use": ["sft", "grpo"], "max_rows": 2, **WORKED},
        {"name": str(tmp_path / "eval.jsonl"), "use": ["eval"]},
    ]
    assert prepare(tmp_path / "again", sources)["sets"]["sft"]["rows"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_how_many_processes_share_the_work_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr("stages.lib.data.sets.LARGE_BYTES", 0 if processes > 1 else 1 << 40)
    monkeypatch.setattr("stages.lib.data.sets.MAX_PROCESSES", processes)
    monkeypatch.setattr("stages.lib.data.files.BATCH_BYTES", 1000)
    metrics = three_sets(tmp_path, [*numbered(0, 300), *numbered(100, 200)])
    assert [row["answer"] for row in rows_of(tmp_path, "grpo")] == [str(i) for i in range(300)]
    assert metrics["sets"]["sft"]["dropped"] == {"exact duplicate": 100}
    left = sorted(path.name for path in (tmp_path / "out").iterdir())  # no drafts
    assert left == ["eval.jsonl", "grpo.jsonl", "removed.jsonl", "sft.jsonl"]


@pytest.mark.slow
def test_a_bad_row_ends_the_work_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.lib.data.sets.LARGE_BYTES", 0)
    monkeypatch.setattr("stages.lib.data.sets.MAX_PROCESSES", 2)
    monkeypatch.setattr("stages.lib.data.files.BATCH_BYTES", 1000)
    before = set(multiprocessing.active_children())  # the worker of math_correct, where other tests started it
    with pytest.raises(UserError, match="line 101: no answer"):
        three_sets(tmp_path, [*numbered(0, 100), {"question": "q", "solution": "s"}, *numbered(100, 3000)])
    assert set(multiprocessing.active_children()) <= before


# Lengths


def test_prompts_over_the_limit_are_dropped_from_every_set(tmp_path: Path) -> None:
    rows = [
        {"question": letter * length, "answer": 1, "solution": "s"}
        for letter, length in (("a", 30), ("b", 31), ("c", 29))
    ]
    metrics = three_sets(tmp_path, rows, [rows[1], {"question": "d", "answer": 1}], max_prompt_tokens=30)
    assert [row["prompt"][1]["content"][0] for row in rows_of(tmp_path, "grpo")] == ["a", "c"]
    assert [row["prompt"][1]["content"][0] for row in rows_of(tmp_path, "eval")] == ["d"]
    assert metrics["sets"]["sft"]["dropped"] == {"long prompt": 1}
    assert metrics["sets"]["grpo"]["prompt_tokens"] == {"measured": 2, "p50": 30, "p90": 30, "p99": 30, "max": 30}


def test_examples_over_the_limit_of_sft_are_dropped_from_sft_alone(tmp_path: Path) -> None:
    rows = [
        {"question": letter, "answer": 1, "solution": letter * length} for letter, length in (("a", 300), ("b", 20))
    ]
    metrics = three_sets(tmp_path, rows, sft={"max_tokens": 200})
    assert [row["prompt"][1]["content"] for row in rows_of(tmp_path, "sft")] == ["b"]
    assert [row["prompt"][1]["content"] for row in rows_of(tmp_path, "grpo")] == ["a", "b"]
    assert metrics["sets"]["sft"]["dropped"] == {"long example": 1}


def test_what_is_surely_short_enough_is_not_tokenized_after_the_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.lib.data.sets.MEASURED_BATCHES", 0)
    monkeypatch.setattr("stages.lib.data.sets.LARGE_BYTES", 0)
    monkeypatch.setattr("stages.lib.data.sets.MAX_PROCESSES", 1)
    asked: list[str] = []
    monkeypatch.setattr(
        Letters, "tokens", lambda self, given: [asked.append(texts[0]) or sum(map(len, texts)) for texts in given]
    )
    questions = [
        "x" * 483,
        "y" * 484,
        "z" * 501,
        "\ufdfa" * 20,
    ]  # the last: 60 bytes, 20 letters, 660 bytes when taken apart
    metrics = three_sets(
        tmp_path, [{"question": q, "answer": 1, "solution": "s"} for q in questions], max_prompt_tokens=500
    )
    assert [text for text in asked if text != "0"] == questions[1:]
    assert metrics["sets"]["grpo"]["dropped"] == {"long prompt": 1}


@pytest.mark.parametrize("text", ["plain", "caf\u00e9", "\ufdfa", "\ud55c\uae00", "\u01c4\u0958", "\U0001f600"])
def test_no_normal_form_has_more_bytes_than_the_bound(text: str) -> None:
    import unicodedata

    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert len(unicodedata.normalize(form, text).encode()) <= most_tokens(text)


# The whole stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer makes a token of each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("shared") / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, eos_token="!").save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    micro.write_weights(folder)
    return folder


def stage(folder: Path, model: Path, sources: list[dict[str, Any]], *options: object, **knobs: Any) -> Result:
    recipe = write_recipe(folder, sources, **{"model": {"name": str(model), "rehearsal": False}, **knobs})
    arguments = ["--recipe", recipe, "--out", folder / "out", *options]
    return CliRunner().invoke(prepare_data.main, [str(argument) for argument in arguments])


def gsm8k_sources(**knobs: Any) -> list[dict[str, Any]]:
    return [{**GSM8K, "use": ["sft", "grpo"], **knobs}, {**GSM8K, "use": ["eval"], "split": "test"}]


@pytest.mark.slow
def test_the_stage_reads_a_local_copy_in_place_of_the_hub(tmp_path: Path, model: Path) -> None:
    result = stage(tmp_path, model, gsm8k_sources(), "--data", DATA / "gsm8k")
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["eval.jsonl", "grpo.jsonl", "removed.jsonl", "sft.jsonl"]
    assert set(manifest["sources"]) >= {
        "openai/gsm8k main (train) train.jsonl",
        "openai/gsm8k main (test) test.jsonl",
        "model tokenizer.json",
    }
    (row, *_) = rows_of(tmp_path, "grpo")
    rendered = "".join(f"<{turn['role']}>{turn['content']}" for turn in row["prompt"]) + "<assistant>"
    lengths = figures_of(manifest, PrepareDataFigures)["sets"]["grpo"]["prompt_tokens"]
    assert lengths["measured"] == 8
    assert lengths["max"] >= len(rendered.encode()) >= 200
    assert re.search(r"(?m)^grpo +8 ", result.output)


@pytest.mark.slow
@pytest.mark.parametrize("rehearsed", [True, False])
def test_a_recipe_may_leave_the_rehearsal_out(tmp_path: Path, model: Path, rehearsed: bool) -> None:
    tables = {"model": {"name": str(model), "rehearsal": rehearsed}}
    recipe = write_recipe(tmp_path, gsm8k_sources(), **tables)
    arguments = ["--recipe", recipe, "--out", tmp_path / "out", "--data", DATA / "gsm8k"]
    result = CliRunner().invoke(prepare_data.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]
    assert ("rehearsal" in metrics) == ("rehearsal: a small copy" in result.output) == rehearsed


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(tmp_path: Path, model: Path) -> None:
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        result = stage(tmp_path / name, model, gsm8k_sources(), "--data", DATA / "gsm8k")
        assert result.exit_code == 0, result.output
        manifest = json.loads((tmp_path / name / "out" / "manifest.json").read_text())
        digests.append((manifest["files"], manifest["metrics"], manifest["sources"]))
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_the_limit_counts_the_tokens_of_the_whole_rendered_prompt(tmp_path: Path, model: Path) -> None:
    question = "Half of the 36 children in a choir are away. How many of them sing today?"
    system = formats.get("xml").system_prompt
    tokens = len(f"<system>{system}<user>{question}<assistant>")
    result = stage(tmp_path, model, gsm8k_sources(), "--data", DATA / "gsm8k", max_prompt_tokens=tokens)
    assert result.exit_code == 0, result.output
    kept = {row["prompt"][1]["content"] for row in rows_of(tmp_path, "grpo")}
    assert question in kept
    assert all(len(text.encode()) <= len(question) for text in kept)
    assert len(kept) < 8


@pytest.mark.slow
def test_other_weights_of_a_local_model_are_another_identity_for_all_later_stages(tmp_path: Path, model: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(model, mine)
    sources = [
        {"name": write_rows(tmp_path / "train.jsonl", numbered(0, 3)), "use": ["sft", "grpo"], **WORKED},
        {"name": write_rows(tmp_path / "eval.jsonl", numbered(9000, 9003)), "use": ["eval"]},
    ]
    assert "finished" in stage(tmp_path, mine, sources).output
    assert "up to date" in stage(tmp_path, mine, sources).output
    micro.write_weights(mine, 1.0)
    assert "finished" in stage(tmp_path, mine, sources).output


@pytest.mark.slow
def test_another_file_of_either_part_of_a_dataset_is_another_identity(tmp_path: Path, model: Path) -> None:
    for part, rows in (("main", numbered(0, 3)), ("extra", numbered(5, 8)), ("held", numbered(9000, 9003))):
        (tmp_path / "data" / part).mkdir(parents=True)
        write_rows(tmp_path / "data" / part / "train.jsonl", rows)
    parts = [{"name": "ann/set", "revision": REVISION, "config": part, **WORKED} for part in ("main", "extra", "held")]
    sources = [part | {"use": use} for part, use in zip(parts, (["sft"], ["grpo"], ["eval"]), strict=True)]
    arguments = (tmp_path, model, sources, "--data", tmp_path / "data")
    assert "finished" in stage(*arguments).output
    assert "up to date" in stage(*arguments).output
    for part in ("main", "extra", "held"):
        with (tmp_path / "data" / part / "train.jsonl").open("a") as file:
            file.write(json.dumps(numbered(20, 21)[0] if part != "held" else numbered(9010, 9011)[0]) + "\n")
        assert "finished" in stage(*arguments).output, part


@pytest.mark.slow
def test_too_few_rows_for_merge_and_gguf_are_said_before_anything_is_trained(tmp_path: Path, model: Path) -> None:
    sources = [
        {"name": write_rows(tmp_path / "train.jsonl", numbered(0, 3)), "use": ["sft", "grpo"], **WORKED},
        {"name": write_rows(tmp_path / "eval.jsonl", numbered(9000, 9005)), "use": ["eval"]},
    ]
    result = stage(
        tmp_path, model, sources, merge={"prompts": 5}, gguf={"prompts": 6, "importance_prompts": 4},
        grpo={"prompts_per_step": 4},
    )  # fmt: skip
    assert result.exit_code == 1
    assert result.output.endswith(
        f"Error: {tmp_path / 'recipe.toml'}: too few rows for what later stages take at once:\n"
        "  [grpo] prompts_per_step = 4, and the grpo set has 3 rows\n"
        "  [gguf] prompts = 6, and the eval set has 5 rows\n"
        "  [gguf] importance_prompts = 4, and the sft set has 3 rows\n"
        "Lower these, or give that set more rows: another file, larger shares\n"
    )
    assert not (tmp_path / "out").exists()
    result = stage(tmp_path, model, sources, merge={"prompts": 5}, gguf={"prompts": 5, "importance_prompts": 3})
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"question": "q"}], "no column 'answer'"),
        (
            [{"question": "q", "answer": 1, "solution": "s"}, {"question": "q", "solution": "s"}],
            "train.jsonl, line 2: no answer",
        ),
        ([{"question": "x" * 600, "answer": 1, "solution": "s"}], "the sft set is empty: 1 long prompt"),
        (numbered(9000, 9003), "the sft set is empty: 3 too close to eval"),
    ],
)
def test_bad_input_ends_with_one_message_and_leaves_what_was_there(
    tmp_path: Path, model: Path, rows: list, message: str
) -> None:
    sources = [
        {"name": write_rows(tmp_path / "train.jsonl", numbered(0, 3)), "use": ["sft", "grpo"], **WORKED},
        {"name": write_rows(tmp_path / "eval.jsonl", numbered(9000, 9003)), "use": ["eval"]},
    ]
    assert stage(tmp_path, model, sources).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_rows(tmp_path / "train.jsonl", rows)
    result = stage(tmp_path, model, sources)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("Error:") == 1
    assert "Traceback" not in result.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    write_rows(tmp_path / "train.jsonl", numbered(0, 4))
    assert stage(tmp_path, model, sources).exit_code == 0
    assert len(rows_of(tmp_path, "sft")) == 4


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(tmp_path: Path, model: Path, checked: list[str]) -> None:
    assert stage(tmp_path, model, gsm8k_sources(), "--data", DATA / "gsm8k").exit_code == 0
    assert checked == [str(model)]
    result = stage(tmp_path, model, gsm8k_sources(), "--data", DATA / "gsm8k")
    assert result.exit_code == 0
    assert "up to date" in result.output
    assert checked == [str(model)]


@pytest.mark.slow
def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    micro.write_weights(tmp_path / "model")
    result = stage(tmp_path, tmp_path / "model", gsm8k_sources(), "--data", DATA / "gsm8k")
    assert result.exit_code == 1
    assert "no tokenizer" in result.output


def test_data_that_nothing_in_the_recipe_asks_for_is_refused(tmp_path: Path, model: Path) -> None:
    sources = [
        {
            "name": write_rows(tmp_path / "a.jsonl", numbered(0, 40)),
            "use": ["sft", "grpo", "eval"],
            "shares": [0.4, 0.4, 0.2],
            **WORKED,
        }
    ]
    result = stage(tmp_path, model, sources, "--data", DATA / "gsm8k")
    assert result.exit_code == 1
    assert "names nothing on the hub" in result.output


# The recipe


def test_the_example_of_the_documentation_is_read_as_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    table, text = re.search(r"```csv\n(.*?)```.*?```toml\n(.*?)```", page, re.DOTALL).groups()
    (tmp_path / "bakery.csv").write_text(table)
    source = build_table(Source, tomllib.loads(text)["data"]["sources"][0], "data.sources")
    (batch,) = [piece.parsed() for piece in read_batches(source, [tmp_path / "bakery.csv"])]
    columns = zip(*(batch.columns[name] for name in ("Task", "Result", "Worked")), strict=True)
    read = [problem_of(*values, source.style) for values in columns]
    assert [(answer, worked) for _, answer, worked in read] == [
        ("288", "12 * 24 = 288 rolls."),
        ("$21.00", "4 * 0.75 = 3 and 18 + 3 = 21."),
    ]


@pytest.mark.parametrize(
    ("changes", "knobs", "message"),
    [
        ({"use": []}, {}, "expected one or more of sft, grpo, eval"),
        ({"use": ["sft", "sft"]}, {}, "each once"),
        ({"use": ["train"]}, {}, "expected one of sft, grpo, eval"),
        ({"shares": [0.5]}, {}, "expected one a set"),
        ({"shares": [0.7, 0.7]}, {}, "at most 1 in all"),
        ({"shares": [1.0, 0.0]}, {}, "over 0"),
        ({"use": ["sft", "eval"]}, {}, "would train on its own eval problems"),
        ({"use": ["eval"]}, {}, "no [[data.sources]] has 'sft'"),
        ({"style": "plain"}, {}, "solution must name the column"),
        ({"style": "think"}, {}, "solution must name the column"),
        ({"style": "think", "use": ["grpo"]}, {}, "the <think> marks"),
        ({"solution": "solution"}, {}, "leave solution out"),
        ({"revision": "main"}, {}, "revision must be a commit"),
        ({"max_rows": -1}, {}, "max_rows = -1"),
        ({"colums": "x"}, {}, "[data.sources] colums is not known"),
        ({}, {"near_duplicate_jaccard": 1.5}, "near_duplicate_jaccard = 1.5; expected over 0 and at most 1"),
        ({}, {"contamination_overlap": 0.0}, "contamination_overlap = 0.0"),
        ({}, {"ngram_words": 0}, "ngram_words = 0"),
        ({}, {"max_prompt_tokens": 0}, "max_prompt_tokens = 0"),
    ],
)
def test_a_recipe_whose_data_contradict_themselves_is_refused(
    tmp_path: Path, changes: dict, knobs: dict, message: str
) -> None:
    path = write_recipe(tmp_path, gsm8k_sources(**changes), **knobs)
    with pytest.raises(UserError) as raised:
        read_recipe(path)
    assert message in raised.value.message


def test_the_bands_are_as_likely_to_meet_as_the_docstring_says() -> None:
    assert [round(1 - (1 - s**BAND_ROWS) ** BANDS, 3) for s in (0.8, 0.7, 0.5)] == [0.997, 0.965, 0.656]


USER_ONLY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ strftime_now('%d' ~ '%B') }}" + TEMPLATE, "the chat template writes today's date into the prompt"),
        (USER_ONLY, "the chat template refuses system messages or leaves them out, but the format xml"),
        (
            TEMPLATE.replace("message['content']", "message['content'] | upper"),
            "the TEMPLATE does not prompt as the chat template of training does",
        ),
    ],
)
def test_a_chat_template_that_no_modelfile_can_hold_is_refused_before_training(
    tmp_path: Path, model: Path, template: str, message: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    result = stage(tmp_path, tmp_path / "model", gsm8k_sources(), "--data", DATA / "gsm8k")
    assert (result.exit_code, f"{tmp_path / 'model'}: {message}" in result.output) == (1, True), result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_chat_template_that_puts_a_thought_before_each_completion_is_refused(tmp_path: Path, model: Path) -> None:
    """As Qwen3's own does: the prompt ends before the thought, so the model would have to write it first."""
    shutil.copytree(model, tmp_path / "model")
    thought = TEMPLATE.replace(
        "message['content']",
        "('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') + message['content']",
    )
    assert thought != TEMPLATE
    (tmp_path / "model" / "chat_template.jinja").write_text(thought)
    result = stage(tmp_path, tmp_path / "model", gsm8k_sources(), "--data", DATA / "gsm8k")
    assert result.exit_code == 1
    assert "changes a completion, and SFT would teach the change" in result.output
    assert r"it has '<think>\n\n</think>\n\n<reasoning>" in result.output


@pytest.mark.slow
def test_a_quantized_base_is_refused_before_training(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    result = stage(tmp_path, tmp_path / "model", gsm8k_sources(), "--data", DATA / "gsm8k")
    assert result.exit_code == 1
    assert "model: its weights are quantized (bitsandbytes in its config.json); merge needs the 16-bit" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"weights", "found no safetensors file"),
        ("model.safetensors", b"\x10", "model.safetensors: is cut short"),
    ],
)
def test_a_local_base_without_whole_safetensors_is_refused_before_training(
    tmp_path: Path, model: Path, name: str, content: bytes, message: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(content)
    result = stage(tmp_path, tmp_path / "model", gsm8k_sources(), "--data", DATA / "gsm8k")
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("unsloth/Qwen3-1.7B-unsloth-bnb-4bit", "unsloth/Qwen3-1.7B"),
        ("unsloth/gemma-3-1b-it-bnb-4bit", "unsloth/gemma-3-1b-it"),
        ("Qwen/Qwen2.5-3B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-3B-Instruct"),
        ("Qwen/Qwen2.5-3B-Instruct-AWQ", "Qwen/Qwen2.5-3B-Instruct"),
        ("Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B"),
        ("someone/rounded", None),
    ],
)
def test_a_quantized_base_is_refused_with_the_name_of_the_whole_one(
    tmp_path: Path, name: str, whole: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(UserError) as refused:
        refuse_quantized_base(tmp_path, name)
    likely = f"Name that in [model] name, likely {whole!r}." if whole else "Name that in [model] name. With"
    assert likely in refused.value.message


# --- validation -------------------------------------------------------------------------------------------------------


def test_the_validation_set_is_split_off_all_training_and_is_the_same_whatever_the_order_of_the_rows(tmp_path):
    rows = numbered(0, 60)
    close = "Number 7, 55433 and 50, and nothing else?"  # but for three words the question of one of them
    found = {}
    for name, order in (("forward", rows), ("backward", rows[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        train = write_rows(folder / "train.jsonl", [*order, {**rows[7], "question": close}])
        evaluated = write_rows(folder / "eval.jsonl", numbered(60, 70))
        sources = [{**WORKED, "name": train, "use": ["sft", "grpo"]}, {"name": evaluated, "use": ["eval"]}]
        metrics = prepare(
            folder, sources, validation_rows=25, ngram_words=2, near_duplicate_jaccard=1.0, contamination_overlap=0.6
        )
        ids = {part: {row["id"] for row in rows_of(folder, part)} for part in ("validation", "sft", "grpo", "eval")}
        found[name] = ids["validation"]
        assert len(rows_of(folder, "validation")) == len(ids["validation"]) == 25
        assert not ids["validation"] & (ids["sft"] | ids["grpo"] | ids["eval"])
        assert metrics["sets"]["validation"]["rows"] == 25
        assert metrics["sets"]["grpo"]["dropped"]["kept for validation"] == 25
        assert metrics["sets"]["sft"]["dropped"]["kept for validation"] == 25
        assert list(rows_of(folder, "validation")[0]) == ["id", "prompt", "answer", "kind"]
        questions = {row["prompt"][-1]["content"] for row in rows_of(folder, "validation")}
        trained = {row["prompt"][-1]["content"] for row in rows_of(folder, "grpo")}
        assert len(trained) == 61 - 25 - (rows[7]["question"] in questions) - (close in questions)
        assert len({rows[7]["question"], close} & trained) in (0, 2)  # both, or neither: one would leak the other
        order_kept = [question for question in (row["question"] for row in order) if question in questions]
        assert [row["prompt"][-1]["content"] for row in rows_of(folder, "validation")][: len(order_kept)] == order_kept
    assert found["forward"] == found["backward"]


def test_a_training_question_that_is_close_to_a_validation_question_goes(tmp_path):
    """Every question has a twin with another last word; a set of half of all questions holds some of either kind."""
    rows = numbered(0, 20)
    twins = [{**row, "question": row["question"].replace("?", ", please?")} for row in rows]
    train = write_rows(tmp_path / "train.jsonl", rows + twins)
    evaluated = write_rows(tmp_path / "eval.jsonl", numbered(60, 70))
    sources = [{**WORKED, "name": train, "use": ["sft", "grpo"]}, {"name": evaluated, "use": ["eval"]}]
    metrics = prepare(
        tmp_path, sources, validation_rows=10, ngram_words=2, near_duplicate_jaccard=1.0, contamination_overlap=0.8
    )
    plain = lambda name: {row["prompt"][-1]["content"].replace(", please", "") for row in rows_of(tmp_path, name)}  # noqa: E731
    for name in ("sft", "grpo"):
        assert not plain("validation") & plain(name)
        assert metrics["sets"][name]["dropped"]["too close to validation"] > 0
        assert metrics["sets"][name]["rows"] == 40 - 2 * len(plain("validation"))


def test_without_validation_rows_no_byte_of_the_sets_changes_and_no_file_is_added(tmp_path):
    files = {}
    for name, knobs in (("without", {}), ("none", {"validation_rows": 0})):
        folder = tmp_path / name
        folder.mkdir()
        train = write_rows(tmp_path / "train.jsonl", numbered(0, 30))
        evaluated = write_rows(tmp_path / "eval.jsonl", numbered(60, 70))
        sources = [{**WORKED, "name": train, "use": ["sft", "grpo"]}, {"name": evaluated, "use": ["eval"]}]
        metrics = prepare(folder, sources, **knobs)
        files[name] = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
        assert set(metrics["sets"]) == {"sft", "grpo", "eval"}
    assert files["without"] == files["none"]
    assert set(files["none"]) == {"sft.jsonl", "grpo.jsonl", "eval.jsonl", "removed.jsonl"}


def test_validation_rows_that_leave_nothing_to_train_on_are_refused(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", numbered(0, 30))
    evaluated = write_rows(tmp_path / "eval.jsonl", numbered(60, 70))
    sources = [{**WORKED, "name": train, "use": ["sft", "grpo"]}, {"name": evaluated, "use": ["eval"]}]
    with pytest.raises(UserError, match=r"validation_rows = 30; expected fewer than the 30 rows of the grpo set"):
        prepare(tmp_path, sources, validation_rows=30)


# What is said of the data before anything is trained


def test_the_same_instruction_before_every_question_hides_no_leak_and_makes_no_two_alike(tmp_path: Path) -> None:
    instruction = (
        "Solve the following math problem step by step, and put your final answer on the last line after 'Answer:'.\n"
    )
    train = [{**row, "question": instruction + row["question"]} for row in [*numbered(0, 12), *numbered(9000, 9001)]]
    metrics = three_sets(tmp_path, train, near_duplicate_jaccard=0.5, contamination_overlap=0.5, ngram_words=3)
    assert metrics["sets"]["sft"]["dropped"] == {"too close to eval": 1}
    assert metrics["sets"]["sft"]["rows"] == 12
    assert rows_of(tmp_path, "sft")[0]["prompt"][1]["content"] == instruction + "Number 0, 0 and 1?"


def test_a_row_left_out_keeps_what_is_wrong_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        {"question": f"Name {i}, {i * 31} and {i * i}?", "answer": f"{i} or so, {i}", "solution": "-"} for i in range(5)
    ]
    metrics = three_sets(tmp_path, [*bad, *numbered(0, 3)], stated={"unreadable": "drop"})
    removed = rows_of(tmp_path, "removed")
    assert [row["found"][:39] for row in removed] == [f"can't be read as one number: '{i} or so, " for i in range(5)]
    assert metrics["sources"][0]["dropped"] == {"unreadable answer": 5}
    said = capsys.readouterr()
    assert "train.jsonl (train): 5 of 8 rows are left out, 5 of them for: unreadable answer, such as " in said.err
    assert ":1: can't be read as one number: '0 or so, 0'" in said.err
    assert "  read: left out   unreadable answer: " in said.out


def test_a_set_of_which_most_rows_go_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three_sets(tmp_path, numbered(0, 2) * 5)
    assert (
        "warning: the sft set: 8 of 10 rows are left out, 8 of them for: exact duplicate, such as "
        in capsys.readouterr().err
    )
    assert {row["reason"] for row in rows_of(tmp_path, "removed")} == {"exact duplicate"}


def test_an_empty_set_says_what_is_wrong_with_the_first_row(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the sft set is empty: 3 long prompt.*\n  long prompt: .*train.jsonl:1: 18 tokens"
    ):
        three_sets(tmp_path, numbered(0, 3), max_prompt_tokens=10)


@pytest.mark.parametrize(
    ("steps", "rows", "said"),
    [
        (3, 12, "sft: 3 steps of 4 rows are 1 epochs of its 12 rows"),
        (500, 1, "warning: sft: 500 steps of 4 rows are 2,000 epochs of its 1 rows: the model learns these by heart"),
    ],
)
def test_epochs_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, rows: int, said: str) -> None:
    three_sets(
        tmp_path,
        numbered(0, rows),
        sft={
            "steps": steps,
            "batch_size": 4,
            "micro_batch_size": 4,
            "warmup_steps": 0,
            "log_steps": 1,
            "save_steps": 1,
        },
    )
    captured = capsys.readouterr()
    assert said in (captured.err if said.startswith("warning") else captured.out)


def test_a_column_beside_the_question_is_said_with_the_line_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three_sets(tmp_path, [{**row, "Body": "Ann had pens."} for row in numbered(0, 3)])
    assert "column 'Body' is not read" in (said := capsys.readouterr().err)
    assert 'question = ["Body", "question"]' in said
