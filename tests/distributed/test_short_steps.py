"""Steps of short rows between long ones under each layout of two ranks, against one rank.

Second truth: the run on one rank in FP32. Covers that stages pass on rows of either length and that
context ranks shard both. Not covered: products of layouts.
"""

from pathlib import Path

import pytest

from benchmarks.layouts import LAYOUTS, Job, difference, run_world

pytestmark = pytest.mark.layouts

TWO_RANKS = [name for name, (ranks, _) in LAYOUTS.items() if ranks == 2]


def test_short_steps_are_one_ranks(small_run: tuple[Path, list[str]]) -> None:
    folder, overrides = small_run
    common = [*overrides, "train.micro_batch_sequences=1", "model.pattern=MEM*EME"]
    common += ["train.short_sequence_length=16", "train.short_share=0.5"]
    (one,) = run_world(1, [Job("short one rank", common, 10)], folder, 3000)
    assert [row["sequence_length"] for row in one.rows] == [64, 16] * 5
    jobs = [Job(f"short {name}", common + LAYOUTS[name][1], 10) for name in TWO_RANKS]
    for run in run_world(2, jobs, folder, 3000):
        for metric in ("loss", "mtp_loss_1", "mtp_loss_2"):
            assert difference(run, one, metric) <= 1e-5, (run.name, metric)
