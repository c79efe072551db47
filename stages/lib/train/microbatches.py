"""The micro-batches of a GRPO step: rows of like length share one, and groups without advantage cost nothing.

TRL shuffles a step's completions and cuts them into micro-batches, each as wide as the longest completion of the step.
The gradient of a step is a sum over its rows. So the choice of rows for a micro-batch changes only the order of that
sum, and a row without advantage adds zero to it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from trl import GRPOTrainer

# Loss types in which a row's weight does not depend on its micro-batch; in "bnpo" it does.
SUMS_OVER_ROWS = ("dapo", "grpo", "dr_grpo")
BY_COMPLETION_TOKEN = (
    "completion_ids", "completion_mask", "sampling_per_token_logps", "old_per_token_logps", "ref_per_token_logps",
    "importance_sampling_ratio",
)  # fmt: skip


def arrange_micro_batches(trainer: "GRPOTrainer", skip: bool = True) -> None:
    """Let `trainer` sort the rows of a step by length, trim each micro-batch, and with `skip` pass over idle ones.

    An idle micro-batch holds only rows whose advantage is 0. Without a pull to the base model (`beta` 0) its gradient
    is exactly 0, so it needs no forward and backward pass; the loss is divided by the tokens of the whole step all the
    same. The last micro-batch of a step always runs: there GPUs share gradients, and where no group taught anything,
    the optimizer finds a gradient of 0 instead of none.
    """
    if trainer.args.loss_type not in SUMS_OVER_ROWS:
        return
    skip = skip and trainer.beta == 0
    run_micro_batch = trainer.training_step
    prepared_at = -1  # the micro-step at which the buffer was last filled

    def prepare_inputs(rows: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal prepared_at
        count = trainer.args.steps_per_generation
        is_due = trainer._step % (count * trainer.num_iterations) == 0 and prepared_at != trainer._step
        if is_due or trainer._buffered_inputs is None:  # none after a checkpoint was loaded
            step = trainer._generate_and_score_completions(rows)
            trainer._buffered_inputs = cut(step, count, trainer.processing_class.pad_token_id)
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

    `step` holds tensors of shape (rows, ...) or (rows,), and some that belong to no row. The rows without advantage
    come first, so that they fill whole micro-batches; then the others, the longest first, so that memory runs out
    early or never. Each micro-batch is trimmed to its own longest prompt (padded left) and completion (padded right).
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
    """Return the width of each row's completion, (rows,): up to its last column that counts or is no padding."""
    import torch

    filled = (batch["completion_ids"] != pad) | (batch["completion_mask"] != 0)
    columns = torch.arange(1, filled.shape[1] + 1, device=filled.device)
    return (filled * columns).amax(1)


def trim(batch: dict[str, Any], pad: int) -> dict[str, Any]:
    """Return the micro-batch without the columns that are padding in all its rows; one column always stays.

    A tensor with one value a completion, (rows, 1), stays as it is.
    """
    whole = batch["completion_ids"].shape[1]
    by_token = [name for name in BY_COMPLETION_TOKEN if batch.get(name) is not None and batch[name].shape[-1] > 1]
    if any(batch[name].shape[1] != whole for name in by_token):  # Unsloth's scoring pass: left-packed, and wider
        return batch
    width = max(1, int(widths(batch, pad).max()))
    prompt = max(1, int(batch["prompt_mask"].sum(1).max()))
    batch |= {name: batch[name][:, -prompt:] for name in ("prompt_ids", "prompt_mask")}
    return batch | {name: batch[name][:, :width] for name in by_token}
