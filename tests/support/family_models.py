"""One small random-weight model for each family of the recipes, with a real vocabulary and a real chat template.

The vocabularies and templates are those in llama-cpp-python's sdist (`make setup` unpacks them). It has none of
Gemma 3, Phi-4 and SmolLM2: these get Llama 2's SentencePiece pieces, Qwen2's byte-level BPE and StarCoder's.
"""

import functools
import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stages import gguf, merge
from stages.lib.artifact.folder import Run
from stages.lib.model import fold
from stages.lib.model.template import write_choices
from stages.lib.recipe.tables import Gguf, Merge
from tests.support import chat_templates, tiny_models

MODELS = Path(sys.prefix) / "llama.cpp" / "models"
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.04,
}  # fmt: skip
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
CONTROL, USER_DEFINED = 3, 4
RENAMED = {"<fim_prefix>": "<|im_start|>", "<fim_middle>": "<|im_end|>"}  # StarCoder's, in SmolLM2's places


Writer = Callable[[Path, str, str], None]  # of a tokenizer to a folder, with a template and the end of a turn


@dataclass(frozen=True)
class Family:
    """How one family's model is put together; `name` is what the base is called, which llama.cpp looks at."""

    name: str
    network: str
    tokenizer: Writer
    template: str
    end: str
    settings: dict[str, Any] = field(default_factory=dict)
    system: bool = True


@functools.cache
def vocabulary(name: str) -> dict[str, Any]:
    """Return the metadata of one of llama.cpp's vocabulary files, by key (GGUF v3, docs/gguf.md of ggml)."""
    data = (MODELS / f"ggml-vocab-{name}.gguf").read_bytes()
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    at = 24

    def text() -> str:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        return data[at - length : at].decode()

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            return [value(inner) for _ in range(count)]
        (found,) = struct.unpack_from("<" + scalars[kind], data, at)
        at += struct.calcsize("<" + scalars[kind])
        return found

    found = {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        key = text()
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        found[key] = value(kind)
    return found


def byte_level(source: str, split: str | None, bos: str | None, tokenizer_class: str) -> Writer:
    """Return a function that writes a byte-level BPE tokenizer, with llama.cpp's vocabulary `source`, to a folder.

    It adds `bos` to a plain text. With no `split` it splits as GPT-2 does, and numbers into digits.
    """

    def write(folder: Path, template: str, end: str) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        known = vocabulary(source)
        tokens = [RENAMED.get(token, token) for token in known["tokenizer.ggml.tokens"]]
        if end not in tokens:
            tokens[next(tokens.index(other) for other in ("<|im_end|>", "<|eot_id|>") if other in tokens)] = end
        kinds = known["tokenizer.ggml.token_type"]
        merges = [tuple(pair.split(" ")) for pair in known["tokenizer.ggml.merges"]]
        ids = {token: number for number, token in enumerate(tokens)}
        core = Tokenizer(models.BPE(ids, merges, ignore_merges=bos is not None))
        core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]) if split else pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
        if tokenizer_class == "Qwen2Tokenizer":
            core.normalizer = normalizers.NFC()
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(
            [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
        )
        core.post_processor = processors.ByteLevel(trim_offsets=False)
        if bos:
            core.post_processor = processors.Sequence([
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
                ),
            ])  # fmt: skip
        made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=end, pad_token=end)
        # As the stages load it: with a fixed date.
        made.chat_template = write_choices(chat_template(template), {}, made.special_tokens_map)
        made.save_pretrained(folder)
        set_class(folder, tokenizer_class)

    return write


def smollm2(folder: Path, template: str, end: str) -> None:
    """Write a tokenizer like SmolLM2's: class GPT2Tokenizer, digits split, a turn marker as bos_token."""
    byte_level("starcoder", None, None, "GPT2Tokenizer")(folder, template, end)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|im_start|>"}))


