"""llama.cpp: its converter and quantizer, and a GGUF file at work.

The converter is llama.cpp's own Python program out of the sdist that llama-cpp-python was compiled from, so that the
two always agree; `make setup` puts it under `sys.prefix`. Everything else is llama-cpp-python's binding of `llama.h`:
no binary on PATH, no network.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from stages.lib.errors import UserError
from stages.lib.parity import Text

if TYPE_CHECKING:
    import numpy as np

HOME = Path(sys.prefix) / "llama.cpp"
BATCH_TOKENS = 256  # a decode call; with a row of logits each it is 156 MB at a vocabulary of 152k
SMALL_BYTES = 50_000_000
CGROUP = Path("/sys/fs/cgroup")
LOG: deque[str] = deque(maxlen=200)  # what llama.cpp said last, for the message when it fails


def convert(model: Path, out: Path, kind: str, name: str, log: Path) -> None:
    """Convert the safetensors model in the folder `model` to the GGUF file `out` of `kind`, "f16" or "bf16".

    `name` is what the file calls itself (general.name). The converter's output goes to the file `log`. Raises
    `UserError` with its last lines when it fails.
    """
    run_converter([str(model), "--outfile", str(out), "--outtype", kind, "--model-name", name], log)


def convert_lora(adapter: Path, base: Path, out: Path, log: Path) -> None:
    """Convert the PEFT adapter in the folder `adapter`, of the model in the folder `base`, to the GGUF file `out`.

    Its matrices are stored as float16. The converter's output goes to the file `log`. Raises `UserError` with its last
    lines when it fails.
    """
    arguments = [str(adapter), "--base", str(base), "--outfile", str(out), "--outtype", "f16"]
    run_converter(arguments, log, "convert_lora_to_gguf.py")


def run_converter(arguments: list[str], log: Path, name: str = "convert_hf_to_gguf.py") -> None:
    """Run llama.cpp's converter with `arguments`. Raises `UserError` with the end of its output when it fails."""
    program = HOME / name
    if not program.is_file():
        raise UserError(f"{program}: llama.cpp's converter is not installed. Run: make setup")
    # A clean path: on ours, a gguf.py would shadow the converter's gguf package.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSTARTUP")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=kept | offline, check=False,
        )  # fmt: skip
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()[-12:]
        raise UserError(f"{arguments[0]}: llama.cpp's converter failed ({done.returncode}):\n  " + "\n  ".join(lines))


def save_tokenizer(tokenizer: Any, base: Path, out: Path) -> None:
    """Save `tokenizer` to `out` with what transformers 5 drops and llama.cpp's converter looks for.

    That is the SentencePiece model of `base`; the class, because the converter knows Phi-4's vocabulary by
    "GPT2Tokenizer"; and whether BOS and EOS are added, without which the converter takes llama.cpp's own default.
    """
    tokenizer.save_pretrained(out)
    if base != out and (base / "tokenizer.model").is_file():
        shutil.copyfile(base / "tokenizer.model", out / "tokenizer.model")
    path = out / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    original = base / "tokenizer_config.json"
    if original.is_file() and "tokenizer_class" in (stated := json.loads(original.read_text())):
        saved["tokenizer_class"] = stated["tokenizer_class"]
    plain = tokenizer("a")["input_ids"]
    saved["add_bos_token"] = adds_bos(tokenizer)
    saved["add_eos_token"] = tokenizer.eos_token_id is not None and plain[-1] == tokenizer.eos_token_id
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n")


