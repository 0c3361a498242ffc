"""Differences of shards against whole tensors, in closed form and without a model."""

import numpy as np
import pytest

from nemotron_train.check.compare import (
    Shard,
    assemble,
    by_module,
    depth,
    differences,
    module_of,
)

WHOLE = np.arange(1.0, 13.0, dtype=np.float32).reshape(4, 3)
ONE = [Shard("layer.weight", (4, 3), (0, 0), WHOLE)]


def halves(*factors: float) -> list[Shard]:
    return [
        Shard("layer.weight", (4, 3), (2 * rank, 0), factor * WHOLE[2 * rank : 2 * rank + 2], rank)
        for rank, factor in enumerate(factors)
    ]


def test_shards_add_up_to_the_whole() -> None:
    assert np.array_equal(assemble(halves(1, 1))["layer.weight"], WHOLE)
    assert differences(ONE, halves(1, 1))["layer.weight"].relative == 0.0


def test_the_wrong_shard_and_its_rank() -> None:
    found = differences(ONE, halves(1, 1.5))["layer.weight"]
    half = WHOLE[2:]
    size = np.sqrt(np.mean(np.square(WHOLE)))
    assert found.relative == pytest.approx(0.5 * np.sqrt(np.mean(np.square(half))) / size)
    assert found.rank == 1


def test_a_replica_that_disagrees_is_seen() -> None:
    replica = Shard("layer.weight", (4, 3), (0, 0), WHOLE * 1.1, 1)
    assert differences(ONE, [*ONE, replica])["layer.weight"].rank == 1


def test_what_is_missing_differs() -> None:
    assert differences(ONE, [])["layer.weight"].note == "on no rank"
    assert differences(ONE, halves(1))["layer.weight"].note == "in part on no rank"
    other = Shard("other.weight", (1,), (0,), np.ones(1, np.float32))
    assert differences(ONE, [*ONE, other])["other.weight"].note == "not on one rank"
    not_a_number = differences(ONE, halves(1, float("nan")))["layer.weight"]
    assert not_a_number.relative == float("inf")


def test_measured_against_the_change() -> None:
    """A change of one thousandth of the weights counts as 100 % of what the step changed."""
    start = [Shard("layer.weight", (4, 3), (0, 0), WHOLE / 1.001)]
    assert differences(ONE, start, start)["layer.weight"].relative == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("decoder.layers.0.mixer.in_proj.weight.z", "decoder.layers.0.mixer.in_proj"),
        ("decoder.layers.0.mixer.A_log", "decoder.layers.0.mixer"),
        ("decoder.layers.1.mlp.router.expert_bias", "decoder.layers.1.mlp.router"),
        ("output_layer.weight", "output_layer"),
    ],
)
def test_module_of_a_tensor(name: str, module: str) -> None:
    assert module_of(name) == module


def test_worst_module_first_and_depth() -> None:
    kinds = {"gradient": differences(ONE, halves(1, 2)), "update": differences(ONE, halves(1, 1))}
    (row,) = by_module(kinds)
    assert row.module == "layer" and row.relative == row.worst["gradient"].relative
    paths = ["output_layer", "mtp.layers.0.eh_proj", "decoder.layers.10.mlp", "decoder.layers.9"]
    assert sorted(paths, key=depth) == paths[::-1][:2] + paths[1::-1]