def sentencepiece(source: str, control: list[str], class_settings: dict[str, Any]) -> Writer:
    """Return a function that writes a SentencePiece tokenizer, with llama.cpp's vocabulary `source`, to a folder.

    The tokens in `control` follow the vocabulary's own pieces.
    """

    def write(folder: Path, template: str, end: str) -> None:
        from sentencepiece import sentencepiece_model_pb2
        from transformers import AutoTokenizer

        known = vocabulary(source)
        pieces = zip(
            known["tokenizer.ggml.tokens"],
            known["tokenizer.ggml.scores"],
            known["tokenizer.ggml.token_type"],
            strict=True,
        )
        proto = sentencepiece_model_pb2.ModelProto()
        for token, score, kind in list(pieces)[:32000]:
            kind = {"<unk>": 2, "<s>": 3, "</s>": 3}.get(token, kind)
            proto.pieces.add(piece=token, score=score, type=kind)
        if "gemma" in class_settings["tokenizer_class"].lower():
            for token in control:
                proto.pieces.add(piece=token, score=0.0, type=3)
        proto.trainer_spec.model_type = 2  # BPE
        proto.trainer_spec.byte_fallback = True
        proto.trainer_spec.vocab_size = len(proto.pieces)
        proto.trainer_spec.bos_id, proto.trainer_spec.eos_id, proto.trainer_spec.pad_id = 1, 2, -1
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = "gemma" not in class_settings["tokenizer_class"].lower()
        proto.normalizer_spec.remove_extra_whitespaces = False
        (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
        (folder / "tokenizer_config.json").write_text(json.dumps(class_settings))
        made = AutoTokenizer.from_pretrained(folder)
        made.chat_template = chat_template(template)
        made.save_pretrained(folder)
        order_merges(
            folder / "tokenizer.json",
            dict(zip(known["tokenizer.ggml.tokens"], known["tokenizer.ggml.scores"], strict=True)),
        )
        set_class(folder, class_settings["tokenizer_class"])

    return write


def order_merges(path: Path, scores: dict[str, float]) -> None:
    """Put the merges of a tokenizer.json made from SentencePiece in the order of their scores, as on the hub.

    transformers 5 takes the order of the ids, and Llama's piece of two blanks is early in that and last by score.
    """
    content = json.loads(path.read_text())
    content["model"]["merges"].sort(key=lambda pair: -scores["".join(pair)])
    path.write_text(json.dumps(content, ensure_ascii=False))


def set_class(folder: Path, tokenizer_class: str) -> None:
    """State the class that the family's tokenizer_config.json on the hub states."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))


def chat_template(name: str) -> str:
    """Return one of llama.cpp's chat templates, or one of `chat_templates.MADE`."""
    return chat_templates.MADE.get(name) or (MODELS / "templates" / f"{name}.jinja").read_text()


def added(token: str, number: int, *, rstrip: bool) -> tuple[str, dict[str, Any]]:
    """Return an entry of added_tokens_decoder for a control token."""
    flags = {"lstrip": False, "normalized": False, "rstrip": rstrip, "single_word": False, "special": True}
    return str(number), {"content": token, **flags}


PHI3_CONTROL = [
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
]  # fmt: skip
PHI3 = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "legacy": True,
    "bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>",
    "added_tokens_decoder": dict(
        added(token, 32000 + n, rstrip=token != "<|endoftext|>") for n, token in enumerate(PHI3_CONTROL)
    ),
}  # fmt: skip
GEMMA3 = {
    "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False,
    "bos_token": "<s>", "eos_token": "<end_of_turn>", "pad_token": "</s>", "unk_token": "<unk>",
}  # fmt: skip
FAMILIES = {
    "qwen2.5": Family(
        "Qwen2.5-3B-Instruct", "Qwen2", byte_level("qwen2", QWEN_SPLIT, None, "Qwen2Tokenizer"),
        "Qwen-Qwen2.5-7B-Instruct", "<|im_end|>", {"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "Qwen3-1.7B", "Qwen3", byte_level("qwen2", QWEN_SPLIT, None, "Qwen2Tokenizer"), "Qwen-Qwen3-0.6B",
        "<|im_end|>", {"tie_word_embeddings": True, "head_dim": 64},
    ),
    "llama3.1": Family(
        "Llama-3.1-8B-Instruct", "Llama",
        byte_level("llama-bpe", LLAMA_SPLIT, "<|begin_of_text|>", "PreTrainedTokenizerFast"),
        "meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>", {"tie_word_embeddings": False},
    ),
    "gemma3": Family(
        "gemma-3-1b-it", "Gemma3Text", sentencepiece("llama-spm", ["<start_of_turn>", "<end_of_turn>"], GEMMA3),
        "gemma-3", "<end_of_turn>", {"tie_word_embeddings": True, "head_dim": 64, "query_pre_attn_scalar": 64},
    ),
    "phi3": Family(
        "Phi-3-mini-4k-instruct", "Phi3", sentencepiece("phi-3", PHI3_CONTROL, PHI3), "microsoft-Phi-3.5-mini-instruct",
        "<|end|>", {"tie_word_embeddings": False, "pad_token_id": 32000},
    ),
    "smollm2": Family(
        "SmolLM2-135M-Instruct", "Llama", smollm2, "SmolLM2", "<|im_end|>", {"tie_word_embeddings": True}
    ),
    "phi4": Family(
        "phi-4", "Phi3", byte_level("qwen2", QWEN_SPLIT, None, "GPT2Tokenizer"), "Qwen-Qwen2.5-7B-Instruct",
        "<|im_end|>", {"tie_word_embeddings": False, "pad_token_id": 151645},
    ),
}  # fmt: skip


def base(family: Family, folder: Path, **sizes: int) -> Path:
    """Write a random-weight base model of `family` to `folder`; `sizes` stand for some of `SIZES`."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    family.tokenizer(folder, family.template, family.end)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(family.end)
    rows = -(-len(tokenizer) // 64) * 64  # embeddings are padded, as published models' are
    config = getattr(transformers, f"{family.network}Config")(
        **{
            **SIZES,
            "vocab_size": rows,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end,
            **family.settings,
            **sizes,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.network.removesuffix('Text')}ForCausalLM")(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=end)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def through(name: str, folder: Path, types: list[str], prompts: int, positions: int) -> tuple[dict, dict]:
    """Take a family's model through merge, gguf and their gates in `folder`; return the figures of both.

    Those of the files are by type, and "lora" for the adapter's. Raises `UserError` when a gate does not pass.
    """
    family = FAMILIES[name]
    base_folder = base(family, folder / "base")
    grpo = tiny_models.adapter(base_folder, folder / "grpo", steps=0, init_lora_weights=False, r=4)
    merged, run = folder / "merge" / "model", Run(folder / "gguf")
    run.checkpoints.mkdir(parents=True)
    rows = tiny_models.rows(prompts, seed=7)

    fold.fold(base_folder, grpo, "bfloat16", merged)
    knobs = Merge("bfloat16", prompts=prompts, positions_per_prompt=positions)
    gate = merge.verify(base_folder, grpo, merged, rows, knobs, run.checkpoints)
    recipe = SimpleNamespace(
        path=Path("family.toml"),
        model=SimpleNamespace(name=f"someone/{family.name}"),
        format=SimpleNamespace(name="xml"),
        infer=SimpleNamespace(max_completion_tokens=4),
        gguf=Gguf(types, prompts=prompts, positions_per_prompt=positions),
        merge=knobs,
    )
    paths = gguf.make_files(merged, merged, recipe, run)
    adapter = gguf.make_adapter(base_folder, grpo / "adapter", recipe, run)
    figures = gguf.prove(merged, paths, rows, recipe, run, adapter)
    return gate, figures["files"] | {"lora": figures["lora"]}
