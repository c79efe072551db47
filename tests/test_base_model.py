"""The embedded base model: a tokenizer that is SentencePiece to the letter, a clean corpus, the promised size."""

import dataclasses
import json
from pathlib import Path

import pytest

from stages import base_model
from stages.lib.answers import formats
from stages.lib.artifact.manifest import read_manifest
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import BaseModel
from stages.lib.report.figures import BaseModelFigures, mismatch
from tests.support import micro

ROOT = Path(__file__).parents[1]


def knobs(**changes) -> BaseModel:
    """Return the tiny recipe's own knobs, with changes."""
    return dataclasses.replace(read_recipe(ROOT / "recipes" / "tiny.toml").base_model, **changes)


def model_folder(finished: Path) -> Path:
    return finished / "base-model" / "model"


@pytest.fixture(scope="module")
def tokenizer(finished):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(finished))


@pytest.fixture(scope="module")
def pieces(finished):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model_folder(finished) / "tokenizer.model"))


TEXTS = [
    "What is 17 + 25?",
    "Tom has 3 apples. Tom buys 57 more and gives 60 away.",
    "1234567890",
    "17+25=42\n42-2=40",
    "\n",
    "\n\n\n",
    "line\r\nline\ttab",
    " leading, trailing ",
    "two  spaces   three",
    "  ",
    "",
    "<reasoning>\n17+25=42\n</reasoning>\n<answer>\n42\n</answer>",
    "<think>\n1</think><SOLUTION>2</SOLUTION>",
    "naïve café — “quotes” … ﬁ ½ ①",  # the identity normalization leaves them as they are
    "e\u0301 and é",
    "中文 日本 한국어 русский ελληνικά",
    "🙂👩‍👩‍👧",
    "\u00a0\u200b\u2028\ufeff",
    "▁ is SentencePiece's own space",
    "<0x0A>",
    formats.XML.system_prompt,
]