def adds_bos(tokenizer: Any) -> bool:
    """Say whether transformers' `tokenizer` puts BOS before a plain text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def check_tokenizer(tokenizer: Any, base: Path, name: str) -> None:
    """Raise `UserError` unless llama.cpp's converter takes transformers' `tokenizer` and reads text as it does.

    `base` is the model's folder, of which config.json and the tokenizer's files are read and no weight; `name` is the
    base's in the recipe. Takes seconds, where the conversion at the end of a run would find the fault after training.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "model"
        save_tokenizer(tokenizer, base, copy)
        shutil.copyfile(base / "config.json", copy / "config.json")
        vocabulary = Path(temporary) / "vocabulary.gguf"
        arguments = [str(copy), "--vocab-only", "--outfile", str(vocabulary), "--model-name", name]
        try:
            run_converter(arguments, Path(temporary) / "log")
        except UserError as error:
            reason = error.message.split("\n", 1)[-1]
            unknown = "pre-tokenizer was not recognized" in reason
            found = "its BPE pre-tokenizer is unknown to llama.cpp" if unknown else "llama.cpp can't convert it"
            raise UserError(
                f"{base}: {found}, so no GGUF could be made after training; expected a model that the converter in "
                f"{HOME} knows. Use another base model, or a llama-cpp-python whose llama.cpp knows this one (raise "
                f"its version in docker/*.in and lock again). The converter said:\n{reason}"
            ) from error
        saved = AutoTokenizer.from_pretrained(copy, trust_remote_code=False)
        with contextlib.closing(Vocabulary(vocabulary)) as file:
            for text in PROBES:
                tokens = saved(text, add_special_tokens=False)["input_ids"]
                verify_tokens(file, saved, text, tokens, str(base))
                if saved.chat_template:
                    verify_prompt(file, saved, [{"role": "user", "content": text}], str(base))
            if saved.chat_template:
                ends = [token for token in range(file.size) if file.is_end(token)]
                verify_end(saved, ends, f"{base}, as llama.cpp's converter reads it")


PROBES = (
    "What is 17 + 25?",
    "A pen costs $3.50, and 12 pens cost\nhow much?\n\nShow   every  step.",
    "It's 1,234,567 - isn't it? They're 100% sure (x^2 = 4).",
    "Größe, naïve, Привет, 数学, ½ \u2212 3",
)


def verify_prompt(file: "Vocabulary", tokenizer: Any, messages: Sequence[dict[str, str]], where: str) -> None:
    """Raise `UserError` unless `file` prompts with the very tokens of the chat template in transformers, with one BOS.

    By both ways a program may go: the file's own template as it stands (llama-cpp-python), and the text without BOS
    with the file's settings adding it (llama-server, Ollama). BOS is wanted where the tokenizer puts it before plain
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
    served = file.tokenize(text.removeprefix(file.text_of(file.bos)), add_special=True)
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


def verify_end(tokenizer: Any, ends: Sequence[int], where: str) -> None:
    """Raise `UserError` unless the token with which the chat template closes a turn is among `ends`."""
    end = turn_end(tokenizer, where)
    if end not in ends:
        raise UserError(
            f"{where}: a stop token is missing: the chat template closes the assistant's turn with "
            f"{tokenizer.convert_ids_to_tokens(end)!r} ({end}), and the end tokens are {list(ends)}, so a generation "
            f"would run on. Run: make merge gguf"
        )


def turn_end(tokenizer: Any, where: str) -> int:
    """Return the id of the token with which the chat template closes the assistant's turn.

    Raises `UserError` when the template puts no token of its own there.
    """
    marker = "ANSWER"
    conversation = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    after = text[text.rindex(marker) + len(marker) :]
    tokens = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    if not tokens or tokens[0] not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        raise UserError(
            f"{where}: the chat template closes the assistant's turn with {after!r}; expected a control token, at "
            f"which a generation can end"
        )
    return tokens[0]


def first_difference(ours: Sequence[int], theirs: Sequence[int], tokenizer: Any) -> str:
    """Say where two lists of token ids part; `tokenizer` is transformers'."""
    differing = (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    shared = next(differing, min(len(ours), len(theirs)))

    def shown(tokens: Sequence[int]) -> str:
        if shared >= len(tokens):
            return "the end"
        return f"{tokens[shared]} ({tokenizer.convert_ids_to_tokens(tokens[shared])!r})"

    return f"at token {shared}, transformers has {shown(ours)} and the GGUF {shown(theirs)}"


def quantize(source: Path, out: Path, kind: str, importance: Mapping[str, "np.ndarray"] | None = None) -> None:
    """Quantize the 16-bit GGUF `source` to `out`, of llama.cpp's type `kind` ("q4_k_m").

    `importance` is the importance matrix, by tensor name, as `stages.lib.imatrix` collects it. Raises `UserError` with
    what llama.cpp said when it refuses, as it does for some types of few bits without such a matrix
    (`stages.lib.recipe.NEED_IMPORTANCE`).
    """
    llama_cpp = library()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads(source)
    parameters.ftype = type_number(kind)
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance or {}) + 1))()  # the last, without a name, ends it
    for entry, (name, values) in zip(entries, (importance or {}).items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    if importance:
        parameters.imatrix = entries
    LOG.clear()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters)):
        raise UserError(f"{out}: llama.cpp could not quantize {source.name} to {kind}:\n{said()}")


