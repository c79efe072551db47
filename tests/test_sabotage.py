"""What goes wrong on the way from adapter to GGUF, done on purpose: a gate catches each and names the cause."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import gguf, merge
from stages.lib.artifact.folder import Run
from stages.lib.errors import UserError
from stages.lib.gguf.file import Loaded
from stages.lib.model import fold
from stages.lib.model.files import refuse_quantized, weight_shapes
from stages.lib.recipe.tables import Gguf, Merge
from tests.support import micro, tiny_models

pytestmark = pytest.mark.torch


def base() -> Path:
    return tiny_models.made() / "base-model" / "model"


def grpo() -> Path:
    return tiny_models.made() / "grpo"


def copy_of_merged(to: Path) -> Path:
    return Path(shutil.copytree(tiny_models.merged() / "model", to / "model"))


def merge_gate(merged: Path, scratch: Path, trained: Path | None = None) -> None:
    merge.verify(base(), trained or grpo(), merged, tiny_models.rows(6, seed=5), Merge("float16", prompts=6), scratch)


def gguf_gate(merged: Path, folder: Path) -> None:
    recipe = SimpleNamespace(
        path=Path("tiny.toml"),
        model=SimpleNamespace(name="base-model"),
        format=SimpleNamespace(name="xml"),
        infer=SimpleNamespace(max_completion_tokens=4),
        gguf=Gguf(["f16"], prompts=2),
    )
    run = Run(folder / "gguf")
    run.checkpoints.mkdir(parents=True)
    gguf.prove(merged, gguf.make_files(merged, merged, recipe, run), tiny_models.rows(2, seed=5), recipe, run)


def lora_gate(folder: Path, lora: Path) -> None:
    """Hold the base with the adapter in `lora`, both as GGUF files, against the model merged from the right one."""
    recipe = SimpleNamespace(
        path=Path("tiny.toml"),
        model=SimpleNamespace(name="base-model"),
        format=SimpleNamespace(name="xml"),
        infer=SimpleNamespace(max_completion_tokens=4),
        gguf=Gguf(["f16"], prompts=2),
        merge=Merge("float16"),
    )
    run = Run(folder / "gguf")
    run.checkpoints.mkdir(parents=True)
    model = tiny_models.merged() / "model"
    paths, files = gguf.make_files(model, model, recipe, run), gguf.make_adapter(base(), lora, recipe, run)
    gguf.prove(model, paths, tiny_models.rows(2, seed=5), recipe, run, files)


def test_the_adapter_that_was_merged_passes_as_a_file_of_its_own(tmp_path):
    lora_gate(tmp_path, grpo() / "adapter")


def test_a_lora_file_that_is_not_applied_is_caught(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    lora = Path(shutil.copytree(grpo() / "adapter", tmp_path / "adapter"))
    weights = load_file(lora / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, lora / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora: mean KL .* of the base with adapter-f16.gguf .* another base"):
        lora_gate(tmp_path, lora)


@pytest.mark.parametrize("change", [{"lora_alpha": 32}, {"use_rslora": True, "lora_alpha": 16 / 8**0.5}])
def test_a_lora_file_of_another_scale_is_caught(tmp_path, change):
    lora = Path(shutil.copytree(grpo() / "adapter", tmp_path / "adapter"))
    edit_json(lora / "adapter_config.json", **change)
    with pytest.raises(UserError, match=r"lora: mean KL .* a scale other than lora_alpha / r"):
        lora_gate(tmp_path, lora)


def test_an_adapter_on_a_tied_output_layer_is_no_lora_file(tmp_path):
    from safetensors.torch import load_file, save_file

    lora = Path(shutil.copytree(grpo() / "adapter", tmp_path / "adapter"))
    weights = load_file(lora / "adapter_model.safetensors")
    taken = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    stem = "base_model.model.lm_head.lora_{}.weight"
    weights[stem.format("A")] = weights[taken.format("A")].clone()
    weights[stem.format("B")] = weights[taken.format("B")].repeat(2, 1)[:384]
    save_file(weights, lora / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"LoRA tensor 'output.weight' does not exist in base model"):
        lora_gate(tmp_path, lora)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_as_merged(model, folder: Path) -> Path:
    import torch

    shutil.copytree(tiny_models.merged() / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.to(torch.float16).save_pretrained(folder)
    return folder


def test_nothing_wrong_passes_both_gates(tmp_path):
    merged = copy_of_merged(tmp_path)
    merge_gate(merged, tmp_path)
    gguf_gate(merged, tmp_path)


def test_an_adapter_not_applied_is_caught(tmp_path):
    from transformers import AutoModelForCausalLM

    merged = save_as_merged(AutoModelForCausalLM.from_pretrained(base()), tmp_path / "model")
    with pytest.raises(UserError, match="Cause: the adapter was not applied: merged equals the base"):
        merge_gate(merged, tmp_path)


def test_an_adapter_applied_twice_is_caught(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base())
    for _ in range(2):
        model = PeftModel.from_pretrained(model, grpo() / "adapter").merge_and_unload()
    with pytest.raises(UserError, match="Cause: the adapter was applied twice"):
        merge_gate(save_as_merged(model, tmp_path / "model"), tmp_path)


def test_another_models_weights_are_caught(tmp_path):
    from safetensors.torch import load_file, save_file

    merged = copy_of_merged(tmp_path)
    tensors = load_file(merged / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].flip(0)}, merged / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is not the trained model: mean KL .* Cause: unknown; likely"):
        merge_gate(merged, tmp_path)


def test_weights_that_are_not_numbers_are_caught(tmp_path):
    from safetensors.torch import load_file, save_file

    merged = copy_of_merged(tmp_path)
    tensors = load_file(merged / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the trained model: mean KL nan"):
        merge_gate(merged, tmp_path)


def test_an_output_layer_of_its_own_where_the_base_ties_it_is_caught(tmp_path):
    from safetensors.torch import load_file, save_file

    merged = copy_of_merged(tmp_path)
    tensors = load_file(merged / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"Cause: tied embeddings broken: .* output layer of its own"):
        merge_gate(merged, tmp_path)


def test_a_config_that_unties_the_embeddings_is_caught(tmp_path):
    merged = copy_of_merged(tmp_path)
    edit_json(merged / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match="Cause: tied embeddings broken"):
        merge_gate(merged, tmp_path)


def test_an_adapter_on_one_use_of_a_tied_embedding_is_caught(tmp_path):
    tiny_models.adapter(base(), tmp_path / "grpo", target_modules=["q_proj", "embed_tokens"])
    fold.fold(base(), tmp_path / "grpo", "float16", tmp_path / "model")
    with pytest.raises(UserError, match="Cause: tied embeddings broken: the adapter changes embed_tokens"):
        merge_gate(tmp_path / "model", tmp_path, tmp_path / "grpo")


def test_a_shifted_id_in_the_trained_tokenizer_is_caught(tmp_path):
    merged = copy_of_merged(tmp_path)
    content = json.loads((merged / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["reasoning"], ids["answer"] = ids["answer"], ids["reasoning"]
    (merged / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its tokenizer has a shifted id: '(reasoning|answer)' is"):
        merge_gate(merged, tmp_path)


def with_pieces_exchanged(tmp_path, first, second):
    """Return a copy of the merged model in whose tokenizer.model two pieces have each other's id."""
    from sentencepiece import sentencepiece_model_pb2

    merged = copy_of_merged(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString((merged / "tokenizer.model").read_bytes())
    numbers = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    one, other = proto.pieces[numbers[first]], proto.pieces[numbers[second]]
    one.piece, other.piece = other.piece, one.piece
    (merged / "tokenizer.model").write_bytes(proto.SerializeToString())
    return merged


def test_a_shifted_id_in_the_ggufs_tokenizer_is_caught(tmp_path):
    merged = with_pieces_exchanged(tmp_path, "What", "Think")
    with pytest.raises(
        UserError, match=r"different tokens \(a shifted id.*at token \d+, transformers has \d+ \('Think'\)"
    ):
        gguf_gate(merged, tmp_path)


def test_a_shifted_id_is_caught_on_a_problem_that_is_not_compared(tmp_path):
    merged = with_pieces_exchanged(tmp_path, "8", "9")
    run = Run(tmp_path / "gguf")
    run.checkpoints.mkdir(parents=True)
    recipe = SimpleNamespace(path=Path("t.toml"), model=SimpleNamespace(name="base-model"), gguf=Gguf(["f16"]))
    path = gguf.make_files(merged, merged, recipe, run)["f16"]
    without, holding = (
        {"id": question, "prompt": [{"role": "user", "content": question}]} for question in ("What is 1?", "What is 8?")
    )
    gguf.check_tokens(path, merged, [without], run)
    with pytest.raises(UserError, match=r"problem What is 8\?: .* different tokens \(a shifted id"):
        gguf.check_tokens(path, merged, [without, holding], run)


def test_a_doubled_bos_is_caught(tmp_path):
    merged = copy_of_merged(tmp_path)
    template = merged / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    with pytest.raises(UserError, match="BOS is doubled: the prompt begins with 2 '<bos>'; expected 1"):
        gguf_gate(merged, tmp_path)


def test_a_missing_bos_is_caught(tmp_path):
    merged = copy_of_merged(tmp_path)
    template = merged / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", ""))
    with pytest.raises(
        UserError, match=r"BOS is missing: the prompt begins with 0 '<bos>'; expected 1, as the tokenizer and Ollama"
    ):
        gguf_gate(merged, tmp_path)


def test_a_file_that_adds_a_bos_the_model_was_trained_without_is_caught(tmp_path):
    merged = copy_of_merged(tmp_path)
    template = merged / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", ""))
    edit_json(merged / "tokenizer.json", post_processor=None)
    settings = json.loads((merged / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]  # as transformers 5 saves it: the converter then takes llama.cpp's own default
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (merged / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="add_bos_token is true, and the chat template's prompt has 0 BOS"):
        gguf_gate(merged, tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "4-bit bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "4-bit gptq"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_q4_k_m_of_a_merge_in_few_bits_is_refused_by_name(tmp_path, settings, named):
    shutil.copytree(tiny_models.merged(), tmp_path / "merge")
    edit_json(tmp_path / "merge" / "model" / "config.json", quantization_config=settings)
    micro.restate(tmp_path / "merge", "model/config.json")
    recipe = tiny_models.recipe(tmp_path, types=["q8_0", "q4_k_m"])
    result = tiny_models.run_stage("gguf", recipe, tmp_path / "gguf", "merge", "prepare-data", "grpo", "base-model")
    assert (result.exit_code, f"its weights are {named}" in result.output) == (1, True), result.output
    assert not list(tmp_path.rglob("*.gguf"))


def test_weights_packed_in_bytes_are_refused_whatever_the_config_says(tmp_path):
    import torch
    from safetensors.torch import save_file

    shutil.copyfile(base() / "config.json", tmp_path / "config.json")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"its weights are quantized \(U8\); gguf needs the 16-bit model"):
        refuse_quantized(tmp_path, "gguf")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_gguf_is_caught(tmp_path, kept):
    whole = (tiny_models.quantized() / "model.q4_k_m.gguf").read_bytes()
    path = tmp_path / "model.q4_k_m.gguf"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"llama.cpp can't load it \([\d,]+ bytes\); a file cut short"):
        Loaded(path, context_tokens=64)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_safetensors_are_caught(tmp_path, kept):
    whole = (tiny_models.merged() / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match="is cut short"):
        weight_shapes(tmp_path)


@pytest.mark.parametrize("ends", [None, 1, [1]])
def test_a_missing_stop_token_is_caught_by_both_gates(tmp_path, ends):
    merged = copy_of_merged(tmp_path)
    edit_json(merged / "generation_config.json", eos_token_id=ends)
    message = r"generation_config.json: a stop token is missing: .*'<end_of_turn>' \(5\)"
    with pytest.raises(UserError, match=message):
        merge_gate(merged, tmp_path)
    if ends is not None:
        with pytest.raises(UserError, match=message):
            gguf_gate(merged, tmp_path)


def test_a_file_with_other_tensors_than_llama_cpp_expects_is_not_said_to_be_cut_short(tmp_path):
    data = bytearray((tiny_models.quantized() / "model.q4_k_m.gguf").read_bytes())
    key = b"gemma3.block_count"
    at = data.index(key) + len(key) + 4  # after the type of its value
    data[at] += 1
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"the file is whole, and llama.cpp expects other tensors(.|\n)*check_tensor_dims"
    ):
        Loaded(path, context_tokens=64)
