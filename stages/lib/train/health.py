"""Signs in a training log of a run that wastes GPU hours, and what to do about each."""

import math
from collections.abc import Sequence

from stages.lib.recipe.tables import Health

# Of a metric: its name, which is the check's too, the bound in [health], the side of it (1: over) that is a sign, what
# it measures, and what to do.
BOUNDS = (
    ("kl", "max_kl", 1, "the KL divergence from the reference", ". Lower learning_rate, or raise beta"),
    (
        "entropy", "min_entropy", -1, "the entropy of a token",
        ": the completions hardly differ. Raise epsilon_high or temperature, or lower learning_rate",
    ),
    (
        "entropy", "max_entropy", 1, "the entropy of a token",
        ": the completions become noise. Lower learning_rate, or raise beta",
    ),
)  # fmt: skip


def find(log: Sequence[dict[str, float]], knobs: Health, *, scaled: bool = False) -> dict[str, str]:
    """Return what is wrong at the end of `log`, by the name of the check: what was seen and what to do.

    `log` has the trainer's entries, oldest first, a dict of metrics each; a metric without any value is not checked.
    A loss or gradient norm that is not finite counts at once. Any other sign counts when the last `knobs.log_entries`
    values show it; so does the gradient norm of a loss that is `scaled` for float16, where an overflow skips the step.
    """
    signs = {}
    for name, count in (("loss", 1), ("grad_norm", knobs.log_entries if scaled else 1)):
        values = [entry.get(name, 0.0) for entry in log[-count:]]
        if len(values) == count and not any(map(math.isfinite, values)):
            signs["nan"] = (
                f"{name} is {values[-1]}. Lower learning_rate or max_grad_norm, or train in bfloat16: in float16 large "
                f"activations overflow"
            )

    def lasting(name: str) -> list[float]:  # with num_iterations over 1, only every so many entries have some metrics
        values = [entry[name] for entry in log if name in entry][-knobs.log_entries :]
        return values if len(values) == knobs.log_entries else []

    for_so_long = f"for {knobs.log_entries} logged steps"
    zero_shares, clipped_shares = lasting("frac_reward_zero_std"), lasting("completions/clipped_ratio")
    if zero_shares and min(zero_shares) >= 1.0:  # a share of groups; reward_std is over all groups
        signs["constant_reward"] = (
            f"in each group all completions were rewarded alike {for_so_long}, so there is nothing to learn. Run: make "
            f"score-base; then choose easier or harder problems (SUBSET=1), other rewards, or more completions a "
            f"prompt. If this reward is the highest there is, set [health] warn_only = ['constant_reward'] and run it "
            f"again: it goes on from its last checkpoint"
        )
    if clipped_shares and min(clipped_shares) >= 1.0:
        signs["cut_off"] = (
            f"every completion was truncated {for_so_long}: the model has not learnt to end. Raise [grpo] "
            f"max_completion_tokens, or train SFT for longer"
        )
    for check, key, side, what, advice in BOUNDS:
        bound, values = getattr(knobs, key), lasting(check)
        if bound is not None and values and all(side * value > side * bound for value in values):
            beyond = "over" if side > 0 else "under"
            signs[check] = f"{what} was {beyond} [health] {key} = {bound} {for_so_long}; now {values[-1]:.3g}{advice}"
    return signs
