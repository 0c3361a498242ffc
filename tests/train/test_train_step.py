"""The loss and learning rate of a step, by their formulas.

Not covered: several ranks (tests/distributed) and what the optimizer does with the gradients
(tests/optim).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nemotron_train.cli.main import main
from nemotron_train.compose.compose import compose_config
from nemotron_train.train.train_step import head_weights


@pytest.mark.parametrize("depths", [1, 2, 4])
def test_the_mtp_loss_is_the_mean_over_depths(depths: int) -> None:
    """L = L_main + lambda / D * sum of L_k (DeepSeek-V3, arXiv 2412.19437, eq. 24-25; Megatron's
    mtp_loss_scaling_factor / mtp_num_layers). The total weight does not grow with the number of
    depths."""
    config = compose_config([f"model.mtp.depths={depths}", "model.mtp.loss_scale=0.3"])
    np.testing.assert_allclose(head_weights(config), [1.0] + [0.3 / depths] * depths)


def test_without_depths_the_main_head_is_all() -> None:
    config = compose_config(["model.mtp.depths=0"])
    np.testing.assert_array_equal(head_weights(config), [1.0])


@pytest.fixture
def in_small_run(small_run: tuple[Path, list[str]]) -> Iterator[list[str]]:
    before = Path.cwd()
    os.chdir(small_run[0])
    yield small_run[1]
    os.chdir(before)


def test_a_step_has_the_rate_of_its_own_tokens(in_small_run: list[str]) -> None:
    """Step n ends at 256 n tokens. Warm-up of 512: half the peak at step 1, the peak at step 2.
    Decay over the last 1,024 of 2,560: step 6 still has the peak, step 10 exactly the minimum."""
    knobs = ["name=rates", "optim.peak_learning_rate=0.004", "optim.min_learning_rate=0.0001"]
    assert main(["pretrain", *in_small_run, *knobs, "optim.decay_style=linear"]) == 0
    rows = [json.loads(line) for line in Path("runs/rates/metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    decay = [0.004 - 0.0039 * step / 4 for step in range(1, 5)]
    assert rates == pytest.approx([0.002] + [0.004] * 5 + decay, rel=1e-12)
