"""A shrunk configuration is valid and small, and keeps every ingredient and relation of the full
one.

Not covered: that it trains (tests/check).
"""

import dataclasses
from pathlib import Path

import pytest

from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, ParallelConfig
from nemotron_train.plan.architecture.layers import parameters
from nemotron_train.plan.derive import derive
from nemotron_train.plan.shrink import DIMENSIONS, alone, dimensions, one_rank, shrink

RUNS = ["nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b", "tiny", "proxy_10m"]
PLANS = ["fp32", "bf16", "mxfp8", "nvfp4_nemotron3", "nvfp4_then_mxfp8"]


# Integer knobs of the layout that do not count ranks. A new one belongs here or in DIMENSIONS.
NO_DIMENSION = {"bucket_parameters"}


def test_every_dimension_is_known() -> None:
    numbers = {f.name for f in dataclasses.fields(ParallelConfig) if f.type is int}
    assert numbers == set(DIMENSIONS) | NO_DIMENSION


def small(config: Config, max_ranks: int = 4, own_precision: bool = True):
    return shrink(config, Path("data"), max_ranks=max_ranks, steps=8, own_precision=own_precision)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("run", RUNS)
def test_every_recipe_keeps_its_ingredients(run: str, plan: str) -> None:
    config = compose_config([f"run={run}", f"precision={plan}"])
    shrunk = small(config)
    model, whole = shrunk.config.model, config.model
    assert derive(shrunk.config, shrunk.num_ranks).total_steps == 8
    assert parameters(model).total_with_mtp < 500_000
    assert set(model.pattern) - {"|"} == set(whole.pattern) - {"|"}
    assert model.pattern.replace("|", "") in whole.pattern.replace("|", "")
    assert (model.moe.latent_size > 0) == (whole.moe.latent_size > 0)
    assert (model.moe.shared_expert_hidden_size > 0) == (whole.moe.shared_expert_hidden_size > 0)
    assert (model.mtp.depths, model.mtp.pattern) == (whole.mtp.depths, whole.mtp.pattern)
    assert 1 < model.moe.experts_per_token < model.moe.experts
    assert model.attention.heads > model.attention.key_value_heads
    assert shrunk.config.precision.name == config.precision.name
    for field in dataclasses.fields(config.parallel):
        asked, now = (getattr(c.parallel, field.name) for c in (config, shrunk.config))
        degree = field.name in DIMENSIONS
        assert now == asked or (degree and now == min(asked, 2)) or field.name in NO_DIMENSION
    assert len(shrunk.config.data.phases) == max(1, len(config.data.phases))


def test_the_whole_configuration_is_left_alone() -> None:
    config = compose_config(["run=ultra_550b_a55b"])
    before = dataclasses.asdict(config)
    shrunk = small(config)
    assert dataclasses.asdict(config) == before
    assert ("model.hidden_size", 8192, 64) in shrunk.changes


def test_ranks_that_share_a_key_value_head_still_do() -> None:
    """Super has 2 key-value heads: 8 tensor-parallel ranks share them, 2 do not."""
    words = ["model=super_120b_a12b", "parallel.sequence=true"]
    shared = small(compose_config([*words, "parallel.tensor=8"])).config
    whole = small(compose_config([*words, "parallel.tensor=2"])).config
    assert shared.model.attention.key_value_heads == 1
    assert whole.model.attention.key_value_heads == 2
    assert shared.parallel.tensor == whole.parallel.tensor == 2


def test_one_dimension_alone() -> None:
    shrunk = small(compose_config(["run=ultra_550b_a55b"]))
    assert shrunk.num_ranks == 4
    assert dimensions(shrunk.config, 4) == ["tensor", "pipeline", "expert"]
    part, ranks = alone(shrunk.config, ("pipeline",), 1)
    assert (part.parallel.pipeline, part.parallel.tensor, part.parallel.sequence) == (2, 1, False)
    assert ranks == 2 and part.model.pattern == shrunk.config.model.pattern
    derive(part, ranks)
    part, ranks = alone(shrunk.config, ("tensor", "data"), 2)
    assert (part.parallel.tensor, part.parallel.sequence, ranks) == (2, True, 4)
    assert "|" not in part.model.pattern
    derive(part, ranks)
    derive(one_rank(shrunk.config), 1)


def test_a_layout_beyond_the_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 4; give --ranks 4"):
        small(compose_config(["run=ultra_550b_a55b"]), max_ranks=2)
