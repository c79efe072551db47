"""Signs in a training log of a run that wastes GPU hours, and what to do about each."""

import math
from collections.abc import Sequence

from stages.lib.recipe.tables import Health


def find(log: Sequence[dict[str, float]], knobs: Health, *, scaled: bool = False) -> dict[str, str]:
    """Return what is wrong at the end of `log`, by the name of the check: what was seen and what to do.

    `log` has the trainer's entries, oldest first, a dict of metrics each; a metric without any value is not checked.
    A loss or gradient norm that is not finite counts at once. Any other sign counts when the last `knobs.log_entries`
    values show it; so does the gradient norm of a loss that is `scaled` for float16, where an overflow skips the step.
    """
    found = {}
    for name, count in (("loss", 1), ("grad_norm", knobs.log_entries if scaled else 1)):
        values = [entry.get(name, 0.0) for entry in log[-count:]]
        if len(values) == count and not any(map(math.isfinite, values)):
            found["nan"] = (
                f"{name} is {values[-1]}. Lower learning_rate or max_grad_norm, or train in bfloat16: in float16 large "
                f"activations overflow"
            )

    def recent(name: str) -> list[float]:  # with num_iterations over 1, only every so many entries have some metrics
        return [entry[name] for entry in log if name in entry][-knobs.log_entries :]

    def all_of(name: str, test) -> bool:
        return len(recent(name)) == knobs.log_entries and all(map(test, recent(name)))

    for_so_long = f"for {knobs.log_entries} logged steps"
    if all_of("frac_reward_zero_std", lambda value: value >= 1.0):  # a share of groups; reward_std is over all groups
        found["constant_reward"] = (
            f"in each group all completions were rewarded alike {for_so_long}, so there is nothing to learn. Run: make "
            f"score-base; then choose easier or harder problems (SUBSET=1), other rewards, or more completions a "
            f"prompt. If this reward is the highest there is, set [health] warn_only = ['constant_reward'] and run it "
            f"again: it goes on from its last checkpoint"
        )
    if all_of("completions/clipped_ratio", lambda value: value >= 1.0):
        found["cut_off"] = (
            f"every completion was truncated {for_so_long}: the model has not learnt to end. Raise [grpo] "
            f"max_completion_tokens, or train SFT for longer"
        )
    if knobs.max_kl is not None and all_of("kl", lambda value: value > knobs.max_kl):
        found["kl"] = (
            f"the KL divergence from the reference was over [health] max_kl = {knobs.max_kl} {for_so_long}; now "
            f"{recent('kl')[-1]:.3g}. Lower learning_rate, or raise beta"
        )
    low, high = knobs.min_entropy, knobs.max_entropy
    if low is not None and all_of("entropy", lambda value: value < low):
        found["entropy"] = (
            f"the entropy of a token was under [health] min_entropy = {low} {for_so_long}; now "
            f"{recent('entropy')[-1]:.3g}: the completions hardly differ. Raise epsilon_high or temperature, or lower "
            f"learning_rate"
        )
    if high is not None and all_of("entropy", lambda value: value > high):
        found["entropy"] = (
            f"the entropy of a token was over [health] max_entropy = {high} {for_so_long}; now "
            f"{recent('entropy')[-1]:.3g}: the completions become noise. Lower learning_rate, or raise beta"
        )
    return found
