"""The tokenizer of a GGUF file held against that of transformers."""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from stages.lib.ends import adds_bos, verify_end
from stages.lib.errors import UserError
from stages.lib.gguf.convert import HOME, run_converter
from stages.lib.gguf.library import LOG, llama_library, llama_said


def save_tokenizer(tokenizer: Any, base: Path, out: Path) -> Any:
    """Save `tokenizer` to `out` as any user reads it there; return it so read, by transformers' `AutoTokenizer`.

    With what transformers 5 drops and llama.cpp's converter looks for: the SentencePiece model of `base`; the class,
    because the converter knows Phi-4's vocabulary by "GPT2Tokenizer"; and whether BOS and EOS are added, without which
    the converter takes llama.cpp's own default. A class by which transformers makes another tokenizer than the one in
    tokenizer.json is not kept: SmolLM2's "GPT2Tokenizer" does not split numbers into digits.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(out)
    if base != out and (base / "tokenizer.model").is_file():
        shutil.copyfile(base / "tokenizer.model", out / "tokenizer.model")
    path = out / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    original = base / "tokenizer_config.json"
    stated = json.loads(original.read_text()).get("tokenizer_class") if original.is_file() else None
    if stated not in (None, "TokenizersBackend"):
        saved["tokenizer_class"] = stated
    elif saved["tokenizer_class"] == "TokenizersBackend":  # which transformers 4 does not know
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(
        saved.get("extra_special_tokens"), list
    ):  # on which transformers 4 fails: its word, which 5 reads too
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    plain = tokenizer("a")["input_ids"]
    saved["add_bos_token"] = adds_bos(tokenizer)
    saved["add_eos_token"] = tokenizer.eos_token_id is not None and plain[-1] == tokenizer.eos_token_id
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
    read = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    if not (differing := differences(read, tokenizer)):
        return read
    click.echo(
        f"{base}: transformers makes another tokenizer of tokenizer_class {saved['tokenizer_class']!r} than "
        f"tokenizer.json describes ({differing}); the one of tokenizer.json is trained and shipped",
        err=True,
    )
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n")
    read = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    if differing := differences(read, tokenizer):  # of model_type "qwen2", whatever class is stated
        reason = (
            f"{base}: beside this config.json transformers makes a {type(read).__name__} of every tokenizer, and "
            f"tokenizer.json describes another ({differing})"
        )
        if not reads_alike(read, tokenizer, PROBES):
            raise UserError(
                f"{reason}; the model would be asked with other tokens than trained. Use another base model"
            )
        click.echo(f"warning: {reason}; common texts give the same tokens", err=True)
    return read


def differences(read: Any, described: Any) -> str:
    """Return how transformers' tokenizer `read` differs from `described`, "" where it does not.

    By the parts of tokenizer.json, as no list of texts tries every rule. Where these are the same, what begins and ends
    a text, and the merges, are compared by the tokens of `PROBES` and `RARE`.
    """
    names = ("normalizer", "pre_tokenizer", "decoder", "model")
    if parts := [name for name in names if of(read, name) != of(described, name)]:
        return ", ".join(parts)
    return "" if reads_alike(read, described, (*PROBES, *RARE)) else "the tokens of a text"


def of(tokenizer: Any, name: str) -> Any:
    """Return a part of a tokenizer.json as JSON, None where it is empty; of the "model" its settings."""
    found = getattr(tokenizer.backend_tokenizer, name)
    if name == "model":
        return type(found).__name__, [getattr(found, setting, None) or None for setting in MODEL_SETTINGS]
    return json.loads(found.__getstate__()) if found is not None else None


def reads_alike(read: Any, described: Any, texts: Sequence[str]) -> bool:
    """Return whether two tokenizers make the same tokens of `texts`, at the beginning and after a turn."""
    texts = [*texts, *(f"{described.eos_token}{text}" for text in texts)]
    return read(texts)["input_ids"] == described(texts)["input_ids"]


def check_conversion(tokenizer: Any, base: Path, name: str) -> None:
    """Raise `UserError` unless llama.cpp's converter takes transformers' `tokenizer` and reads text as it does.

    `base` is the model's folder, of which config.json and the tokenizer's files are read and no weight; `name` is the
    base's in the recipe. Takes seconds, where the conversion at the end of a run would find the fault after training.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "model"
        copy.mkdir()
        shutil.copyfile(base / "config.json", copy / "config.json")
        saved = save_tokenizer(tokenizer, base, copy)
        vocabulary = Path(temporary) / "vocabulary.gguf"
        arguments = [str(copy), "--vocab-only", "--outfile", str(vocabulary), "--model-name", name]
        try:
            run_converter(arguments)
        except UserError as error:
            reason = error.message.split("\n", 1)[-1]
            if not (base / "tokenizer.model").is_file() and "tokenizer.model" in reason:
                raise UserError(
                    f"{base}: tokenizer.model is missing; llama.cpp's converter reads this model's vocabulary from it. "
                    f"Fetch that file of {name} into the folder"
                ) from error
            unknown = "pre-tokenizer was not recognized" in reason
            found = "its BPE pre-tokenizer is unknown to llama.cpp" if unknown else "llama.cpp can't convert it"
            raise UserError(
                f"{base}: {found}, so no GGUF could be made after training; expected a model that the converter in "
                f"{HOME} knows. Use another base model, or a llama-cpp-python whose llama.cpp knows this one (raise "
                f"its version in docker/*.in and lock again). The converter said:\n{reason}"
            ) from error
        with contextlib.closing(Vocabulary(vocabulary)) as file:
            for text in PROBES:
                tokens = saved(text, add_special_tokens=False)["input_ids"]
                verify_tokens(file, saved, text, tokens, str(base))
                if saved.chat_template:
                    verify_prompt(file, saved, [{"role": "user", "content": text}], str(base))
            if saved.chat_template:
                verify_end(saved, file.ends, f"{base}, as llama.cpp's converter reads it")


