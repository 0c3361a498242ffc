"""`plan`'s table of process groups: which ranks form them.

Owns the arithmetic of Megatron-Core's grid (parallel_state.RankGenerator, order tp-cp-ep-dp-pp: the
first axis runs fastest) and its text. Two grids share the pipeline's cut: dense layers have tensor,
context and data axes, experts expert-tensor, expert and their own data axes. Does not own what the
groups exchange.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemotron_train.config.schema import Config
from nemotron_train.plan.derive import Derived

GROUP_COLUMNS = ("group", "ranks each", "stride", "groups", "members")
_SHOWN_GROUPS, _SHOWN_RANKS = 3, 8


@dataclass(frozen=True)
class Axis:
    """Ranks r, r + stride, ... form a group of `size`."""

    name: str
    size: int
    stride: int

    def groups(self, num_ranks: int) -> Iterator[range]:
        """All groups of this kind, by their first rank."""
        reach = self.size * self.stride
        for block in range(0, num_ranks, reach):
            for first in range(block, block + self.stride):
                yield range(first, block + reach, self.stride)


def axes(config: Config, derived: Derived) -> list[Axis]:
    """Every axis of both grids, fastest first; those of size 1 too."""
    parallel = config.parallel
    data = parallel.tensor * parallel.context
    experts = parallel.expert_tensor * parallel.expert
    return [
        Axis("tensor", parallel.tensor, 1),
        Axis("context", parallel.context, parallel.tensor),
        Axis("data", derived.data_parallel, data),
        Axis("expert tensor", parallel.expert_tensor, 1),
        Axis("expert", parallel.expert, parallel.expert_tensor),
        Axis("expert data", derived.expert_data_parallel, experts),
        Axis("pipeline", parallel.pipeline, derived.num_ranks // parallel.pipeline),
    ]


def group_rows(config: Config, derived: Derived) -> Iterator[Sequence[str]]:
    """One row an axis of more than one rank; the first groups spelled out."""
    for axis in axes(config, derived):
        if axis.size == 1:
            continue
        count = derived.num_ranks // axis.size
        first = zip(range(_SHOWN_GROUPS), axis.groups(derived.num_ranks), strict=False)
        shown = ", ".join(_members(group) for _, group in first)
        more = ", ..." if count > _SHOWN_GROUPS else ""
        yield axis.name, f"{axis.size:,}", f"{axis.stride:,}", f"{count:,}", shown + more


def _members(group: range) -> str:
    """[0 4 8 12], or with the middle left out where a group is long."""
    if len(group) <= _SHOWN_RANKS:
        return f"[{' '.join(map(str, group))}]"
    return f"[{group[0]} {group[1]} .. {group[-1]}]"
