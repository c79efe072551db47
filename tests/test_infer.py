"""The evaluation: a completion is marked by the one parser, figures are right by hand, pairs are compared as pairs."""

import json

import pytest

from stages import infer
from stages.lib.answers import formats
from stages.lib.answers.grade import mark
from stages.lib.artifact.manifest import read_manifest
from stages.lib.model.load import load_model
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.read import read_recipe
from stages.lib.report.figures import InferFigures, figures_of
from tests.support import micro

XML = formats.get("xml")
THINK = formats.get("think")


def completion(reasoning: str, answer: str) -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize(
    ("text", "right", "well_formed", "given", "is_right"),
    [
        (completion("40+2=42", "42"), "42", True, "42", True),
        (completion("40+2=42", "42.0"), "42", True, "42", True),
        (completion("40+2=42", "$42"), "42", True, "42", True),
        (completion("1", "1,042"), "1042", True, "1042", True),
        (completion("40+2=42", "43"), "42", True, "43", False),
        (completion("42", "24"), "42", True, "24", False),  # right in the reasoning alone
        (completion("42", "forty-two"), "42", True, None, False),
        (completion("42", "42 or 43"), "42", True, None, False),
        ("42", "42", False, None, False),
        ("", "42", False, None, False),
        ("<answer>\n42\n</answer>", "42", False, None, False),
        (completion("42", "42") + " and more", "42", False, None, False),
        (completion("42", "42") + "\n<answer>\n42\n</answer>", "42", False, None, False),
        (completion("<answer>42</answer>", "42"), "42", False, None, False),
        (completion("42", "42").removesuffix("</answer>"), "42", False, None, False),  # cut off
        (completion("", "42"), "42", False, None, False),
    ],
)
def test_a_completion_is_right_when_it_is_well_formed_and_its_answer_is(text, right, well_formed, given, is_right):
    assert mark(XML, text, right) == {"well_formed": well_formed, "given": given, "right": is_right}


def test_the_format_decides_what_is_well_formed():
    text = "2 * 21</think><SOLUTION>42</SOLUTION>"
    assert mark(THINK, text, "42") == {"well_formed": True, "given": "42", "right": True}
    assert mark(XML, text, "42") == {"well_formed": False, "given": None, "right": False}


def row(model: str, right: bool, *, well_formed: bool = True, tokens: int = 10, ended: bool = True) -> dict:
    return {"model": model, "right": right, "well_formed": well_formed, "tokens": tokens, "ended": ended}


def rows() -> list[dict]:
    """Return ten problems: base solves none, sft five, grpo three of those five and four others."""
    made = [row("base", False, well_formed=False, tokens=64, ended=False) for _ in range(10)]
    made += [row("sft", problem < 5, well_formed=problem < 8, tokens=problem) for problem in range(10)]
    return made + [row("grpo", problem < 3 or problem > 5) for problem in range(10)]


def test_the_figures_are_those_counted_by_hand():
    figures = infer.evaluate(rows())
    assert figures["base"] == {
        "problems": 10, "accuracy": 0.0, "accuracy_interval": pytest.approx([0.0, 0.2775], abs=1e-4),
        "well_formed": 0.0, "tokens": 64.0, "cut_off": 1.0,
    }  # fmt: skip
    assert figures["sft"] == {
        "problems": 10, "accuracy": 0.5, "accuracy_interval": pytest.approx([0.2366, 0.7634], abs=1e-4),
        "well_formed": 0.8, "tokens": 4.5, "cut_off": 0.0,
    }  # fmt: skip
    assert figures["grpo"]["accuracy"] == 0.7
    assert figures["steps"] == {
        "base to sft": {"gained": 5, "lost": 0, "p": 0.0625},
        "sft to grpo": {"gained": 4, "lost": 2, "p": 0.6875},
    }


def test_a_comparison_is_of_pairs_and_not_of_sums():
    made = [row("base", problem % 2 == 0) for problem in range(100)]
    made += [row(name, problem % 2 == 1) for name in ("sft", "grpo") for problem in range(100)]
    steps = infer.evaluate(made)["steps"]
    assert steps["base to sft"] == {"gained": 50, "lost": 50, "p": 1.0}
    assert steps["sft to grpo"] == {"gained": 0, "lost": 0, "p": 1.0}


TWENTY = [row(name, False) for name in ("base", "sft", "grpo") for _ in range(20)]


def test_models_with_unlike_numbers_of_answers_are_never_compared():
    with pytest.raises(ValueError, match="zip"):
        infer.evaluate(rows()[:-1])


@pytest.mark.torch
def test_the_stage_keeps_every_answer_of_every_model_to_the_same_problems(finished):
    folder = finished / "infer"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n")[:-1]]
    problems = [json.loads(line) for line in (finished / "prepare-data" / "eval.jsonl").read_text().split("\n")[:20]]
    assert [(row["model"], row["id"]) for row in answers] == [
        (model, problem["id"]) for model in ("base", "sft", "grpo") for problem in problems
    ]
    for each, problem in zip(answers, problems * 3, strict=True):
        assert (each["question"], each["answer"]) == (problem["prompt"][-1]["content"], problem["answer"])
        marked = mark(XML, each["completion"], each["answer"])
        assert {key: each[key] for key in ("well_formed", "given", "right")} == marked
        assert 1 <= each["tokens"] <= 12
        assert each["ended"] or each["tokens"] == 12
    metrics = figures_of(read_manifest(folder, "infer"), InferFigures)
    assert metrics == json.loads(json.dumps(infer.evaluate(answers)))