PROBES = (
    "What is 17 + 25?",
    "A pen costs $3.50, and 12 pens cost\nhow much?\n\nShow   every  step,   2  at a time.",
    "It's 1,234,567 - isn't it? They're 100% sure (x^2 = 4).",
    "Größe, naïve, Привет, 数学, ½ \u2212 3",
)
# Where tokenizers part that read `PROBES` alike: accents that can be composed, marks, runs of blanks and line breaks,
# contractions in capitals, full-width letters, digits of other scripts, an emoji of several characters.
RARE = (
    "e\u0301 A\u030a \ufb01 \uff21\uff22\u3000\uff11", "\u0e19\u0e49\u0e33 \u0915\u094d\u0937 \u0661\u0662\u0663",
    "\t\tx\r\n\r\n  y \n \u00a0z   ", "IT'S WE'LL 12345678 a1b22c333", "\U0001f469\u200d\U0001f4bb!!! ...###",
)  # fmt: skip
MODEL_SETTINGS = (
    "byte_fallback", "continuing_subword_prefix", "dropout", "end_of_word_suffix", "fuse_unk", "ignore_merges",
    "unk_token",
)  # fmt: skip


def verify_prompt(file: "Vocabulary", tokenizer: Any, messages: Sequence[dict[str, str]], where: str) -> None:
    """Raise `UserError` unless `file` prompts with the very tokens of the chat template in transformers, with one BOS.

    By both ways a program may go: the file's own template as it stands (llama-cpp-python), and, where the file's
    settings add BOS, the text without it (llama-server, Ollama). BOS is wanted where the tokenizer puts it before plain
    text, or else where the template writes it.
    """
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    bos = tokenizer.bos_token_id
    wanted = 1 if adds_bos(tokenizer) or expected[0] == bos else 0
    found = len(list(itertools.takewhile(lambda token: token == bos, expected)))
    if found != wanted:
        cause = "doubled" if found > wanted else "missing"
        raise UserError(
            f"{where}: BOS is {cause}: the prompt begins with {found} {tokenizer.bos_token!r}; expected {wanted}, as "
            f"the tokenizer and Ollama begin a plain text. Mend the chat template"
        )
    text = file.render(messages)
    verify_tokens(file, tokenizer, text, expected, where)
    served = file.tokenize(text.removeprefix(file.text_of(file.bos) if file.adds_bos else ""), add_special=True)
    if served != expected:
        raise UserError(
            f"{where}: tokenizer.ggml.add_bos_token is {str(file.adds_bos).lower()}, and the chat template's prompt "
            f"has {found} BOS, so llama-server and Ollama would not read it as trained: "
            f"{first_difference(expected, served, tokenizer)}"
        )


