"""Whether quantized blocks fit the sizes that a rank holds, and where zeros are padded.

Owns: the size each matrix product sums over on one rank, the padding of a size that is no multiple
of the format's block, the refusal of cuts through a block. Does not own: which format a product
has (plan.py), the padding itself (precision/linear.py and the quantizers). No torch.

Zeros at the end of a sum change neither scales nor result, so an uncut dimension is padded and the
plan says so. A dimension that ranks share out must be cut between blocks: otherwise blocks would
end at the cut, and two ranks would compute other numbers than one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, GemmFormat, ParallelConfig
from nemotron_train.plan.architecture.layers import Linear, Sharding

# Elements that share a scale, along the dimension that a product sums over.
BLOCK = {GemmFormat.nvfp4: 16, GemmFormat.mxfp8: 32}

# Rows to whose multiple emulation pads an expert's tokens: whole blocks in every format, so that
# the layout of the rows does not depend on the plan.
EXPERT_ROWS = 32

# Cut along their inputs; every other sharded linear is cut along its outputs.
_ROW_PARALLEL = ("out_proj", "linear_proj", "linear_fc2")


@dataclass(frozen=True)
class Shard:
    """One rank's part of a linear: features and, for the message, what cuts them (or "")."""

    in_size: int
    out_size: int
    in_cut_by: str
    out_cut_by: str


@dataclass(frozen=True)
class Padding:
    """`role` of the linear at `path` sums over `size` numbers, padded to `padded`."""

    path: str
    role: str
    format: GemmFormat
    size: int
    padded: int


def shard(linear: Linear, parallel: ParallelConfig) -> Shard:
    """The sizes of one rank's part (of each expert's matrix, for experts)."""
    knob, ranks = {
        Sharding.replicated: ("", 1),
        Sharding.tensor: ("parallel.tensor", parallel.tensor),
        Sharding.expert: ("parallel.expert_tensor", parallel.expert_tensor),
    }[linear.sharding]
    cut = f"{knob}={ranks}" if ranks > 1 else ""
    if linear.path.endswith(_ROW_PARALLEL):
        return Shard(linear.in_size // ranks, linear.out_size, cut, "")
    return Shard(linear.in_size, linear.out_size // ranks, "", cut)


def tokens_per_product(linear: Linear, config: Config) -> int:
    """What wgrad sums over on a rank: its tokens of a micro batch; 0 for routed experts, each of
    which sums over the tokens it is sent."""
    train, parallel = config.train, config.parallel
    tokens = train.micro_batch_sequences * train.sequence_length // parallel.context
    if linear.sharding == Sharding.expert:
        return 0
    if linear.sharding == Sharding.replicated and parallel.sequence:
        return tokens // parallel.tensor
    return tokens


class Formats(Protocol):
    """What blocking asks about a linear's formats (`plan.LinearFormats`)."""

    @property
    def fprop(self) -> GemmFormat: ...
    @property
    def dgrad(self) -> GemmFormat: ...
    @property
    def wgrad(self) -> GemmFormat: ...
    @property
    def weight_2d(self) -> bool: ...


def paddings(config: Config, plan: Iterable[tuple[Linear, Formats]]) -> list[Padding]:
    """Every sum that is padded to whole blocks, in order; routed experts' tokens, which differ
    from step to step, left out.

    Raises ConfigError naming the module, the product and the sizes where ranks cut through blocks.
    """
    found, context = [], config.parallel.context
    pieces = f"parallel.context={context}" if context > 1 else ""
    for linear, formats in plan:
        part = shard(linear, config.parallel)
        sums = {
            "fprop": (part.in_size, part.in_cut_by),
            "dgrad": (part.out_size, part.out_cut_by),
            "wgrad": (tokens_per_product(linear, config), pieces),
        }
        for role, (size, cut_by) in sums.items():
            name = getattr(formats, role)
            block = BLOCK.get(name, 1)
            if size % block and cut_by:
                raise ConfigError(_cut_through(linear, f"{role} in {name}", block, size, cut_by))
            if size % block:
                found.append(Padding(linear.path, role, name, size, -(-size // block) * block))
        for size, cut_by in (sums["fprop"], sums["dgrad"]):
            if formats.weight_2d and cut_by and size % BLOCK[GemmFormat.nvfp4]:
                what = "its weight in nvfp4 (weight_2d=true)"
                raise ConfigError(_cut_through(linear, what, BLOCK[GemmFormat.nvfp4], size, cut_by))
    return found


def _cut_through(linear: Linear, what: str, block: int, size: int, cut_by: str) -> str:
    whole = size * int(cut_by.rpartition("=")[2])
    return (
        f"{linear.path}: {what} needs blocks of {block}, but {cut_by} leaves a rank {size} of "
        f"{whole}, no multiple of {block}; cut less, change the model's sizes, or give the module "
        "another format in precision.rules"
    )