def type_number(kind: str) -> int:
    """Return llama.cpp's number (LLAMA_FTYPE) of a type's lower-case name."""
    llama_cpp = library()
    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return getattr(llama_cpp, f"LLAMA_FTYPE_{name}")


def library() -> Any:
    """Return llama_cpp, its log going to `LOG` instead of the terminal."""
    import llama_cpp

    llama_cpp.llama_log_set(log_callback(), None)  # again each time: importing llama_cpp's modules sets its own
    return llama_cpp


@functools.cache
def log_callback() -> Any:
    """Return the function that llama.cpp logs to. It is called as long as the process lives, so it is kept here."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, data: Any) -> None:
        LOG.append(text.decode(errors="replace"))

    llama_cpp.llama_backend_init()
    return keep


def said(lines: int = 8) -> str:
    """Return the last lines that llama.cpp logged, indented."""
    return "\n".join("  " + line for line in "".join(LOG).strip().splitlines()[-lines:])


def threads(path: Path) -> int:
    """Return how many threads to run the file `path` with: all that can run at once, 1 for a small model.

    llama.cpp's threads wait for each other by spinning, after each of a hundred small steps a token. So one more than
    can run costs more than it brings, as in a container that sees a host's processors and may use few of their time.
    """
    if path.stat().st_size <= SMALL_BYTES:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), int(processor_quota())))


def processor_quota() -> float:
    """Return how many processors' time this container may use; `sys.maxsize` where it has no limit.

    Where the kernel says so: https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files,
    and https://docs.kernel.org/scheduler/sched-bwc.html for version 1.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError):
            quota, period = "\n".join((CGROUP / name).read_text() for name in names).split()
            return sys.maxsize if quota in ("max", "-1") else int(quota) / int(period)
    return sys.maxsize