def verify_tokens(file: "Vocabulary", tokenizer: Any, text: str, expected: list[int], where: str) -> None:
    """Raise `UserError` unless `file` reads `text` as the tokens `expected`, which transformers' `tokenizer` made."""
    found = file.tokenize(text)
    if found != expected:
        raise UserError(
            f"{where}: transformers and llama.cpp read the same text as different tokens (a shifted id, another "
            f"pre-tokenizer or another chat template): {first_difference(expected, found, tokenizer)}. The model would "
            f"be trained in the one and asked in the other. Run make merge gguf again, or use another base model"
        )


def first_difference(ours: Sequence[int], theirs: Sequence[int], tokenizer: Any) -> str:
    """Say where two lists of token ids part; `tokenizer` is transformers'."""
    differing = (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    shared = next(differing, min(len(ours), len(theirs)))

    def shown(tokens: Sequence[int]) -> str:
        if shared >= len(tokens):
            return "the end"
        return f"{tokens[shared]} ({tokenizer.convert_ids_to_tokens(tokens[shared])!r})"

    return f"at token {shared}, transformers has {shown(ours)} and the GGUF {shown(theirs)}"


class Vocabulary:
    """The tokenizer and metadata of a GGUF file, as llama.cpp reads them."""

    def __init__(self, path: Path, *, with_weights: bool = False) -> None:
        """Load `path`. Raises `UserError` with llama.cpp's reason when it can't be loaded, as a truncated file."""
        self.llama_cpp = llama_library()
        parameters = self.llama_cpp.llama_model_default_params()
        parameters.vocab_only = not with_weights
        parameters.n_gpu_layers = 0  # the CPU's arithmetic is the one compared, on every machine
        LOG.clear()
        self.path = path
        self.model = self.llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.model:
            cause = "a file cut short, as by a full disk, reads like this. Delete it and run: make gguf"
            if "check_tensor_dims" in llama_said():
                cause = (
                    "the file is whole, and llama.cpp expects other tensors of this model than its converter wrote. "
                    "Use another base model, or a newer llama-cpp-python"
                )
            raise UserError(
                f"{path}: llama.cpp can't load it ({path.stat().st_size:,} bytes); {cause}. llama.cpp said:\n"
                f"{llama_said()}"
            )
        self.vocabulary = self.llama_cpp.llama_model_get_vocab(self.model)
        self.size = self.llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def close(self) -> None:
        """Free the model; without this llama.cpp keeps its memory until the process ends."""
        self.llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the ids of `text`, control tokens in it read as such; `add_special` adds what the file asks for."""
        data = text.encode()
        room = len(data) + 8
        tokens = (self.llama_cpp.llama_token * room)()
        count = self.llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, room, add_special, True)
        if count < 0:
            raise ValueError(f"llama.cpp made {-count} tokens of {len(data)} bytes")
        return list(tokens[:count])

    def text_of(self, token: int) -> str:
        """Return a token as the vocabulary writes it; "" for -1, which stands for none."""
        return "" if token < 0 else self.llama_cpp.llama_vocab_get_text(self.vocabulary, token).decode()

    @property
    def bos(self) -> int:
        """The id of the token that begins a text; -1 where the file names none."""
        return self.llama_cpp.llama_vocab_bos(self.vocabulary)

    @property
    def adds_bos(self) -> bool:
        """Whether the file asks for BOS before every text."""
        return self.llama_cpp.llama_vocab_get_add_bos(self.vocabulary)

    @functools.cached_property
    def ends(self) -> list[int]:
        """The ids of the tokens at which llama.cpp, and so Ollama, ends a generation."""
        return [token for token in range(self.size) if self.llama_cpp.llama_vocab_is_eog(self.vocabulary, token)]

    def metadata(self, key: str) -> str:
        """Return a scalar of the file's metadata as text, its first 1,023 bytes. Raises `KeyError` if it has none."""
        buffer = ctypes.create_string_buffer(1024)
        if self.llama_cpp.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer)) < 0:
            raise KeyError(key)
        return buffer.value.decode()

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the prompt that the file's own chat template makes of `messages`, as llama-cpp-python renders it.

        Raises `UserError` when the file has no template.
        """
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.llama_cpp.llama_model_chat_template(self.model, None)
        if template is None:
            raise UserError(f"{self.path}: holds no chat template; expected the tokenizer's. Run: make merge gguf")
        eos = self.text_of(self.llama_cpp.llama_vocab_eos(self.vocabulary))
        formatter = Jinja2ChatFormatter(template=template.decode(), eos_token=eos, bos_token=self.text_of(self.bos))
        return formatter(messages=list(messages)).prompt
