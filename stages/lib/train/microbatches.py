"""The micro-batches of a GRPO step: rows of like length share one, and groups without advantage cost nothing.

TRL shuffles what was generated for a step and cuts it into micro-batches, each as wide as the longest completion of the
whole step. The gradient of a step is a sum over its rows, so which rows share a micro-batch changes no more than the
order of that sum, and a row without advantage adds zero to it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from trl import GRPOTrainer

# Where every row counts by itself: by the tokens of the whole step, or alike. "bnpo" counts by a micro-batch's tokens.
SUMS_OVER_ROWS = ("dapo", "grpo", "dr_grpo")
BY_COMPLETION_TOKEN = (
    "completion_ids", "completion_mask", "sampling_per_token_logps", "old_per_token_logps", "ref_per_token_logps",
    "importance_sampling_ratio",
)  # fmt: skip


def arrange_micro_batches(trainer: "GRPOTrainer", skip: bool = True) -> None:
    """Let `trainer` sort the rows of a step by length, trim each micro-batch, and with `skip` pass over idle ones.

    An idle micro-batch holds only rows whose advantage is 0: without a pull to the base model (`beta` 0) its gradient
    is exactly 0, so its forward and backward passes are spared. The token count that the loss is divided by is that of
    the whole step all the same. The last micro-batch of a step always runs: gradients are shared between GPUs there,
    and the optimizer finds a gradient of 0 instead of none where no group taught anything.
    """
    if trainer.args.loss_type not in SUMS_OVER_ROWS:
        return
    skip = skip and trainer.beta == 0
    run_micro_batch = trainer.training_step
    prepared_at = -1  # the micro-step that the buffer was last filled at

    def prepare_inputs(rows: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal prepared_at
        count = trainer.args.steps_per_generation
        due = trainer._step % (count * trainer.num_iterations) == 0 and prepared_at != trainer._step
        if due or trainer._buffered_inputs is None:  # none after a checkpoint was loaded
            made = trainer._generate_and_score_completions(rows)
            trainer._buffered_inputs = cut(made, count, trainer.processing_class.pad_token_id)
            prepared_at = trainer._step
        return trainer._buffered_inputs[trainer._step % count]

    def training_step(model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> "torch.Tensor":
        is_last = (trainer._step + 1) % trainer.args.gradient_accumulation_steps == 0
        if not skip or is_last:
            return run_micro_batch(model, inputs, num_items_in_batch)
        model.train()
        advantages = prepare_inputs(inputs)["advantages"]
        if advantages.any():
            return run_micro_batch(model, inputs, num_items_in_batch)
        trainer._step += 1
        return advantages.new_zeros(())

    trainer._prepare_inputs = prepare_inputs
    trainer.training_step = training_step


def cut(step: Mapping[str, Any], count: int, pad: int) -> list[dict[str, Any]]:
    """Return `count` micro-batches of equal size out of all rows of a step, in the order in which they are to run.

    `step` holds tensors of a row each, (rows, ...) or (rows,), and some that are one for all. The rows without
    advantage come first, so that they fill whole micro-batches; then the others, the longest first, where memory would
    run out soonest. Each micro-batch is trimmed to its own longest prompt (padded left) and completion (padded right).
    """
    import torch

    rows = step["advantages"].shape[0]
    lengths = step["prompt_mask"].sum(1) + widths(step, pad)
    idle = step["advantages"] == 0
    order = torch.argsort(torch.where(idle, lengths - lengths.max() - 1, -lengths + lengths.max()), stable=True)
    batches = []
    for part in order.chunk(count):
        batch = dict(step)
        for name, value in step.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows:
                batch[name] = value[part.to(value.device)]  # Unsloth keeps a count of its padding on the CPU
        batches.append(trim(batch, pad))
    return batches


def widths(batch: Mapping[str, Any], pad: int) -> "torch.Tensor":
    """Return the columns that each row's completion takes, (rows,): up to the last that counts or is no padding."""
    import torch

    held = (batch["completion_ids"] != pad) | (batch["completion_mask"] != 0)
    columns = torch.arange(1, held.shape[1] + 1, device=held.device)
    return (held * columns).amax(1)


def trim(batch: dict[str, Any], pad: int) -> dict[str, Any]:
    """Return the micro-batch without the columns that are padding in all its rows; one column always stays.

    A factor a completion, (rows, 1), stays as it is.
    """
    whole = batch["completion_ids"].shape[1]
    by_token = [name for name in BY_COMPLETION_TOKEN if batch.get(name) is not None and batch[name].shape[-1] > 1]
    if any(batch[name].shape[1] != whole for name in by_token):  # Unsloth's scoring pass: left-packed, and wider
        return batch
    width = max(1, int(widths(batch, pad).max()))
    prompt = max(1, int(batch["prompt_mask"].sum(1).max()))
    batch |= {name: batch[name][:, -prompt:] for name in ("prompt_ids", "prompt_mask")}
    return batch | {name: batch[name][:, :width] for name in by_token}
