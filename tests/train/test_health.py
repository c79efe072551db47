"""Each sign of a wasted run is found when it lasts, and not before."""

import math

import pytest

from stages.lib.recipe.tables import Health
from stages.lib.train import health

KNOBS = Health(log_entries=3, max_kl=0.5, min_entropy=0.1, max_entropy=4.0)
WELL = {"loss": 0.1, "grad_norm": 0.5, "reward_std": 0.3, "frac_reward_zero_std": 0.5, "kl": 0.01, "entropy": 1.0}
WELL |= {"completions/clipped_ratio": 0.2}
SIGNS = [
    ("constant_reward", {"frac_reward_zero_std": 1.0}),  # some groups all right and others all wrong, at that
    ("cut_off", {"completions/clipped_ratio": 1.0}),
    ("kl", {"kl": 0.6}),
    ("entropy", {"entropy": 0.05}),
    ("entropy", {"entropy": 4.5}),
]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_or_gradient_that_is_no_number_counts_at_once(name, value):
    assert list(health.find([WELL | {name: value}], KNOBS)) == ["nan"]


def test_a_scaled_gradient_that_overflows_is_a_skipped_step_unless_all_do():
    ill = WELL | {"grad_norm": math.inf}
    assert health.find([WELL, ill, ill], KNOBS, scaled=True) == {}
    assert health.find([ill], KNOBS, scaled=True) == {}
    assert list(health.find([ill] * 3, KNOBS, scaled=True)) == ["nan"]
    assert list(health.find([WELL | {"loss": math.nan}], KNOBS, scaled=True)) == ["nan"]


@pytest.mark.parametrize(("check", "sign"), SIGNS)
def test_a_sign_counts_when_so_many_entries_in_a_row_show_it(check, sign):
    ill = WELL | sign
    assert health.find([ill, ill], KNOBS) == {}
    assert list(health.find([ill, ill, ill], KNOBS)) == [check]
    assert list(health.find([WELL, WELL, ill, ill, ill], KNOBS)) == [check]
    assert health.find([ill, ill, WELL], KNOBS) == {}
    assert health.find([ill, WELL, ill, ill], KNOBS) == {}


@pytest.mark.parametrize(("check", "sign"), SIGNS)
def test_a_metric_that_is_logged_in_every_second_entry_counts_where_it_is(check, sign):
    ill, without = WELL | sign, {"loss": 0.1}
    assert health.find([ill, without, ill, without], KNOBS) == {}
    assert list(health.find([ill, without, ill, without, ill, without], KNOBS)) == [check]
    assert health.find([ill, without, WELL, without, ill, without], KNOBS) == {}


@pytest.mark.parametrize(("check", "sign"), SIGNS)
def test_advice_names_what_was_seen_and_a_knob_or_command(check, sign):
    text = health.find([WELL | sign] * 3, KNOBS)[check]
    assert "for 3 logged steps" in text
    assert any(word in text for word in ("make score-base", "max_completion_tokens", "learning_rate", "epsilon_high"))


def test_a_healthy_log_a_missing_metric_and_an_empty_log_show_nothing():
    assert health.find([WELL] * 9, KNOBS) == {}
    assert health.find([{"loss": 0.1}] * 9, KNOBS) == {}
    assert health.find([], KNOBS) == {}


def test_bounds_that_are_not_set_are_not_checked():
    wild = WELL | {"kl": 99.0, "entropy": 99.0}
    assert health.find([wild] * 3, Health(log_entries=3)) == {}


def test_several_signs_are_all_told():
    ill = WELL | {"frac_reward_zero_std": 1.0, "completions/clipped_ratio": 1.0, "loss": math.nan}
    assert set(health.find([ill] * 3, KNOBS)) == {"nan", "constant_reward", "cut_off"}
