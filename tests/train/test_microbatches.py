"""A step's micro-batches, sorted, trimmed and skipped, give the gradient that TRL's give."""

import copy

import pytest

from stages.lib.train.microbatches import arrange_micro_batches, cut, trim

pytestmark = pytest.mark.torch

PAD, END, LETTERS = 0, 1, "abcdefghijklmnopqrstuvwxyz "


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<end>", "<unk>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def model():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(3)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=PAD, eos_token_id=END, bos_token_id=None, initializer_range=0.4,
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # both matrices have a gradient
    return get_peft_model(LlamaForCausalLM(config), adapter)


def gradients_and_passes(model, tmp_path, arrange, rewarded, loss_type="dapo", beta=0.0, iterations=1, count=4):
    """Train two steps; return the gradients of each, the passes that had any, and the weights after."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "ab" * (1 + n % 5)}]} for n in range(40)])
    steps: list[dict] = []
    seen: list[tuple[int, int]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})

    set_seed(0)
    trainer = GRPOTrainer(
        model=copy.deepcopy(model),
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=16 // count, num_generations=4,
            gradient_accumulation_steps=count, generation_batch_size=16, max_completion_length=24, beta=beta,
            num_iterations=iterations, loss_type=loss_type, report_to=[], use_cpu=True, save_strategy="no",
            learning_rate=1e-2, max_grad_norm=1e9, weight_decay=0.1, disable_tqdm=True, bf16=False,
            gradient_checkpointing=False,
        ),
        reward_funcs=rewarded, train_dataset=rows, processing_class=small_tokenizer(), callbacks=[Keep()],
    )  # fmt: skip
    if arrange is not None:
        arrange_micro_batches(trainer, skip=arrange)
    trainer.model.register_forward_hook(
        lambda module, given, named, output: (
            seen.append(tuple(named["input_ids"].shape)) if module.training and torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    trainer.train()
    return steps, seen, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def in_two_groups(completions, **columns):
    """Reward the first two groups of four by their letters; the other two all alike."""
    return [float(len(set(turns[-1]["content"]))) if n < 8 else 1.0 for n, turns in enumerate(completions)]


def all_alike(completions, **columns):
    return [1.0] * len(completions)


def all_differ(completions, **columns):
    return [float(len(set(turns[-1]["content"]))) for turns in completions]


def test_gradients_with_and_without_skipped_micro_batches_are_equal_to_the_bit(model, tmp_path):
    import torch

    whole, ran, weights = gradients_and_passes(model, tmp_path, False, in_two_groups)
    spared, fewer, same_weights = gradients_and_passes(model, tmp_path, True, in_two_groups)
    assert len(ran) == 8
    assert len(fewer) == 4  # two of four micro-batches a step hold only groups without advantage
    assert any(value.abs().max() > 0 for value in whole[0].values())
    for one, other in zip(whole, spared, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize(("rewarded", "beta"), [(in_two_groups, 0.0), (all_differ, 0.0), (all_differ, 0.1)])
def test_sorted_and_trimmed_micro_batches_give_trls_own_gradient(model, tmp_path, loss_type, rewarded, beta):
    theirs, wide, _ = gradients_and_passes(model, tmp_path, None, rewarded, loss_type, beta)
    ours, trimmed, _ = gradients_and_passes(model, tmp_path, True, rewarded, loss_type, beta)
    assert sum(rows * columns for rows, columns in trimmed) < 0.95 * sum(rows * columns for rows, columns in wide)
    for name, gradient in theirs[0].items():
        scale = gradient.abs().max().clamp(min=1e-8)
        assert ((ours[0][name] - gradient).abs().max() / scale) < 1e-4, name


def test_a_step_that_teaches_nothing_runs_its_last_micro_batch_and_has_a_gradient_of_zero(model, tmp_path):
    steps, seen, _ = gradients_and_passes(model, tmp_path, True, all_alike)
    assert len(seen) == 2
    assert all((value == 0).all() for step in steps for value in step.values())


def test_with_a_pull_to_the_base_model_nothing_is_skipped(model, tmp_path):
    assert len(gradients_and_passes(model, tmp_path, True, in_two_groups, beta=0.1)[1]) == 8


def test_where_a_micro_batch_weighs_its_own_tokens_trls_cut_stays(model, tmp_path):
    import torch

    theirs, _, _ = gradients_and_passes(model, tmp_path, None, all_differ, "bnpo")
    ours, _, _ = gradients_and_passes(model, tmp_path, True, all_differ, "bnpo")
    assert all(torch.equal(theirs[0][name], ours[0][name]) for name in theirs[0])


def test_completions_are_made_once_for_all_iterations_over_them(model, tmp_path):
    calls = []

    def counted(completions, **columns):
        calls.append(len(completions))
        return all_differ(completions)

    gradients_and_passes(model, tmp_path, True, counted, iterations=2)
    assert calls == [16]


def step_of(lengths, advantages, width=6):
    import torch

    ids = torch.tensor([[5] * n + [PAD] * (width - n) for n in lengths])
    return {
        "prompt_ids": torch.tensor([[PAD, PAD, 7]] * len(lengths)),
        "prompt_mask": torch.tensor([[0, 0, 1]] * len(lengths)),
        "completion_ids": ids,
        "completion_mask": (ids != PAD).long(),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": torch.tensor(float(sum(lengths))),
        "sampling_per_token_logps": torch.arange(len(lengths) * width).float().view(-1, width),
    }


def test_rows_without_advantage_come_first_and_then_the_longest():
    step = step_of([1, 6, 3, 2, 5, 4], [0.5, 0.0, -1.0, 0.0, 1.0, 0.1])
    batches = cut(step, 3, PAD)
    assert [batch["completion_mask"].sum(1).tolist() for batch in batches] == [[2, 6], [5, 4], [3, 1]]
    assert [batch["completion_ids"].shape for batch in batches] == [(2, 6), (2, 5), (2, 3)]
    assert [batch["prompt_ids"].tolist() for batch in batches] == [[[7], [7]]] * 3
    assert batches[2]["sampling_per_token_logps"].tolist() == [[12.0, 13.0, 14.0], [0.0, 1.0, 2.0]]
    assert all(batch["num_items_in_batch"] == 21 for batch in batches)


def test_a_truncated_completion_that_counts_for_nothing_keeps_its_tokens():
    batch = step_of([3, 4], [1.0, 1.0])
    batch["completion_mask"][1] = 0  # mask_truncated_completions
    assert trim(batch, PAD)["completion_ids"].shape == (2, 4)


def test_an_end_that_is_the_padding_too_is_kept():
    batch = step_of([2, 2], [1.0, 1.0])
    batch["completion_mask"][:, 2] = 1  # the end token, of the id that also pads
    assert trim(batch, PAD)["completion_ids"].shape == (2, 3)


def test_wider_rows_of_a_scoring_pass_are_not_trimmed():
    import torch

    batch = step_of([2, 2], [1.0, 1.0]) | {"old_per_token_logps": torch.zeros(2, 9)}
    assert trim(batch, PAD)["completion_ids"].shape == (2, 6)
