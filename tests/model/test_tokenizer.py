"""The tokenizer that a run trains and ships: that of tokenizer.json, with BOS where the chat template has it.

Each base is a tokenizer with a real vocabulary and a config.json; none has weights. What is told apart are the rules by
which SmolLM2, OLMo 2, TinyLlama and Hermes are read, and the formats' own chat templates.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.lib.answers import formats
from stages.lib.errors import UserError
from stages.lib.gguf.tokens import save_tokenizer
from stages.lib.model.rehearsal import check_chat_template, check_completion, check_tokenizer
from stages.lib.model.tokenizer import load_tokenizer
from stages.lib.recipe.tables import Format
from tests.support import chat_templates, family_models

pytestmark = pytest.mark.torch  # what this needs comes with it: transformers and llama.cpp's converter

NETWORKS = {
    "qwen2.5": "Qwen2", "llama3.1": "Llama", "gemma3": "Gemma3Text", "phi3": "Phi3", "smollm2": "Llama",
    "tinyllama": "Llama", "olmo2": "Qwen2",
}  # fmt: skip
TINYLLAMA = family_models.GEMMA3 | {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def base(name: str, folder: Path, *, rows: int = 0, template: str | None = None, network: str = "") -> Path:
    """Write the tokenizer and config.json of a base like `name` to `folder`, with no weights; return the folder.

    `rows` are taken off the embedding; `template` stands for its own chat template, `network` for its own network.
    """
    import transformers

    network = network or NETWORKS[name]
    folder.mkdir(exist_ok=True)

    if name == "tinyllama":  # its tokenizer adds BOS, its chat template writes none
        family_models.sentencepiece("llama-spm", [], TINYLLAMA)(folder, "gemma-3", "<end_of_turn>")
        blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        steps = [{"type": "Prepend", "prepend": "▁"}, blank]  # as on the hub: transformers 5 makes another of it
        edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps}, pre_tokenizer=None)
        template = template or ZEPHYR
    else:
        family = family_models.FAMILIES["qwen2.5" if name == "olmo2" else name]
        family.tokenizer(folder, family.template, family.end)
    if name == "olmo2":  # the other way about
        edit(folder / "tokenizer_config.json", bos_token="<|endoftext|>")
        template = template or "{{ bos_token }}" + chat_templates.CHATML
    if template:
        (folder / "chat_template.jinja").write_text(template)
    size = len(transformers.PreTrainedTokenizerFast.from_pretrained(folder)) - rows
    config = getattr(transformers, f"{network}Config")(**family_models.SIZES, vocab_size=size)
    config.architectures = [f"{network.removesuffix('Text')}ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def recipe(folder: Path, answer_format: str = "xml", kwargs: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        path=Path("recipe.toml"),
        model=SimpleNamespace(name=str(folder), revision=None),
        model_folder=folder,
        format=Format(answer_format, formats.get(answer_format).system_prompt, kwargs or {}),
    )


def rehearsed(folder: Path, answer_format: str = "xml"):
    """Return the tokenizer that a run on the base in `folder` trains, once all that looks at it before has passed."""
    run = recipe(folder, answer_format)
    tokenizer = load_tokenizer(run)
    check_chat_template(run, tokenizer)
    check_completion(run, tokenizer)
    check_tokenizer(run, tokenizer)
    return tokenizer


def beginning(tokenizer) -> tuple[list[int], list[int]]:
    """Return the first token of a plain text and of a prompt, with no id where that is no BOS."""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "17 + 25?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    return tuple(
        [token for token in ids[:1] if token == tokenizer.bos_token_id] for ids in (tokenizer("a").input_ids, prompt)
    )


@pytest.mark.parametrize(
    ("name", "plain", "prompt"),
    [
        ("llama3.1", [128000], [128000]),
        ("smollm2", [], [1]),  # the first turn's marker, which no plain text has
        ("tinyllama", [], []),  # the tokenizer would add one, the prompts of training have none
        ("olmo2", [], [151643]),  # the tokenizer adds none, the prompts of training have one
    ],
)
def test_a_plain_text_and_a_prompt_begin_as_in_training_in_every_program(tmp_path, name, plain, prompt):
    assert beginning(rehearsed(base(name, tmp_path))) == (plain, prompt)


@pytest.mark.parametrize(
    ("name", "bos"),
    [("llama3.1", [128000]), ("gemma3", [1]), ("smollm2", []), ("tinyllama", [1])],
)
def test_the_template_of_think_begins_a_prompt_as_every_bases_tokenizer_begins_a_plain_text(tmp_path, name, bos):
    assert beginning(rehearsed(base(name, tmp_path), "think")) == (bos, bos)


def test_what_a_chatml_tune_of_llama_is_shipped_with_adds_no_bos_however_it_is_loaded(tmp_path):
    from transformers import AutoTokenizer

    folder = base("llama3.1", tmp_path, template=chat_templates.CHATML)
    edit(folder / "tokenizer_config.json", add_bos_token=True)
    tokenizer = load_tokenizer(recipe(folder))
    tokenizer.save_pretrained(tmp_path / "grpo")  # as the trainers do
    handed_on = AutoTokenizer.from_pretrained(tmp_path / "grpo")
    save_tokenizer(handed_on, folder, tmp_path / "merged")
    shipped = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert [each("a").input_ids for each in (tokenizer, handed_on, shipped)] == [[64], [64], [64]]
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["add_bos_token"] is False


def test_numbers_are_split_as_tokenizer_json_says_whatever_class_the_base_states(tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = base("smollm2", tmp_path)
    digits = ["1", "7", "Ġ+", "ĠĠĠ", "2", "5"]
    assert AutoTokenizer.from_pretrained(folder).tokenize("17 +   25") != digits  # else this test shows nothing
    tokenizer = load_tokenizer(recipe(folder))
    assert tokenizer.tokenize("17 +   25") == digits
    save_tokenizer(tokenizer, folder, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").tokenize("17 +   25") == digits
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"{folder}: transformers makes another tokenizer of tokenizer_class 'GPT2Tokenizer' than")


REBUILT = [
    ("smollm2", "Llama", "GPT2Tokenizer"), ("smollm2", "Olmo2", "GPT2Tokenizer"),
    ("smollm2", "Qwen3", "Qwen2Tokenizer"), ("smollm2", "Llama", "LlamaTokenizer"),
    ("smollm2", "Llama", "CodeLlamaTokenizer"),
    ("gemma3", "Gemma3Text", "GemmaTokenizer"), ("tinyllama", "Llama", "LlamaTokenizer"),
    ("phi3", "Phi3", "LlamaTokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "network", "stated"), REBUILT, ids=["-".join(each) for each in REBUILT])
def test_the_tokenizer_of_tokenizer_json_is_trained_and_shipped_whatever_class_is_stated(
    tmp_path, name, network, stated
):
    from tokenizers import Tokenizer

    folder = base(name, tmp_path / "base", network=network)
    edit(folder / "tokenizer_config.json", tokenizer_class=stated)
    # Rules that no class of transformers has: letters are made small, and an "x" stands alone.
    alone = {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated", "invert": False}
    split = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
    steps = {"type": "Sequence", "pretokenizers": [alone, split] if split else [alone]}
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"}, pre_tokenizer=steps)
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = written.encode("AxxB 17", add_special_tokens=False).tokens
    trained = load_tokenizer(recipe(folder))
    assert trained.tokenize("AxxB 17") == tokens
    shipped = ship(trained, folder, tmp_path / "merged")
    assert shipped.tokenize("AxxB 17") == tokens
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert state(shipped.backend_tokenizer, part) == state(written, part)


def ship(tokenizer, folder: Path, out: Path):
    """Save the tokenizer beside the config.json of its base, as merge does; return it as users load it."""
    from transformers import AutoTokenizer

    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_tokenizer(tokenizer, folder, out)
    return AutoTokenizer.from_pretrained(out)


def state(tokenizer, part: str) -> bytes | None:
    found = getattr(tokenizer, part)
    return found.__getstate__() if found is not None else None


def test_a_qwen2_whose_tokenizer_json_is_not_qwen2s_is_refused_as_transformers_would_read_it_otherwise(tmp_path):
    folder = base("smollm2", tmp_path / "base", network="Qwen2")
    run = recipe(folder)
    with pytest.raises(
        UserError, match=r"makes a Qwen2Tokenizer of every .* \(normalizer, pre_tokenizer\); .* another base"
    ):
        check_tokenizer(run, load_tokenizer(run))


def test_a_qwen2_whose_tokenizer_json_differs_in_rare_texts_alone_is_taken_with_a_warning(tmp_path, capsys):
    folder = base("smollm2", tmp_path / "base", network="Qwen2")
    regex = {"type": "Split", "pattern": {"Regex": family_models.QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # As Qwen2's, but for the normalizer, which composes an accent and its letter.
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [regex, bytes_]})
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    tokenizer = load_tokenizer(recipe(folder))
    shipped = ship(tokenizer, folder, tmp_path / "merged")
    assert shipped.tokenize("17 +   25") == tokenizer.tokenize("17 +   25")
    assert shipped.tokenize("e\u0301") != tokenizer.tokenize("e\u0301")
    warning = capsys.readouterr().err.strip().splitlines()[-1]
    assert warning.startswith(
        f"warning: {folder}: beside this config.json transformers makes a Qwen2Tokenizer of every"
    )
    assert warning.endswith("(normalizer); common texts give the same tokens")


@pytest.mark.parametrize(
    ("named", "expected"),
    [({"default": chat_templates.CHATML, "tool_use": "tools"}, chat_templates.CHATML), ({"tool_use": "tools"}, None)],
)
def test_of_several_chat_templates_the_default_one_is_trained(tmp_path, named, expected):
    folder = base("qwen2.5", tmp_path)
    (folder / "chat_template.jinja").unlink()
    listed = [{"name": name, "template": template} for name, template in named.items()]
    edit(folder / "tokenizer_config.json", chat_template=listed)
    if expected:
        assert load_tokenizer(recipe(folder)).chat_template == expected
        return
    with pytest.raises(UserError, match=r"has chat templates named tool_use and none named default, .* brings none"):
        load_tokenizer(recipe(folder))


def test_a_template_that_leaves_the_system_message_out_is_refused_before_training_and_think_takes_the_base(tmp_path):
    folder = base("phi3", tmp_path, template=chat_templates.MADE["phi-3 medium"])
    with pytest.raises(UserError, match=r"leaves them out, but the format xml has a system prompt.* name = 'think'"):
        check_chat_template(recipe(folder), load_tokenizer(recipe(folder)))
    check_chat_template(recipe(folder, "think"), load_tokenizer(recipe(folder, "think")))


def test_a_missing_sentencepiece_model_is_said_to_be_missing(tmp_path):
    folder = base("phi3", tmp_path)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model is missing; .* Fetch that file of .* into the folder"):
        check_tokenizer(recipe(folder), load_tokenizer(recipe(folder)))


def test_a_token_without_a_row_in_the_embedding_is_named(tmp_path):
    folder = base("qwen2.5", tmp_path, rows=1)
    with pytest.raises(UserError, match=r"the tokenizer has '.*' as token 151,\d+, and the embedding 151,\d+ rows"):
        check_tokenizer(recipe(folder), load_tokenizer(recipe(folder)))


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_the_hybrid_qwen3_is_trained_in_the_xml_format_with_thinking_off_and_shipped_so(tmp_path, kwargs):
    folder = base("qwen2.5", tmp_path, template=chat_templates.llama_cpp()["Qwen-Qwen3-0.6B"])
    run = recipe(folder, kwargs=kwargs)
    tokenizer = load_tokenizer(run)
    if not kwargs:
        with pytest.raises(
            UserError, match=r"changes a completion, .* Choose \[format\] template_kwargs = \{enable_thi"
        ):
            check_completion(run, tokenizer)
        return
    check_completion(run, tokenizer)
    check_chat_template(run, tokenizer)
    shipped = save_tokenizer(tokenizer, folder, tmp_path / "merged")
    prompt = [{"role": "user", "content": "17 + 25?"}]
    served = shipped.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert served.endswith("17 + 25?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_variable_that_the_chat_template_lacks_is_refused_with_the_models_name(tmp_path):
    folder = base("qwen2.5", tmp_path)
    with pytest.raises(UserError, match=rf"^{folder}: the chat template has no variable 'thinking'.*\. Leave it out"):
        load_tokenizer(recipe(folder, kwargs={"thinking": True}))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_chat_template_that_fails_on_every_conversation_is_named_with_what_it_raises(tmp_path, template, reason):
    folder = base("gemma3", tmp_path, template=template)
    with pytest.raises(
        UserError, match=rf"{tmp_path}: the chat template fails on a question and its answer \({reason}"
    ):
        load_tokenizer(recipe(folder))
