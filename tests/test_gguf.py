"""The gguf stage, on a tiny model that was trained for it: the files, the gate's figures and what is refused."""

import contextlib
import json
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import gguf
from stages.lib.distance import Text
from stages.lib.errors import UserError
from stages.lib.gguf.convert import quantize
from stages.lib.gguf.file import Loaded
from stages.lib.gguf.types import GGUF_TYPES
from stages.lib.model.reference import load_reference
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import Gguf
from stages.lib.report.figures import GgufFigures, figures_of
from tests.support import tiny_models


def figures() -> dict:
    return json.loads((tiny_models.quantized() / "parity.json").read_text())


@pytest.mark.torch
def test_the_stage_leaves_the_files_asked_for_and_the_proof():
    names = {path.name for path in tiny_models.quantized().iterdir()}
    assert names == {
        "model.f16.gguf", "model.q8_0.gguf", "model.q4_k_m.gguf", "adapter-f16.gguf", "parity.json", "parity.png",
        "manifest.json", "outside",
    }  # fmt: skip
    assert (tiny_models.quantized() / "parity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "mean_kl", "same_top"), [("f16", 1e-5, 0.999), ("q8_0", 1e-3, 0.98), ("q4_k_m", 1e-2, 0.95)]
)
def test_every_file_answers_like_the_merged_model(kind, mean_kl, same_top):
    file = figures()["files"][kind]
    assert 0 < file["mean_kl"] < mean_kl
    assert file["mean_kl"] <= file["p99_kl"] <= file["max_kl"]
    assert file["same_top"] > same_top
    assert file["perplexity"] == pytest.approx(file["reference_perplexity"], rel=0.02)
    assert file["ended"] >= figures()["reference"]["ended"]
    assert "</answer>" in file["answer"]


@pytest.mark.torch
def test_the_f16_file_writes_the_same_text_on_every_prompt():
    assert figures()["files"]["f16"]["same_text"] == 1.0


@pytest.mark.torch
def test_the_base_with_the_adapters_file_answers_like_the_merged_model():
    lora = figures()["lora"]
    assert 0 < lora["mean_kl"] < 1e-6
    assert lora["mean_kl"] < lora["max_mean_kl"] == pytest.approx(2e-4)
    assert lora["same_top"] > 0.999
    assert lora["bytes"] == (tiny_models.quantized() / "adapter-f16.gguf").stat().st_size


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_the_number_of_threads_changes_no_byte_of_logits_and_no_completion(kind):
    prompts = [[2, *range(20, 30 + 40 * number)] for number in range(4)]
    text, found = Text(prompts[-1], list(range(len(prompts[-1]) - 1))), []
    with contextlib.closing(Loaded(tiny_models.quantized() / f"model.{kind}.gguf", 256, 4)) as file:
        for threads in (1, 2, 3, 8):
            file.take_threads(threads)
            logits = b"".join(chunk.tobytes() for chunk in file.logits([text]))
            file.forget()
            single = [file.decode([(token, n, 0, True)]).tobytes() for n, token in enumerate(text.tokens[:20])]
            found.append((logits, single, file.greedy(prompts, 20)))
    assert len(found[0][0]) == (len(prompts[-1]) - 1) * 384 * 4
    assert found[1:] == [found[0]] * 3


@pytest.mark.torch
def test_the_manifest_states_the_threads_of_each_file_beside_the_machine_and_in_no_figure():
    manifest = json.loads((tiny_models.quantized() / "manifest.json").read_text())
    assert manifest["environment"]["threads"] == {"f16": 1, "q8_0": 1, "q4_k_m": 1}  # small files
    assert "threads" not in json.dumps(manifest["metrics"]) + (tiny_models.quantized() / "parity.json").read_text()


@pytest.mark.torch
def test_fewer_bits_are_smaller_and_farther():
    files = figures()["files"]
    assert files["q4_k_m"]["bytes"] < files["q8_0"]["bytes"] < files["f16"]["bytes"]
    assert files["q4_k_m"]["mean_kl"] > files["q8_0"]["mean_kl"] > files["f16"]["mean_kl"]


@pytest.mark.torch
def test_flips_and_accuracies_agree():
    reference, files = figures()["reference"], figures()["files"]
    for file in files.values():
        change = (file["accuracy"] - reference["accuracy"]) * reference["prompts"]
        assert change == pytest.approx(file["flipped_to_right"] - file["flipped_to_wrong"])
        assert 0 <= file["accuracy_low"] <= file["accuracy"] <= file["accuracy_high"] <= 1


@pytest.mark.torch
def test_seconds_are_kept_out_of_the_metrics():
    manifest = json.loads((tiny_models.quantized() / "manifest.json").read_text())
    assert {"convert", "reference", "quantize q8_0", "examine f16"} <= set(manifest["wall"])
    assert figures_of(manifest, GgufFigures) == figures()


