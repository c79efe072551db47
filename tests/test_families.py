"""Every family of the recipes, with a real vocabulary and chat template, goes through merge, gguf and the gates.

The networks are small and their weights random: what is tested is that tensors, tokens and templates arrive.
"""

from pathlib import Path

import pytest

from stages.lib.errors import UserError
from stages.lib.gguf.tokens import check_conversion
from tests.support import family_models, tiny_models

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", family_models.FAMILIES)
def test_the_family_goes_through_merge_and_gguf_and_their_gates(tmp_path, name):
    gate, files = family_models.through(name, tmp_path, ["f16", "q4_k_m"], prompts=3, positions=16)
    assert gate["merged_mean_kl"] < 1e-4 < gate["base_mean_kl"]
    assert files["f16"]["mean_kl"] < 1e-5
    assert files["f16"]["same_top"] > 0.95  # random weights have near ties
    assert files["f16"]["mean_kl"] < files["q4_k_m"]["mean_kl"] < 0.1
    assert files["lora"]["mean_kl"] < 1e-4 < gate["base_mean_kl"]


def test_an_unknown_bpe_pre_tokenizer_is_refused_before_training_with_a_remedy(tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[aeiou]+|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["What is 17 + 25?"], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<e>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=512, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"BPE pre-tokenizer is unknown to llama.cpp.* Use another base model, or a llama"
    ):
        check_conversion(tokenizer, tmp_path, "unknown")


def test_an_architecture_llama_cpp_does_not_know_is_refused_before_training(tmp_path):
    made = tiny_models.made()
    (tmp_path / "config.json").write_text('{"architectures": ["UnheardOfForCausalLM"], "vocab_size": 384}')
    with pytest.raises(UserError, match=r"llama.cpp can't convert it(.|\n)*UnheardOfForCausalLM is not supported"):
        check_conversion(tokenizer_of(made / "grpo" / "tokenizer"), tmp_path, "unheard-of")


def test_a_known_tokenizer_passes_the_check_before_training():
    made = tiny_models.made()
    check_conversion(tokenizer_of(made / "grpo" / "tokenizer"), made / "base-model" / "model", "base-model")


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
