"""The runs of bench/scaling.py: each can be shared by its GPUs, up to eight."""

from bench.scaling import MICRO_BATCH, STRONG, runs_of


def test_weak_and_strong_runs_of_up_to_eight_gpus_are_asked_for_once_each():
    runs = runs_of(["qwen3-1.7b"], [1, 2, 4, 8])
    asked = {(int(gpus), int(completions)) for _, gpus, completions in (run.split(":") for run in runs)}
    assert len(runs) == len(asked)
    assert {(1, 256), (2, 512), (4, 1024), (8, 2048)} < asked  # weak
    assert {(gpus, completions) for gpus in (1, 2, 4, 8) for completions in STRONG} < asked


def test_each_rank_of_each_run_has_whole_micro_batches():
    for run in runs_of(list(MICRO_BATCH), [1, 2, 4, 8]):
        shape, gpus, completions = run.split(":")
        assert int(completions) % (int(gpus) * MICRO_BATCH[shape]) == 0, run