@pytest.mark.torch
def test_a_second_run_has_nothing_to_do():
    tiny_models.quantized()
    result = tiny_models.run_stage(
        "gguf",
        tiny_models.made() / "tiny.toml",
        tiny_models.made() / "gguf",
        "merge",
        "prepare-data",
        "grpo",
        "base-model",
    )
    assert (result.exit_code, "up to date" in result.output) == (0, True)


@pytest.mark.torch
def test_the_16_bit_file_goes_unless_it_was_asked_for(tmp_path):
    shutil.copytree(tiny_models.merged(), tmp_path / "merge")
    recipe = tiny_models.recipe(tmp_path, types=["Q8_0"], prompts=2, importance_prompts=5)
    result = tiny_models.run_stage("gguf", recipe, tmp_path / "gguf", "merge", "prepare-data", "grpo", "base-model")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "gguf").glob("**/*.gguf")} == {"model.q8_0.gguf", "adapter-f16.gguf"}
    assert "q8_0" in result.output
    assert "same text" in result.output
    assert re.search(r"(?m)^ *lora +0\.\d", result.output)


@pytest.mark.torch
def test_without_lora_in_save_neither_adapter_nor_base_is_looked_at(tmp_path):
    shutil.copytree(tiny_models.merged(), tmp_path / "merge")
    recipe = tiny_models.recipe(tmp_path, types=["q8_0"], prompts=2)
    recipe.write_text(recipe.read_text().replace('"lora", ', ""))
    (tmp_path / "grpo").mkdir()
    result = tiny_models.run_stage("gguf", recipe, tmp_path / "gguf", "merge", "prepare-data", "grpo", "base-model")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {
        "model.q8_0.gguf", "parity.json", "parity.png", "manifest.json", "outside",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "gguf" / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"merge", "prepare-data"}
    assert "lora" not in manifest["metrics"]


@pytest.mark.torch
def test_a_file_over_its_limit_fails_the_stage_with_figure_limit_and_cause(tmp_path):
    shutil.copytree(tiny_models.merged(), tmp_path / "merge")
    recipe = tiny_models.recipe(tmp_path, types=["q8_0"], prompts=2)
    recipe.write_text(recipe.read_text().replace("[ollama]", "[gguf.max_mean_kl]\nq8_0 = 1e-9\n\n[ollama]"))
    result = tiny_models.run_stage("gguf", recipe, tmp_path / "gguf", "merge", "prepare-data", "grpo", "base-model")
    assert result.exit_code == 1
    assert "q8_0: mean KL " in result.output
    assert "limit 1.00e-09. Likely causes: too few bits" in result.output
    assert not (tmp_path / "gguf").exists()


@pytest.mark.torch
def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    tiny_models.merged()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 1000))
    out = tmp_path / "gguf"
    result = tiny_models.run_stage(
        "gguf", tiny_models.made() / "tiny.toml", out, "merge", "prepare-data", "grpo", "base-model"
    )
    assert (result.exit_code, "gguf needs 0.0" in result.output) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == [".gguf.unfinished.lock"]


@pytest.mark.torch
@pytest.mark.parametrize("types", [["f16"], ["q8_0"], ["f16", "q8_0", "q4_k_m"], ["bf16", "q2_k"], ["f32"], ["iq4_nl"]])
def test_the_room_asked_for_covers_the_files(types):
    files = figures()["files"]
    parameters = json.loads((tiny_models.merged() / "manifest.json").read_text())["metrics"]["parameters"]
    room = gguf.room_bytes(Gguf(types), parameters, tiny_models.merged() / "model")
    assert room > sum(files[kind]["bytes"] for kind in types if kind in files)
    assert room > 2 * parameters
    with_adapter = gguf.room_bytes(
        Gguf(types), parameters, tiny_models.merged() / "model", tiny_models.made() / "grpo" / "adapter"
    )
    assert with_adapter > room + 2 * parameters + figures()["lora"]["bytes"]


@pytest.mark.torch
def test_the_smallest_types_need_an_importance_matrix_and_are_refused_without(tmp_path):
    source = tiny_models.quantized() / "model.f16.gguf"
    with pytest.raises(UserError, match=r"(?s)could not quantize model.f16.gguf to iq2_xs:.*imatrix"):
        quantize(source, tmp_path / "model.iq2_xs.gguf", "iq2_xs")


@pytest.mark.torch
def test_an_importance_matrix_is_the_mean_square_of_every_layers_inputs(tmp_path):
    model, source = tiny_models.merged() / "model", tiny_models.quantized() / "model.f16.gguf"
    rows = tiny_models.rows(3, seed=2)
    searched = list(sys.path)
    found = gguf.weigh(model, source, rows)
    assert sys.path == searched  # beside llama.cpp's package gguf lies one named tests
    layers = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(found) == {f"blk.{block}.{layer}.weight" for block in (0, 1) for layer in layers} | {"output.weight"}
    assert found["blk.0.ffn_down.weight"].shape == (512,)
    assert (found["blk.1.attn_q.weight"] == found["blk.1.attn_v.weight"]).all()  # they read the same input
    assert found["blk.0.attn_q.weight"] == pytest.approx(first_layer_inputs(model, rows), rel=1e-5)


