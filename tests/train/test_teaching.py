"""Groups that teach: the prompts of a step follow from seed, step and history, and idle groups only fill it up."""

import pytest

from stages.lib.train.teaching import Prompts, first_teaching, rows_of_groups, teaches


def test_without_repeats_every_problem_comes_once_an_epoch():
    prompts = Prompts(problems=6, sampled=3, repeated=0, seed=5)
    drawn = [prompts.draw(step) for step in range(4)]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == [0, 1, 2, 3, 4, 5]
    assert drawn[0] + drawn[1] != drawn[2] + drawn[3]


def test_a_share_is_drawn_from_problems_whose_last_group_had_an_advantage():
    prompts = Prompts(problems=100, sampled=4, repeated=2, seed=0)
    first = prompts.draw(0)
    prompts.learn(first, [True, True, False, False])
    second = prompts.draw(1)
    assert sorted(second[:2]) == sorted(first[:2])
    prompts.learn(second, [False, True, False, False])
    third = prompts.draw(2)
    assert third[0] == second[1]
    assert second[0] not in third


def test_a_step_asks_each_problem_once_also_across_the_end_of_an_epoch():
    prompts = Prompts(problems=5, sampled=4, repeated=3, seed=1)
    for step in range(50):
        chosen = prompts.draw(step)
        assert len(set(chosen)) == 4
        prompts.learn(chosen, [True, False, True, True])


def test_a_run_that_goes_on_draws_what_an_undisturbed_one_draws():
    whole, resumed = Prompts(20, 6, 2, seed=3), Prompts(20, 6, 2, seed=3)
    steps = []
    for step in range(8):
        steps.append(whole.draw(step))
        whole.learn(steps[-1], [place % 2 == 0 for place in range(6)])
        if step == 3:
            resumed.drawn, resumed.taught = whole.drawn, set(whole.taught)
    for step in range(4, 8):
        assert resumed.draw(step) == steps[step]
        resumed.learn(steps[step], [place % 2 == 0 for place in range(6)])


@pytest.mark.parametrize(
    ("has_advantage", "count", "kept"),
    [
        ([False, True, False, True, True], 2, [1, 3]),
        ([False, True, False, False], 2, [0, 1]),
        ([False, False, False], 2, [0, 1]),
        ([True, True], 2, [0, 1]),
    ],
)
def test_groups_with_an_advantage_go_first_and_the_first_others_fill_the_step(has_advantage, count, kept):
    assert first_teaching(has_advantage, count) == kept


def a_step():
    import torch

    return {
        "completion_ids": torch.arange(8).view(8, 1),
        "completion_mask": torch.tensor([[1, 1], [1, 0]] * 4),
        "advantages": torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 1.0, -1.0]),
        "num_items_in_batch": torch.tensor(12),
    }


@pytest.mark.torch
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_rows_and_the_divisor_of_a_step_depend_on_no_number_of_processes(ranks):
    parts = [rows_of_groups(a_step(), [1, 3], 2, rank, ranks) for rank in range(ranks)]
    assert sorted(row for part in parts for row in part["completion_ids"].flatten().tolist()) == [2, 3, 6, 7]
    assert {part["num_items_in_batch"].item() for part in parts} == {6}
    assert {len(part["advantages"]) for part in parts} == {4 // ranks}


@pytest.mark.torch
def test_a_truncated_completion_that_is_masked_does_not_teach():
    step = a_step()
    step["completion_mask"][2] = 0
    assert teaches(step).tolist() == [False, False, False, True, False, False, True, True]