DRAWN = {"samples": 4, "sample_temperature": 1.0, "sample_top_p": 0.9, "sample_seed": 3}


@pytest.mark.torch
def test_drawn_answers_go_by_their_seed_and_change_no_greedy_one(finished, tmp_path):
    files = {}
    for name, knobs in (("once", DRAWN), ("again", DRAWN), ("other", DRAWN | {"sample_seed": 4})):
        (tmp_path / name).mkdir()
        recipe = micro.write_recipe(tmp_path / name, infer=knobs)
        result = micro.run("infer", finished, tmp_path / name / "infer", recipe)
        assert result.exit_code == 0, result.output
        greedy = (tmp_path / name / "infer" / "answers.jsonl").read_bytes()
        assert greedy == (finished / "infer" / "answers.jsonl").read_bytes()
        files[name] = (tmp_path / name / "infer" / "samples.jsonl").read_text()
    assert files["once"] == files["again"] != files["other"]
    rows = [json.loads(line) for line in files["once"].splitlines()]
    problems = [json.loads(line) for line in (finished / "prepare-data" / "eval.jsonl").read_text().splitlines()[:20]]
    assert [(row["model"], row["sample"], row["id"]) for row in rows] == [
        (model, sample, problem["id"])
        for model in ("base", "sft", "grpo")
        for sample in range(4)
        for problem in problems
    ]
    by_problem = {}
    for row in rows:
        by_problem.setdefault((row["model"], row["id"]), set()).add(row["completion"])
        marked = mark(XML, row["completion"], row["answer"])
        assert {key: row[key] for key in ("well_formed", "given", "right")} == marked
    assert sum(len(texts) > 1 for texts in by_problem.values()) > 40  # they are drawn, and not four times the same
    metrics = figures_of(read_manifest(tmp_path / "once" / "infer", "infer"), InferFigures)
    assert metrics["sampled"] == json.loads(json.dumps(infer.evaluate_samples(rows)))
    assert set(metrics["sampled"]) == {"base", "sft", "grpo"}
    assert set(metrics["sampled"]["sft"]["pass_at"]) == {"1", "2", "4"}
    assert "sampled" not in read_manifest(finished / "infer", "infer")["metrics"]
    assert not (finished / "infer" / "samples.jsonl").exists()


def test_the_figures_of_drawn_answers_are_those_of_each_models_own_problems():
    rows = []
    for model, rights in (("base", (0, 0)), ("sft", (1, 2)), ("grpo", (4, 2))):
        for sample in range(4):
            for problem, right in enumerate(rights):
                given = "7" if sample < right else str(sample)
                rows.append({"model": model, "id": problem, "given": given, "right": sample < right, "sample": sample})
    figures = infer.evaluate_samples(rows)
    shares = {name: [own["pass_at"][k]["share"] for k in ("1", "2", "4")] for name, own in figures.items()}
    assert shares["base"] == [0, 0, 0]
    assert shares["sft"] == pytest.approx([3 / 8, (1 / 2 + 5 / 6) / 2, 1])  # one right of 4; two of 4
    assert shares["grpo"] == pytest.approx([6 / 8, (1 + 5 / 6) / 2, 1])
    assert figures["grpo"]["majority_at"]["4"]["share"] == 1  # 7 7 7 7, and 7 7 2 3
    assert infer.tracked(infer.evaluate(TWENTY) | {"sampled": figures})["evaluation/sft/pass_at_1"] == 3 / 8


@pytest.mark.torch
def test_each_model_is_the_one_it_is_called_and_the_batch_does_not_change_its_answers(finished):
    """The stage switches adapters on one base; here each model is loaded alone and asked one problem at a time."""
    from peft import PeftModel

    recipe = read_recipe(finished / "micro.toml", finished / "base-model")
    told = [json.loads(line) for line in (finished / "infer" / "answers.jsonl").read_text().split("\n")[:-1]]
    problems = [json.loads(line) for line in (finished / "prepare-data" / "eval.jsonl").read_text().split("\n")[:20]]
    tokenizer = load_tokenizer(recipe)
    texts = {}
    for name in ("base", "sft", "grpo"):
        adapter = None if name == "base" else finished / name / "adapter"
        model = load_model(recipe).eval()
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        limit = recipe.infer.max_completion_tokens
        texts[name] = [greedy(model, tokenizer, problem["prompt"], limit) for problem in problems]
        same = [each["completion"] for each in told if each["model"] == name]
        # Two may differ: where two tokens are as likely, the padding of a batch can tip the scales.
        assert sum(ours == theirs for ours, theirs in zip(texts[name], same, strict=True)) >= 18
    for first, second in (("base", "sft"), ("sft", "grpo"), ("base", "grpo")):
        assert sum(one != other for one, other in zip(texts[first], texts[second], strict=True)) >= 5


def greedy(model, tokenizer, prompt: list[dict], max_tokens: int) -> str:
    """Return the model's most likely completion of one prompt, found token by token without a cache."""
    import torch

    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    first = len(ids)
    while len(ids) < first + max_tokens:
        with torch.inference_mode():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] in (1, 5):
            break
    return tokenizer.decode(ids[first:], skip_special_tokens=True)
