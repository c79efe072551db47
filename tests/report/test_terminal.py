"""What stages print of their figures: every figure is there, and the columns are under each other."""

import pytest

from stages.lib.report import terminal
from tests.support.uploads import METRICS

SPREAD = {"mean": 1.0, "spread": 1.0954, "least": 0.0, "most": 2.0, "zero_variance": 2 / 3}
SCORES = {
    "model": "sft", "problems": 3, "completions": 6, "right": 0.5, "well_formed": 5 / 6, "cut_off": 1 / 6,
    "tokens": 4.0, "never_right": 1, "always_right": 1, "rewards": [{"name": "correct", "weight": 0.5, **SPREAD}],
    "total": SPREAD, "subset": 2, "advice": [],
}  # fmt: skip
PRINTED = {
    "prepare_data": """\
set    rows  prompt tokens  at most                             dropped
eval  1,517             61       93                                none
grpo  8,001             61       93               122 too close to eval
sft   7,999             61       93  2 duplicate, 122 too close to eval
from base-model (train): 8,123 rows; dropped: none
from base-model (eval): 1,517 rows; dropped: 3 no answer""",
    "score_base": """\
3 problems, 2 completions each, of the sft model: 50.0% right, 83.3% well formed, 16.7% truncated, 4.0 tokens
1 problems never right, 1 always
              weight   mean  spread  least   most  groups with zero variance
correct          0.5  1.000   1.095  0.000  2.000                      66.7%
weighted sum          1.000   1.095  0.000  2.000                      66.7%
2 problems are within the bounds: GRPO trains on these""",
    "infer": """\
      accuracy    95% interval  well formed  tokens  truncated
base      3.1%    1.1% to 5.1%        98.7%    87.2       1.3%
sft      25.2%  23.2% to 27.2%        98.7%    87.2       1.3%
grpo     74.3%  72.3% to 76.3%        98.7%    87.2       1.3%
base to sft: 301 problems gained, 9 lost, McNemar p = 1.5e-76
sft to grpo: 655 problems gained, 7 lost, McNemar p = 2.5e-158""",
    "merge": """\
merge: 3,200 positions of 50 prompts; mean KL from the adapter on its base 4.6e-07, of the base 1.1e+01 nats
merge: mean KL of the model as it was in training, in 4 bits, 1.2e-02 nats
merge: mean KL of the 4-bit model 3.4e-02 nats""",
    "gguf": """\
type     MB  mean KL   p99 KL   max KL  same top  perplexity  same text  right  flips  ended
q8_0    0.1  3.5e-04  3.5e-03  3.5e-02    97.21%      1.2346      92.5%  73.5%    7/3    198
q4_k_m  0.1  1.3e-02  1.3e-01  1.3e+00    97.21%      1.2346      92.5%  70.5%    7/3    198
lora    0.0  6.7e-05  6.7e-04  8.9e-04    99.78%      1.2346
merged                                                1.2345             74.0%           199
200 prompts, 6,400 positions; KL in nats against the merged model; right: 68.0% to 80.0% (95%) for the merged model; \
flips: answers gone wrong/right
llama-server prompts as trained in 207 of 207 conversations, 20,345 tokens""",
}
FIGURES = {
    **{name.replace("-", "_"): metrics for name, metrics in METRICS.items()},
    "score_base": SCORES,
    "merge": {**METRICS["merge"], "trained_in_4bit": {"mean_kl": 0.0123, "max_kl": 1.5, "same_top": 0.95}},
}


@pytest.mark.parametrize("stage", PRINTED)
def test_every_figure_is_printed(stage):
    assert getattr(terminal, stage)(FIGURES[stage]) == PRINTED[stage]


@pytest.mark.parametrize(
    ("stage", "optional", "lines"),
    [("score_base", {"subset"}, {5}), ("merge", {"trained_in_4bit", "merged_4bit"}, {1, 2}), ("gguf", {"lora"}, {3})],
)
def test_what_was_not_measured_is_not_printed(stage, optional, lines):
    figures = {key: value for key, value in FIGURES[stage].items() if key not in optional}
    expected = [line for place, line in enumerate(PRINTED[stage].split("\n")) if place not in lines]
    assert getattr(terminal, stage)(figures).split("\n") == expected


def test_drawn_answers_are_a_line_for_each_model_and_k_and_fit_80_columns():
    share = {"share": 0.125, "interval": [0.05, 0.3]}
    own = {"problems": 20, "samples": 2, "pass_at": {"1": share, "2": share | {"share": 0.25}},
           "majority_at": {"1": share, "2": share}}  # fmt: skip
    printed = terminal.infer({**METRICS["infer"], "sampled": {"base": own, "grpo": own}}).split("\n")
    assert printed[:6] == PRINTED["infer"].split("\n")
    assert printed[6:] == [
        "drawn  k  pass@k   95% interval  maj@k   95% interval",
        "base   1   12.5%  5.0% to 30.0%  12.5%  5.0% to 30.0%",
        "base   2   25.0%  5.0% to 30.0%  12.5%  5.0% to 30.0%",
        "grpo   1   12.5%  5.0% to 30.0%  12.5%  5.0% to 30.0%",
        "grpo   2   25.0%  5.0% to 30.0%  12.5%  5.0% to 30.0%",
    ]
