"""Split of the layers into pipeline stages: given by `|` in the pattern, or balanced by FLOPs.

A stage is a sequence of consecutive layers. With `parallel.virtual_pipeline` above 1, a rank holds
several stages: stage s is chunk s // pipeline of pipeline rank s % pipeline.

Owns: the split and its costs. The costs are model FLOPs (`plan.architecture.layers`), without
recomputation, the optimizer and communication; the embedding, a lookup, costs nothing. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import forward_flops, layers


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its part of the pattern without `|`, the decoder number of its first
    layer, its pipeline rank, and its forward FLOPs per token. The FLOPs of the last stage include
    the output layer and multi-token prediction."""

    pattern: str
    first_layer: int
    rank: int
    flops: int


def stages(config: Config) -> list[Stage]:
    """All stages in forward order. A pattern with `|` is split there. A pattern without is split
    into pipeline x virtual_pipeline stages such that the most expensive stage costs as little as
    possible."""
    length, model = config.train.sequence_length, config.model
    costs = [shape.forward_flops(length) for shape in layers(model) if not shape.in_mtp]
    after = forward_flops(model, length) - sum(costs)
    letters = model.pattern.replace("|", "")
    if "|" in model.pattern:
        sizes = [len(segment) for segment in model.pattern.split("|")]
    else:
        parallel = config.parallel
        sizes = balance(costs, parallel.pipeline * parallel.virtual_pipeline, after)
    result, start = [], 0
    for number, size in enumerate(sizes):
        flops = sum(costs[start : start + size]) + (after if number == len(sizes) - 1 else 0)
        rank = number % config.parallel.pipeline
        result.append(Stage(letters[start : start + size], start, rank, flops))
        start += size
    return result


def stage_pattern(config: Config) -> str:
    """The decoder's pattern with `|` between all stages, given or found by balancing."""
    return "|".join(stage.pattern for stage in stages(config))


def flops_by_rank(config: Config) -> list[int]:
    """Forward FLOPs per token on each pipeline rank, summed over its stages."""
    totals = [0] * config.parallel.pipeline
    for stage in stages(config):
        totals[stage.rank] += stage.flops
    return totals


def imbalance(costs: Sequence[int]) -> float:
    """Largest cost divided by the mean. At 1.25, the other ranks wait a fifth of the time."""
    return max(costs) * len(costs) / sum(costs)


def balance(costs: Sequence[int], num_stages: int, after: int = 0) -> list[int]:
    """Split `costs` into `num_stages` non-empty consecutive parts with the smallest possible
    largest sum. `after` is added to the last part. Returns the number of layers of each part.

    Among the splits with the smallest largest sum, it returns the one with the smallest sum of
    squares: if one stage is unavoidably expensive (the output layer), the others are still
    balanced. Dynamic programming over the end of each stage, O(stages x layers^2).
    """
    assert 1 <= num_stages <= len(costs)
    return list(_balance(tuple(costs), num_stages, after))


@lru_cache
def _balance(costs: tuple[int, ...], num_stages: int, after: int) -> tuple[int, ...]:
    num_layers = len(costs)
    prefix_sums = [0]
    for cost in costs:
        prefix_sums.append(prefix_sums[-1] + cost)

    def stage_cost(start: int, end: int, stage: int) -> int:
        return prefix_sums[end] - prefix_sums[start] + (after if stage == num_stages else 0)

    # smallest[end]: the smallest possible largest sum if the first `stage` stages have `end`
    # layers.
    smallest: list[float] = [
        stage_cost(0, end, 1) if end else float("inf") for end in range(num_layers + 1)
    ]
    for stage in range(2, num_stages + 1):
        smallest = [
            min(
                (
                    max(smallest[start], stage_cost(start, end, stage))
                    for start in range(stage - 1, end)
                ),
                default=float("inf"),
            )
            for end in range(num_layers + 1)
        ]
    limit = smallest[num_layers]

    # squares[end]: (smallest sum of squares, sizes) for the same, with no stage above `limit`.
    squares: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(1, num_stages + 1):
        best: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (total, sizes) in squares.items():
            for end in range(start + 1, num_layers + 1):
                cost = stage_cost(start, end, stage)
                if cost > limit:
                    break
                candidate = (total + cost * cost, (*sizes, end - start))
                if end not in best or candidate < best[end]:
                    best[end] = candidate
        squares = best
    return squares[num_layers][1]