def first_layer_inputs(model: Path, rows: list[dict]):
    """The mean square of the normalized embeddings, column by column, worked out without a hook."""
    import torch
    from transformers import AutoTokenizer

    network = load_reference(model).model
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = [row["prompt"] + row["completion"] for row in rows]
    tokens = [token for ids in tokenizer.apply_chat_template(whole, return_dict=False) for token in ids]
    with torch.inference_mode():
        inputs = network.layers[0].input_layernorm(network.embed_tokens(torch.tensor(tokens)))
    return inputs.square().mean(dim=0).numpy()


@pytest.mark.torch
def test_the_smallest_types_can_be_made_with_an_importance_matrix(tmp_path):
    model, source = tiny_models.merged() / "model", tiny_models.quantized() / "model.f16.gguf"
    importance = gguf.weigh(model, source, tiny_models.rows(20, seed=2))
    quantize(source, tmp_path / "model.iq2_xs.gguf", "iq2_xs", importance)
    with contextlib.closing(Loaded(tmp_path / "model.iq2_xs.gguf", context_tokens=64)) as file:
        assert file.metadata("general.architecture") == "gemma3"
    assert (tmp_path / "model.iq2_xs.gguf").stat().st_size < (
        tiny_models.quantized() / "model.q4_k_m.gguf"
    ).stat().st_size


@pytest.mark.parametrize(
    ("types", "expected"),
    [(["Q4_K_M"], "f16"), (["BF16"], "bf16"), (["bf16", "F16"], "f16"), (["bf16", "q8_0"], "bf16")],
)
def test_all_types_are_made_of_one_16_bit_file(types, expected):
    assert gguf.source_kind(Gguf(types)) == expected


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["q4_k"], r"'q4_k' is no type of llama.cpp \(did you mean 'q4_k_[ms]'\?\)"),
        (["Q8"], r"'Q8' is no type of llama.cpp \(did you mean 'q8_0'\?\)"),
        (["int4"], r"'int4' is no type of llama.cpp"),
        ([], "expected one or more"),
        (["q8_0", "Q8_0"], "each once"),
    ],
)
def test_a_type_llama_cpp_does_not_know_is_refused_with_the_nearest(tmp_path, types, message):
    with pytest.raises(UserError, match=message):
        read_recipe(tiny_models.recipe(tmp_path, types=types))


def test_a_limit_in_the_recipe_stands_for_its_type_alone():
    assert gguf.limits(Gguf(["f16"], max_mean_kl={"Q8_0": 5.0})) == GGUF_TYPES | {"q8_0": 5.0}


def test_the_types_are_those_of_the_llama_cpp_in_use():
    import llama_cpp

    names = {name.removeprefix("LLAMA_FTYPE_") for name in dir(llama_cpp) if name.startswith("LLAMA_FTYPE_")}
    # "guessed" is no type of a file, and its quantizer does not make nvfp4.
    made = {name.removeprefix("MOSTLY_").removeprefix("ALL_").lower() for name in names} - {"guessed", "nvfp4"}
    assert set(GGUF_TYPES) == made


@pytest.mark.parametrize(
    ("ended", "allowed", "missed"), [(40, 0, False), (41, 0, False), (39, 0, True), (39, 1, False), (0, 39, True)]
)
def test_a_file_must_end_as_often_as_the_merged_model(ended, allowed, missed):
    file = {"mean_kl": 0.0, "max_mean_kl": 1.0, "ended": ended}
    lines = gguf.misses("q8_0", {"reference": {"ended": 40, "prompts": 40}, "files": {"q8_0": file}}, allowed)
    assert bool(lines) == missed


def test_a_divergence_that_is_no_number_is_a_miss():
    file = {"mean_kl": float("nan"), "max_mean_kl": 1.0, "ended": 1}
    assert gguf.misses("f16", {"reference": {"ended": 1, "prompts": 1}, "files": {"f16": file}}, 0)


@pytest.mark.parametrize(
    "name", ["microsoft/Phi-3-mini", "./models/Phi-3-mini", "./models/Phi-3-mini/", "/m/Phi-3-mini/"]
)
def test_a_file_calls_itself_by_the_bases_name_also_where_the_recipe_ends_it_with_a_slash(name):
    recipe = SimpleNamespace(model=SimpleNamespace(name=name), path=Path("recipes/own.toml"))
    assert gguf.name_of(recipe) == "Phi-3-mini own"
