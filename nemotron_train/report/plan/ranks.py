"""`plan`'s table of process groups: which ranks form them.

Owns: the arithmetic of Megatron-Core's grid (parallel_state.RankGenerator, order tp-cp-ep-dp-pp:
the first axis varies fastest) and its text. Does not own: what the groups exchange.

There are two grids with the same pipeline axis. Dense layers have tensor, context and data axes;
experts have expert-tensor, expert and expert-data axes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemotron_train.config.schema import Config
from nemotron_train.plan.derive import Derived

GROUP_COLUMNS = ("group", "ranks each", "stride", "groups", "members")
_SHOWN_GROUPS, _SHOWN_RANKS = 3, 8


@dataclass(frozen=True)
class Axis:
    """One axis of a grid: ranks r, r + stride, ... form a group of `size` ranks."""

    name: str
    size: int
    stride: int

    def groups(self, num_ranks: int) -> Iterator[range]:
        """All groups along this axis, ordered by their first rank."""
        span = self.size * self.stride
        for block in range(0, num_ranks, span):
            for first in range(block, block + self.stride):
                yield range(first, block + span, self.stride)


def axes(config: Config, derived: Derived) -> list[Axis]:
    """Every axis of both grids, fastest-varying first, including those of size 1."""
    parallel = config.parallel
    data_stride = parallel.tensor * parallel.context
    expert_data_stride = parallel.expert_tensor * parallel.expert
    return [
        Axis("tensor", parallel.tensor, 1),
        Axis("context", parallel.context, parallel.tensor),
        Axis("data", derived.data_parallel, data_stride),
        Axis("expert tensor", parallel.expert_tensor, 1),
        Axis("expert", parallel.expert, parallel.expert_tensor),
        Axis("expert data", derived.expert_data_parallel, expert_data_stride),
        Axis("pipeline", parallel.pipeline, derived.num_ranks // parallel.pipeline),
    ]


def group_rows(config: Config, derived: Derived) -> Iterator[Sequence[str]]:
    """One row per axis of more than one rank, with the members of the first groups."""
    for axis in axes(config, derived):
        if axis.size == 1:
            continue
        count = derived.num_ranks // axis.size
        first = zip(range(_SHOWN_GROUPS), axis.groups(derived.num_ranks), strict=False)
        shown = ", ".join(_members(group) for _, group in first)
        more = ", ..." if count > _SHOWN_GROUPS else ""
        yield axis.name, f"{axis.size:,}", f"{axis.stride:,}", f"{count:,}", shown + more


def _members(group: range) -> str:
    """Such as [0 4 8 12]; the middle of a long group is left out."""
    if len(group) <= _SHOWN_RANKS:
        return f"[{' '.join(map(str, group))}]"
    return f"[{group[0]} {group[1]} .. {group[-1]}]"