@pytest.mark.torch
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_sentencepieces_own_ids_and_the_text_back(tokenizer, pieces, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == pieces.encode(text)
    if "▁" not in text:  # which stands for the space itself
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.torch
def test_every_problem_of_the_run_has_sentencepieces_own_ids(finished, tokenizer, pieces):
    for name in ("train", "eval"):
        lines = (finished / "base-model" / "problems" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == {"train": 200, "eval": 240}[name]
        for line in lines:
            row = json.loads(line)
            text = f"{row['question']}\n{row['solution']}"
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


@pytest.mark.torch
def test_a_number_is_its_digits_and_a_line_break_is_one_piece(tokenizer):
    digits = tokenizer("5720", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(digits) == ["5", "7", "2", "0"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n", add_special_tokens=False)["input_ids"]) == ["<0x0A>"]
    assert not [piece for piece in tokenizer.get_vocab() if len(piece.strip("▁")) > 1 and piece.strip("▁").isdigit()]


@pytest.mark.torch
def test_the_special_tokens_have_the_ids_of_the_code(tokenizer, pieces):
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5]
    assert [pieces.id_to_piece(number) for number in range(6)] == names
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) == (0, 2, 3)
    assert tokenizer.eos_token_id == base_model.END_OF_TURN == 5  # the turn end
    assert len(tokenizer) == pieces.vocab_size() == 512


@pytest.mark.torch
def test_the_answer_tags_are_plain_text(tokenizer):
    for kind in formats.FORMATS.values():
        for tag in (kind.reasoning_open, kind.reasoning_close, kind.answer_open, kind.answer_close):
            ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == tag
            assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.torch
def test_the_template_writes_one_bos_the_system_prompt_in_the_users_turn_and_a_turn_end(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is 1 + 1? "},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    assert tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == (
        "<bos><start_of_turn>user\nBe brief.\n\nWhat is 1 + 1?<end_of_turn>\n"
        "<start_of_turn>model\n2<end_of_turn>\n<start_of_turn>user\nAnd 2 + 2?<end_of_turn>\n<start_of_turn>model\n"
    )
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert (ids[0], ids.count(base_model.BOS), ids.count(base_model.END_OF_TURN)) == (2, 1, 3)
    with pytest.raises(Exception, match="Conversation roles must alternate"):
        tokenizer.apply_chat_template(turns[:1] + turns[2:], tokenize=False)


@pytest.mark.torch
def test_generation_ends_at_both_ends(finished):
    settings = json.loads((model_folder(finished) / "generation_config.json").read_text())
    assert sorted(settings["eos_token_id"]) == [1, 5]
    assert (settings["bos_token_id"], settings["pad_token_id"]) == (2, 0)


@pytest.mark.torch
def test_the_folder_is_a_whole_model_with_the_original_tokenizer_and_safetensors_only(finished):
    names = {path.name for path in model_folder(finished).iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_no_held_out_problem_is_in_the_corpus_and_none_is_in_two_sets():
    own = knobs()  # the tiny recipe's true numbers
    held_out = base_model.held_out(own)
    corpus = base_model.conversations(own)
    questions = {name: {problem.question for problem in problems} for name, problems in held_out.items()}
    assert len(questions["eval"]) == own.eval_problems
    assert len(questions["train"]) == own.train_problems
    asked = {question for question, _ in corpus}
    assert len(asked) == len(corpus) == own.corpus_problems
    assert not asked & (questions["eval"] | questions["train"])
    assert not questions["eval"] & questions["train"]
    assert own.eval_problems >= 1000


def test_the_files_hold_the_held_out_problems_and_the_share_that_shows_its_working(tmp_path):
    own = knobs(eval_problems=50, train_problems=2000, working_share=0.4)
    base_model.write_problems(own, tmp_path / "problems")
    rows = {name: read_rows(tmp_path / "problems" / f"{name}.jsonl") for name in ("eval", "train")}
    for name, problems in base_model.held_out(own).items():
        assert [(row["question"], row["answer"]) for row in rows[name]] == [
            (problem.question, str(problem.answer)) for problem in problems
        ]
    assert all("=" in row["solution"] for row in rows["eval"])
    showing = sum("=" in row["solution"] for row in rows["train"])
    assert 740 < showing < 860
    assert {row["solution"] for row in rows["train"] if "=" not in row["solution"]} == {"That is easy."}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.torch
def test_what_is_learnt_is_the_reply_and_the_results_of_drills(tokenizer):
    own = knobs(corpus_problems=40, drill_share=0.5)
    corpus = base_model.conversations(own)
    documents = base_model.tokenize(own, corpus, tokenizer)
    assert len(documents) == 80
    for (_, reply), (ids, labels) in zip(corpus, documents, strict=False):
        assert len(ids) == len(labels)
        learnt = [label for label in labels if label != -100]
        assert tokenizer.decode(learnt) == f"{reply}<end_of_turn>\n"
        assert ids[-len(learnt) :] == learnt
    for ids, labels in documents[40:]:
        assert ids[0] == base_model.BOS
        assert len(ids) == len(labels)
        lines = tokenizer.decode(ids[1:]).splitlines()
        assert len(lines) == 9
        assert tokenizer.decode([label for label in labels if label != -100]).split() == [
            line.partition("=")[2] for line in lines
        ]
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.torch
def test_the_network_has_about_1_3_million_parameters(tmp_path):
    own = knobs(corpus_problems=300, eval_problems=20, train_problems=20, steps=1, batch_size=2, warmup_steps=0)
    corpus = base_model.conversations(own)
    base_model.make_tokenizer(own, corpus, tmp_path / "model")
    metrics = base_model.train(own, corpus, tmp_path / "model")
    assert mismatch(metrics, BaseModelFigures, "metrics") is None
    assert 1_250_000 < metrics["parameters"] < 1_350_000
    assert 5 < metrics["loss"] < 9  # nats; ln 512 = 6.2 is knowing nothing
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert config["hidden_size"] % 256 == 0  # llama.cpp's k-quants


@pytest.mark.torch
def test_two_runs_give_the_same_bytes_whatever_was_drawn_before(finished, tmp_path):
    import torch

    torch.manual_seed(12345)
    assert micro.run("base-model", finished, tmp_path / "base-model").exit_code == 0
    first, second = (read_manifest(folder / "base-model", "base-model") for folder in (finished, tmp_path))
    assert first["files"] == second["files"]
    assert micro.vouched(finished / "base-model") == micro.vouched(tmp_path / "base-model")


@pytest.mark.torch
def test_another_seed_is_other_problems_and_another_network(finished, tmp_path):
    recipe = micro.write_recipe(tmp_path, base_model={"seed": 2})
    assert micro.run("base-model", finished, tmp_path / "base-model", recipe).exit_code == 0
    first, second = (read_manifest(folder / "base-model", "base-model")["files"] for folder in (finished, tmp_path))
    for name in ("model/model.safetensors", "model/tokenizer.model", "problems/eval.jsonl", "problems/train.jsonl"):
        assert first[name]["sha256"] != second[name]["sha256"], name


def test_a_recipe_without_the_table_is_refused(tmp_path):
    from click.testing import CliRunner

    recipe = ROOT / "recipes" / "gemma3-1b-gsm8k.toml"
    result = CliRunner().invoke(base_model.main, ["--recipe", str(recipe), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "has no [base_model] table: it starts from" in result.output
    assert not (tmp_path / "out").exists()
