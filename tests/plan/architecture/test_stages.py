"""Pipeline stages: the cut by FLOPs against all possible cuts, and the stage of each layer.

Second truth: enumeration. Not covered: whether FLOPs predict time on a given machine.
"""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from nemotron_train.compose.compose import compose_config
from nemotron_train.plan.architecture.layers import forward_flops
from nemotron_train.plan.architecture.stages import (
    balance,
    flops_by_rank,
    imbalance,
    stage_pattern,
    stages,
)


def sums(costs: list[int], sizes: tuple[int, ...] | list[int], after: int) -> list[int]:
    """Cost of each stage of `sizes` layers. The last stage has `after` more."""
    found, start = [], 0
    for size in sizes:
        found.append(sum(costs[start : start + size]))
        start += size
    found[-1] += after
    return found


@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    num_stages=st.integers(1, 5),
    after=st.integers(0, 120),
)
def test_no_other_cut_is_better(costs: list[int], num_stages: int, after: int) -> None:
    num_stages = min(num_stages, len(costs))
    ours = balance(costs, num_stages, after)
    assert sum(ours) == len(costs) and len(ours) == num_stages and min(ours) >= 1

    def rank(sizes: tuple[int, ...] | list[int]) -> tuple[int, int]:
        each = sums(costs, sizes, after)
        return max(each), sum(cost * cost for cost in each)

    cuts = combinations(range(1, len(costs)), num_stages - 1)
    every = [tuple(b - a for a, b in pairwise((0, *cut, len(costs)))) for cut in cuts]
    assert rank(ours) == min(map(rank, every))


def test_the_output_layer_and_prediction_count_on_the_last_stage() -> None:
    """If the vocabulary is large compared with the layers, the last stage gets few layers."""
    config = compose_config(["parallel.pipeline=2"])
    first, last = stages(config)
    assert (first.pattern, last.pattern) == ("MEM*EM", "E")
    whole = forward_flops(config.model, config.train.sequence_length)
    assert first.flops + last.flops == whole
    assert last.flops > whole / 2
    assert imbalance([first.flops, last.flops]) == 2 * last.flops / whole


def test_a_hand_written_pattern_overrides() -> None:
    config = compose_config(["parallel.pipeline=2", "model.pattern='ME|M*EME'"])
    assert stage_pattern(config) == "ME|M*EME"
    assert [stage.first_layer for stage in stages(config)] == [0, 2]


def test_interleaved_stages_go_round_the_ranks() -> None:
    pattern = "model.pattern='M|EM|*E|ME'"
    config = compose_config(["parallel.pipeline=2", "parallel.virtual_pipeline=2", pattern])
    found = stages(config)
    assert [stage.rank for stage in found] == [0, 1, 0, 1]
    assert flops_by_rank(config) == [
        found[0].flops + found[2].flops,
        found[1].flops + found[3].flops,
    ]


def test_a_large_recipe_is_cut_evenly() -> None:
    """Ultra's 108 layers in 12 stages: closer to the mean than the manual cut of the recipe."""
    by_hand = compose_config(["run=ultra_550b_a55b"])
    pattern = by_hand.model.pattern.replace("|", "")
    balanced = compose_config(["run=ultra_550b_a55b", f"model.pattern='{pattern}'"])
    spread = [imbalance([s.flops for s in stages(c)]) for c in (balanced, by_hand)]
    assert spread[0] <= spread[1]
