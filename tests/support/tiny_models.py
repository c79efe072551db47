"""Small models for tests, made on the spot: a trained Gemma 3 with a SentencePiece tokenizer, and a LoRA adapter."""

import importlib
import json
import random
from pathlib import Path

from click.testing import CliRunner, Result

from stages.lib.artifact.folder import write_artifact
from tests.support.once import once_a_run, run_folder
from tests.support.recipes import read_tables, write_tables

SYSTEM = "Think, then answer."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<start_of_turn>user\n' + (system if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% else %}{{ '<start_of_turn>model\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def rows(count: int, seed: int) -> list[dict]:
    """Return `count` sums as rows of prepare-data's eval.jsonl, each with its worked completion."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        a, b = chance.randrange(100), chance.randrange(100)
        question = f"What is {a} + {b}?"
        text = f"<reasoning>\n{a} + {b} = {a + b}\n</reasoning>\n<answer>\n{a + b}\n</answer>"
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        completion = [{"role": "assistant", "content": text}]
        made.append({"id": f"sum-{seed}-{number}", "prompt": prompt, "completion": completion, "answer": str(a + b)})
    return made


def sentencepiece_tokenizer(folder: Path, texts: list[str], size: int = 512):
    """Train a SentencePiece BPE tokenizer like Gemma's into `folder`; return it as transformers reads it."""
    import sentencepiece
    from transformers import AutoTokenizer

    (folder / "corpus.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=size, model_type="bpe",
        split_digits=True, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", control_symbols=["<start_of_turn>", "<end_of_turn>"], minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<end_of_turn>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


def trained_gemma(folder: Path, steps: int = 70) -> Path:
    """Make a base model: a Gemma 3 network of 1.2 M parameters that has seen some sums. Return its folder."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

    folder.mkdir(parents=True)
    examples = rows(400, seed=1)
    texts = [message["content"] for row in examples for message in row["prompt"] + row["completion"]]
    tokenizer = sentencepiece_tokenizer(folder, texts)
    config = Gemma3TextConfig(
        vocab_size=384, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, max_position_embeddings=512, sliding_window=64,
        initializer_range=0.05, tie_word_embeddings=True, bos_token_id=2, eos_token_id=5, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    train(model, tokenizer, examples, steps, learning_rate=3e-3)
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=[1, 5], pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def train(model, tokenizer, examples: list[dict], steps: int, learning_rate: float) -> None:
    """Take AdamW steps on whole conversations, 16 a step."""
    import torch

    torch.set_num_threads(1)  # at this size a second thread costs more than it gives
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in examples]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    model.train()
    for step in range(steps):
        picked = torch.arange(step * 16, step * 16 + 16) % len(texts)
        loss = model(
            input_ids=batch["input_ids"][picked], attention_mask=batch["attention_mask"][picked], labels=labels[picked]
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def adapter(base: Path, folder: Path, steps: int = 30, **lora: object) -> Path:
    """Write what the grpo stage hands on, adapter/ and tokenizer/, for a LoRA trained on `base`. Return `folder`."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | lora
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    train(model, tokenizer, rows(64, seed=2), steps, learning_rate=2e-3)
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@once_a_run
def made() -> Path:
    """Return a folder with the finished artifacts base-model/, prepare-data/ and grpo/ of a tiny run, made once."""
    folder = run_folder() / "tiny"
    folder.mkdir(exist_ok=True)
    with write_artifact(folder / "base-model", "base-model", {}, {}) as run:
        trained_gemma(run.folder / "model")
    with write_artifact(folder / "prepare-data", "prepare-data", {}, {}) as run:
        for name, examples in (("eval", rows(60, seed=3)), ("sft", rows(20, seed=2))):
            (run.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    with write_artifact(folder / "grpo", "grpo", {}, {}) as run:
        adapter(folder / "base-model" / "model", run.folder)
    return folder


def recipe(folder: Path, **gguf: object) -> Path:
    """Write the tiny recipe with other values in [gguf] to `folder`; return the file."""
    tables = read_tables() | {"gguf": {"types": ["f16", "q8_0", "q4_k_m"], "prompts": 40} | gguf}
    return write_tables(folder / "tiny.toml", tables)


def run_stage(stage: str, recipe: Path, out: Path, *inputs: str) -> Result:
    """Run a stage's command in this process on artifacts of `made()`, and those beside `out`."""
    command = importlib.import_module(f"stages.{stage}").main
    arguments = ["--recipe", str(recipe), "--out", str(out)]
    for name in inputs:
        beside = out.with_name(name)
        arguments += [f"--{name}", str(beside if beside.is_dir() else made() / name)]
    return CliRunner().invoke(command, arguments)


@once_a_run
def merged() -> Path:
    """Return the folder of the finished merge/ artifact of the tiny run, made once, with its recipe beside it."""
    result = run_stage("merge", recipe(made()), made() / "merge", "grpo", "prepare-data", "base-model")
    assert result.exit_code == 0, result.output
    return made() / "merge"


@once_a_run
def quantized() -> Path:
    """Return the folder of the finished gguf/ artifact of the tiny run, made once."""
    merged()
    result = run_stage("gguf", made() / "tiny.toml", made() / "gguf", "merge", "prepare-data", "grpo", "base-model")
    assert result.exit_code == 0, result.output
    return made() / "gguf"


@once_a_run
def modelfile() -> Path:
    """Return the folder of the finished ollama-modelfile/ artifact of the tiny run, made once."""
    quantized()
    result = run_stage("ollama_modelfile", made() / "tiny.toml", made() / "ollama-modelfile", "merge", "gguf")
    assert result.exit_code == 0, result.output
    return made() / "ollama-modelfile"
