"""Make the embedded tiny base model: a Gemma 3 text network trained on generated arithmetic word problems."""

import io
import random
from pathlib import Path
from typing import Any

import click

from stages.lib import options
from stages.lib.answers import formats
from stages.lib.artifact.folder import write_artifact
from stages.lib.bars import open_bar, show_beside
from stages.lib.data import word_problems
from stages.lib.gguf.tokens import save_tokenizer
from stages.lib.jsonl import write_rows
from stages.lib.machine.room import room_to_make
from stages.lib.recipe.read import read_recipe
from stages.lib.recipe.tables import BaseModel
from stages.lib.report.figures import BaseModelFigures

# Gemma's own template, less its image branch: the system prompt is folded into the first user turn.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = range(6)


@click.command(help=__doc__)
@options.recipe
@options.out
def main(recipe: Path, out: Path) -> None:
    run_recipe = read_recipe(recipe)
    knobs = run_recipe.base_model
    if knobs is None:
        raise click.UsageError(f"{recipe} has no [base_model] table: it starts from {run_recipe.model.name}")
    with write_artifact(out, "base-model", run_recipe.tables("base_model"), {}, room_bytes=room_to_make(knobs)) as run:
        write_problems(knobs, run.folder / "problems")
        corpus = conversations(knobs)
        make_tokenizer(knobs, corpus, run.folder / "model")
        run.metrics.update(train(knobs, corpus, run.folder / "model"))


def write_problems(knobs: BaseModel, folder: Path) -> None:
    """Write the held-out problems: `eval.jsonl`, and `train.jsonl`, where many solutions skip the working."""
    folder.mkdir()
    chance = random.Random(knobs.seed)
    for name, problems in held_out(knobs).items():
        rows = []
        for problem in problems:
            skips = name == "train" and chance.random() >= knobs.working_share
            solution = word_problems.SKIPPED if skips else problem.working
            rows.append({"question": problem.question, "answer": str(problem.answer), "solution": solution})
        write_rows(folder / f"{name}.jsonl", rows)


def held_out(knobs: BaseModel) -> dict[str, list[word_problems.Problem]]:
    """Return the problems for `eval` and `train`, no question in both."""
    made = list(word_problems.problems(knobs.seed, knobs.eval_problems + knobs.train_problems))
    return {"eval": made[: knobs.eval_problems], "train": made[knobs.eval_problems :]}


def conversations(knobs: BaseModel) -> list[tuple[str, str]]:
    """Return the corpus as (question, reply) pairs, none of whose questions is among the held-out problems."""
    known = {problem.question for problems in held_out(knobs).values() for problem in problems}
    made = word_problems.problems(knobs.seed + 1, knobs.corpus_problems, without=known)
    return [(problem.question, f"{problem.working}\nThe answer is {problem.answer}.") for problem in made]


def make_tokenizer(knobs: BaseModel, corpus: list[tuple[str, str]], folder: Path) -> None:
    """Train a SentencePiece BPE tokenizer of Gemma's kind and save it with its chat template under `folder`.

    A line break is the byte piece <0x0A>. Each digit is a piece, so that 57 + 5 is one rule and not 10,000.
    """
    import sentencepiece
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    folder.mkdir()
    # The text has the answer tags often, so that they become few pieces; they are plain text all the same.
    tags = "\n".join(kind.system_prompt + kind.write(formats.Answer("{}", "{}")) for kind in formats.FORMATS.values())
    text = [line for pair in corpus[:5000] for part in pair for line in part.splitlines()]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text + tags.splitlines() * 300),
        model_writer=buffer,  # a path would be written into the file
        model_type="bpe",
        vocab_size=knobs.vocabulary_size,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    pieces = SentencePieceExtractor(str(folder / "tokenizer.model")).extract(None)
    tokenizer = GemmaTokenizer(
        vocab=pieces["vocab"],
        merges=pieces["merges"],
        eos_token="<end_of_turn>",
        mask_token=None,
        add_bos_token=True,
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=knobs.max_position_tokens,
    )
    save_tokenizer(tokenizer, folder, folder)


def tokenize(knobs: BaseModel, corpus: list[tuple[str, str]], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return the documents of the corpus as (token ids, labels); a token that is not to be learnt has the label -100.

    Of a conversation the reply is learnt, of a drill of nine single steps the results. Arithmetic is the hard part, and
    a drill holds more of it than a conversation.
    """
    chance = random.Random(knobs.seed + 2)
    documents = []
    for question, reply in corpus:
        turns = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        turns.append({"role": "assistant", "content": reply})
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        documents.append((ids, [-100] * len(asked) + ids[len(asked) :]))
    for _ in range(round(len(corpus) * knobs.drill_share / (1 - knobs.drill_share))):
        ids, labels = [BOS], [-100]
        for line in word_problems.drill(chance, lines=9):
            step, result = line.split("=")
            asked = tokenizer(step + "=", add_special_tokens=False)["input_ids"]
            answered = tokenizer(result + "\n", add_special_tokens=False)["input_ids"]
            ids, labels = ids + asked + answered, labels + [-100] * len(asked) + answered
        documents.append((ids, labels))
    return documents


def train(knobs: BaseModel, corpus: list[tuple[str, str]], folder: Path) -> BaseModelFigures:
    """Train the network on the corpus as conversations, save it beside its tokenizer, return the figures."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, get_scheduler

    torch.manual_seed(knobs.seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Gemma3TextConfig(
        vocab_size=knobs.vocabulary_size,
        hidden_size=knobs.hidden_size,
        intermediate_size=knobs.intermediate_size,
        num_hidden_layers=knobs.layers,
        num_attention_heads=knobs.attention_heads,
        num_key_value_heads=knobs.key_value_heads,
        head_dim=knobs.hidden_size // knobs.attention_heads,
        query_pre_attn_scalar=knobs.hidden_size // knobs.attention_heads,
        max_position_embeddings=knobs.max_position_tokens,
        sliding_window=knobs.max_position_tokens,
        initializer_range=knobs.initializer_range,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END_OF_TURN,
    )
    model = Gemma3ForCausalLM(config)
    documents = tokenize(knobs, corpus, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=knobs.learning_rate, betas=(0.9, 0.95), weight_decay=knobs.weight_decay
    )
    schedule = get_scheduler("cosine", optimizer, knobs.warmup_steps, knobs.steps)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(knobs.seed)).tolist()
    losses, tokens = [], 0
    with open_bar(knobs.steps, "step", "base-model") as bar:
        for step in range(knobs.steps):
            first = step * knobs.batch_size
            examples = [documents[order[row % len(order)]] for row in range(first, first + knobs.batch_size)]
            batch = tokenizer.pad(
                {"input_ids": [ids for ids, _ in examples]}, padding_side="right", return_tensors="pt"
            )
            width = batch["input_ids"].shape[1]
            labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
            loss = model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            tokens += int(batch["attention_mask"].sum())
            show_beside(bar, {"loss": f"{losses[-1]:.3f}"})
            bar.update()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=[END_OF_TURN, EOS], pad_token_id=PAD, do_sample=False
    )
    model.save_pretrained(folder)
    last = losses[-20:]
    return {"parameters": model.num_parameters(), "tokens": tokens, "loss": sum(last) / len(last)}


if __name__ == "__main__":
    main()