class Vocabulary:
    """The tokenizer and metadata of a GGUF file, as llama.cpp reads them."""

    def __init__(self, path: Path, *, with_weights: bool = False) -> None:
        """Load `path`. Raises `UserError` with llama.cpp's reason when it can't be loaded, as a truncated file."""
        self.llama_cpp = library()
        parameters = self.llama_cpp.llama_model_default_params()
        parameters.vocab_only = not with_weights
        parameters.n_gpu_layers = 0  # the CPU's arithmetic is the one compared, on every machine
        LOG.clear()
        self.path = path
        self.model = self.llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.model:
            raise UserError(
                f"{path}: llama.cpp can't load it ({path.stat().st_size:,} bytes); a file cut short, as by a full "
                f"disk, reads like this. Delete it and run: make gguf. llama.cpp said:\n{said()}"
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

    def is_end(self, token: int) -> bool:
        """Say whether llama.cpp, and so Ollama, ends a generation at this token."""
        return self.llama_cpp.llama_vocab_is_eog(self.vocabulary, token)

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


class Loaded(Vocabulary):
    """A GGUF file at work on the CPU: token ids in, logits and greedy completions out."""

    def __init__(self, path: Path, context_tokens: int, sequences: int = 1, adapter: Path | None = None) -> None:
        """Load `path` with room for `sequences` texts at once of `context_tokens` each, and the GGUF LoRA `adapter`.

        Raises `UserError` as `Vocabulary` does, and when the adapter does not fit the file.
        """
        super().__init__(path, with_weights=True)
        parameters = self.llama_cpp.llama_context_default_params()
        parameters.n_ctx = context_tokens * sequences
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = max(BATCH_TOKENS, sequences)
        parameters.n_threads = parameters.n_threads_batch = threads(path)
        parameters.no_perf = True
        self.sequences = sequences
        self.batch_tokens = parameters.n_batch
        self.context = self.llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            super().close()
            raise UserError(f"{path}: no room for {context_tokens:,} x {sequences} tokens of context:\n{said()}")
        self.batch = self.llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)
        if adapter:
            try:
                self.apply(adapter)
            except UserError:
                self.close()
                raise

    def apply(self, adapter: Path) -> None:
        """Put the GGUF LoRA `adapter` on the model, at its full strength; it is freed with the model."""
        loaded = self.llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(adapter))
        adapters = (self.llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
        strength = (ctypes.c_float * 1)(1.0)
        if not loaded or self.llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, strength):
            raise UserError(
                f"{adapter}: llama.cpp can't put it on {self.path.name}; expected an adapter of that very base, on "
                f"none of its tied embeddings ([lora] target_modules). Take 'lora' out of save to go on without it. "
                f"llama.cpp said:\n{said(1)}"
            )

    def close(self) -> None:
        """Free batch, context and model."""
        self.llama_cpp.llama_batch_free(self.batch)
        self.llama_cpp.llama_free(self.context)
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, items: Sequence[tuple[int, int, int, bool]]) -> "np.ndarray":
        """Run `items` (token, position, sequence, whether its logits are wanted), at most `batch_tokens` of them.

        Returns the wanted logits, float32, (rows, vocabulary). They are llama.cpp's memory: gone at the next call.
        """
        import numpy as np

        for number, (token, position, sequence, wanted) in enumerate(items):
            self.batch.token[number] = token
            self.batch.pos[number] = position
            self.batch.n_seq_id[number] = 1
            self.batch.seq_id[number][0] = sequence
            self.batch.logits[number] = wanted
        self.batch.n_tokens = len(items)
        code = self.llama_cpp.llama_decode(self.context, self.batch)
        if code:
            raise UserError(f"{self.path}: llama.cpp could not run {len(items)} tokens (code {code}):\n{said()}")
        rows = sum(wanted for *_, wanted in items)
        if not rows:
            return np.empty((0, self.size), np.float32)
        return np.ctypeslib.as_array(self.llama_cpp.llama_get_logits(self.context), shape=(rows, self.size))

    def forget(self) -> None:
        """Empty the context."""
        self.llama_cpp.llama_memory_clear(self.llama_cpp.llama_get_memory(self.context), False)

    def logits(self, texts: Iterable[Text]) -> Iterator["np.ndarray"]:
        """Yield the logits at each text's positions, in order, in chunks that are valid until the next."""
        for text in texts:
            self.forget()
            wanted = set(text.positions)
            items = [(token, n, 0, n in wanted) for n, token in enumerate(text.tokens[: text.positions[-1] + 1])]
            for start in range(0, len(items), self.batch_tokens):
                yield self.decode(items[start : start + self.batch_tokens])

    def greedy(self, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
        """Return the greedy completion of each prompt as token ids, with the end token if it was reached.

        A generation ends at a token that the file itself marks as an end, or after `max_tokens`.
        """
        completions: list[list[int]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(0, len(by_length), self.sequences):
            self.forget()
            wave = dict(enumerate(by_length[start : start + self.sequences]))  # sequence: prompt
            for sequence, number in wave.items():
                items = [(token, n, sequence, False) for n, token in enumerate(prompts[number])]
                items[-1] = (*items[-1][:3], True)
                for begin in range(0, len(items), self.batch_tokens):
                    rows = self.decode(items[begin : begin + self.batch_tokens])
                completions[number].append(int(rows[0].argmax()))
            while wave := {
                sequence: number
                for sequence, number in wave.items()
                if len(completions[number]) < max_tokens and not self.is_end(completions[number][-1])
            }:
                items = [
                    (completions[n][-1], len(prompts[n]) + len(completions[n]) - 1, sequence, True)
                    for sequence, n in wave.items()
                ]
                for number, row in zip(wave.values(), self.decode(items), strict=True):
                    completions[number].append(int(row.argmax()))
        return completions
