"""The figures of the stages: what is not as typed is refused, with stage, key, what was found and what was expected."""

import copy
import json
import re

import pytest

from stages.lib.errors import UserError
from stages.lib.report import figures
from stages.lib.report.figures import figures_of, mismatch
from tests.support import uploads

KINDS = {
    "base-model": figures.BaseModelFigures,
    "prepare-data": figures.PrepareDataFigures,
    "sft": figures.SftFigures,
    "grpo": figures.GrpoFigures,
    "infer": figures.InferFigures,
    "merge": figures.MergeFigures,
    "gguf": figures.GgufFigures,
    "ollama-modelfile": figures.OllamaModelfileFigures,
}
GONE = object()


def manifest(stage: str) -> dict:
    """Return a manifest as it is read from a disk."""
    return {"stage": stage, "metrics": json.loads(json.dumps(uploads.METRICS[stage]))}


@pytest.mark.parametrize("stage", KINDS)
def test_figures_as_typed_are_given_as_they_are(stage):
    assert figures_of(manifest(stage), KINDS[stage]) == uploads.METRICS[stage]


@pytest.mark.parametrize("stage", KINDS)
def test_each_figure_that_is_missing_is_named(stage):
    for key in uploads.METRICS[stage]:
        spoilt = manifest(stage)
        del spoilt["metrics"][key]
        if key in KINDS[stage].__optional_keys__:
            assert figures_of(spoilt, KINDS[stage]) == spoilt["metrics"]
            continue
        with pytest.raises(UserError, match=rf"the manifest of {stage}: metrics\.{key} is missing; expected "):
            figures_of(spoilt, KINDS[stage])


@pytest.mark.parametrize(
    ("stage", "path", "value", "message"),
    [
        ("sft", ["loss"], "0.2", "loss = '0.2'; expected float, found str"),
        ("sft", ["loss"], None, "loss = None; expected float, found NoneType"),
        ("sft", ["loss"], True, "loss = True; expected float, found bool"),
        ("sft", ["examples"], 7.5, "examples = 7.5; expected int, found float"),
        ("sft", ["examples"], False, "examples = False; expected int, found bool"),
        ("sft", ["memory_ladder"], {}, "memory_ladder = {}; expected list, found dict"),
        ("sft", ["memory_ladder"], [{}], "memory_ladder[0].at_step is missing; expected int"),
        ("sft", ["secret"], 1, "secret is not known; expected examples, dropped_too_long, loss, "),
        ("grpo", ["last", "rewards", "int"], [], "last.rewards.int = []; expected float, found list"),
        ("grpo", ["first", "cut_off"], GONE, "first.cut_off is missing; expected float"),
        ("grpo", ["first"], [1], "first = [1]; expected dict, found list"),
        ("infer", ["sft", "accuracy_interval", 1], "x", "sft.accuracy_interval[1] = 'x'; expected float, found str"),
        ("infer", ["steps", "base to sft", "p"], GONE, "steps.base to sft.p is missing; expected float"),
        ("gguf", ["files", "q8_0", "mean_kl"], GONE, "files.q8_0.mean_kl is missing; expected float"),
        ("gguf", ["files", "q8_0", "answer"], 42, "files.q8_0.answer = 42; expected str, found int"),
        ("gguf", ["lora"], None, "lora = None; expected dict, found NoneType"),
        ("prepare-data", ["sources", 1, "rows"], GONE, "sources[1].rows is missing; expected int"),
        ("prepare-data", ["sets", "sft", "prompt_tokens"], GONE, "sets.sft.prompt_tokens is missing; expected "),
        ("prepare-data", ["sources", 0, "use", 1], None, "sources[0].use[1] = None; expected str, found NoneType"),
        ("ollama-modelfile", ["system_prompt"], 1, "system_prompt = 1; expected bool, found int"),
    ],
)
def test_a_figure_of_another_type_is_refused(stage, path, value, message):
    spoilt = manifest(stage)
    *way, last = ["metrics", *path]
    place = spoilt
    for key in way:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(UserError, match=rf"^the manifest of {stage}: metrics\." + re.escape(message)) as refused:
        figures_of(spoilt, KINDS[stage])
    assert refused.value.message.endswith(f". Delete the artifact and run: make {stage}")


@pytest.mark.parametrize("metrics", [None, [], "x", {}])
def test_a_manifest_without_figures_is_refused(metrics):
    with pytest.raises(UserError, match=r"the manifest of merge: metrics"):
        figures_of({"stage": "merge", "metrics": metrics}, figures.MergeFigures)
    with pytest.raises(UserError, match=r"the manifest of merge: metrics = None; expected dict, found NoneType"):
        figures_of({"stage": "merge"}, figures.MergeFigures)


def test_a_whole_number_is_a_number_and_figures_are_left_as_they_are():
    whole = {"mean_kl": 0, "max_kl": 1, "same_top": 1}
    before = copy.deepcopy(whole)
    assert mismatch(whole, figures.FourBitDistance, "metrics") is None
    assert whole == before
