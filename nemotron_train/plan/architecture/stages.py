"""Which layers a pipeline stage holds: as the pattern says with `|`, or balanced by FLOPs.

A stage is a run of consecutive layers. With `parallel.virtual_pipeline` above 1 a rank holds
several: stage s lies on pipeline rank s % pipeline, as its chunk s // pipeline. Owns the cut and
its costs, not what runs on it. The costs are model FLOPs (`plan.architecture.layers`):
recomputation, the optimizer and communication are not in them, and the embedding, a lookup, costs
none. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nemotron_train.config.schema import Config
from nemotron_train.plan.architecture.layers import forward_flops, layers


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: `pattern` without separators, the number of its first layer in the
    decoder, the pipeline rank it lies on, and its forward FLOPs a token. The last stage's contain
    the output layer and multi-token prediction."""

    pattern: str
    first_layer: int
    rank: int
    flops: int


def stages(config: Config) -> list[Stage]:
    """All stages in the order of the forward pass. A pattern with `|` is cut there; one without
    into pipeline x virtual_pipeline stages, the most expensive as cheap as it can be."""
    length, model = config.train.sequence_length, config.model
    costs = [shape.forward_flops(length) for shape in layers(model) if not shape.in_mtp]
    after = forward_flops(model, length) - sum(costs)
    letters = model.pattern.replace("|", "")
    if "|" in model.pattern:
        sizes = [len(segment) for segment in model.pattern.split("|")]
    else:
        parallel = config.parallel
        sizes = balance(costs, parallel.pipeline * parallel.virtual_pipeline, after)
    found, start = [], 0
    for number, size in enumerate(sizes):
        flops = sum(costs[start : start + size]) + (after if number == len(sizes) - 1 else 0)
        rank = number % config.parallel.pipeline
        found.append(Stage(letters[start : start + size], start, rank, flops))
        start += size
    return found


def stage_pattern(config: Config) -> str:
    """The decoder's pattern with every `|`, asked for or found by balancing."""
    return "|".join(stage.pattern for stage in stages(config))


def flops_by_rank(config: Config) -> list[int]:
    """Forward FLOPs a token on each pipeline rank, all of its stages together."""
    totals = [0] * config.parallel.pipeline
    for stage in stages(config):
        totals[stage.rank] += stage.flops
    return totals


def imbalance(costs: Sequence[int]) -> float:
    """Largest cost over the mean: 1.25 means that the others wait a fifth of the time."""
    return max(costs) * len(costs) / sum(costs)


def balance(costs: Sequence[int], num_stages: int, after: int = 0) -> list[int]:
    """Cut `costs` into `num_stages` runs, none empty, whose largest sum is smallest, the last
    with `after` more; returns how many each takes.

    Of the cuts with the smallest largest sum, the one with the smallest sum of squares: where one
    stage must be expensive (the output layer), the others are still even. Dynamic programming over
    where a stage ends, O(stages x layers^2).
    """
    assert 1 <= num_stages <= len(costs)
    return list(_balance(tuple(costs), num_stages, after))


@lru_cache
def _balance(costs: tuple[int, ...], num_stages: int, after: int) -> tuple[int, ...]:
    num_layers = len(costs)
    before = [0]
    for cost in costs:
        before.append(before[-1] + cost)

    def run(start: int, end: int, stage: int) -> int:
        return before[end] - before[start] + (after if stage == num_stages else 0)

    # smallest[end]: the least possible largest sum of the first `stage` stages, `end` layers.
    smallest: list[float] = [
        run(0, end, 1) if end else float("inf") for end in range(num_layers + 1)
    ]
    for stage in range(2, num_stages + 1):
        smallest = [
            min(
                (max(smallest[start], run(start, end, stage)) for start in range(stage - 1, end)),
                default=float("inf"),
            )
            for end in range(num_layers + 1)
        ]
    limit = smallest[num_layers]

    squares: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(1, num_stages + 1):
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (total, sizes) in squares.items():
            for end in range(start + 1, num_layers + 1):
                cost = run(start, end, stage)
                if cost > limit:
                    break
                candidate = (total + cost * cost, (*sizes, end - start))
                if end not in reached or candidate < reached[end]:
                    reached[end] = candidate
        squares = reached
    return squares[num_layers][1]
