"""A checkpoint loaded into a trainer that has already computed with other weights.

Second truth: the trainer that saved. Not covered: several ranks (tests/distributed).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemotron_train.compose.compose import compose_config
from nemotron_train.data.open import open_data
from nemotron_train.plan.derive import derive
from nemotron_train.platform import device


@pytest.fixture
def in_small_run(small_run: tuple[Path, list[str]]) -> Iterator[list[str]]:
    before = Path.cwd()
    os.chdir(small_run[0])
    yield small_run[1]
    os.chdir(before)


def build(overrides: list[str], folder: Path, groups: Any) -> Any:
    from nemotron_train.train.trainer import Trainer

    config = compose_config(overrides)
    data = open_data(config, print)
    platform = device.prepare()
    return Trainer(config, derive(config), platform, groups, *data, folder, Console(quiet=True))


def test_quantized_weights_of_before_are_not_used_after_loading(
    in_small_run: list[str], groups: Any, tmp_path: Path
) -> None:
    """NVFP4 keeps each quantized weight until the weights change. Loading changes them."""
    words = [*in_small_run, "precision=nvfp4_all"]
    trained = build(words, tmp_path, groups)
    progress = trained.resume()
    for _ in range(2):
        progress = trained.train_step(progress).progress
    trained.checkpoints.save(progress)
    saved_losses = trained.validate()

    resumed = build([*words, "train.seed=77"], tmp_path, groups)
    untrained_losses = resumed.validate()  # quantizes and caches other weights
    path, loaded = resumed.roll_back()
    assert loaded.step == 2 and path.name.endswith("2")
    assert untrained_losses != saved_losses
    assert resumed.validate() == saved_losses
