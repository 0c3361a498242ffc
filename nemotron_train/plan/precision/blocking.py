"""Checks that quantized blocks fit the sizes on one rank, and the places that need zero padding.

Owns: the size that each matrix product sums over on one rank, the padding of sizes that are no
multiple of the block size, the error if a shard boundary lies inside a block. Does not own: the
format of a product (`resolve`), the padding operation (precision/linear.py and the quantizers). No
torch.

Zeros at the end of a sum change neither the scales nor the result. So an unsharded dimension is
padded, and the plan reports it. A sharded dimension must be split between blocks: otherwise blocks
would end at the shard boundary, and two ranks would compute different results than one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from nemotron_train.config.errors import ConfigError
from nemotron_train.config.schema import Config, GemmFormat, ParallelConfig
from nemotron_train.plan.architecture.layers import Linear, Sharding

# Number of elements that share a scale, along the summed dimension of a product.
BLOCK = {GemmFormat.nvfp4: 16, GemmFormat.mxfp8: 32}

# Emulation pads the tokens of each expert to a multiple of this number of rows: whole blocks in
# every format, so that the layout of the rows does not depend on the plan.
EXPERT_ROWS = 32

# Sharded along their inputs; all other sharded linears are sharded along their outputs.
_ROW_PARALLEL = ("out_proj", "linear_proj", "linear_fc2")


@dataclass(frozen=True)
class Shard:
    """One rank's shard of a linear: numbers of features, and the knob and number of ranks that
    shard them (or "")."""

    in_size: int
    out_size: int
    in_cut_by: str
    out_cut_by: str


@dataclass(frozen=True)
class Padding:
    """The product `role` of the linear at `path` sums over `size` elements, padded to `padded`."""

    path: str
    role: str
    format: GemmFormat
    size: int
    padded: int


def shard(linear: Linear, parallel: ParallelConfig) -> Shard:
    """The sizes of one rank's shard of a linear (for experts: of each expert's matrix)."""
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
    """The number of tokens that wgrad sums over on a rank in one micro-batch. 0 for routed experts,
    because it depends on the routing."""
    train, parallel = config.train, config.parallel
    tokens = train.micro_batch_sequences * train.sequence_length // parallel.context
    if linear.sharding == Sharding.expert:
        return 0
    if linear.sharding == Sharding.replicated and parallel.sequence:
        return tokens // parallel.tensor
    return tokens


class Formats(Protocol):
    """The fields of `resolve.LinearFormats` that this module needs."""

    @property
    def fprop(self) -> GemmFormat: ...
    @property
    def dgrad(self) -> GemmFormat: ...
    @property
    def wgrad(self) -> GemmFormat: ...
    @property
    def weight_2d(self) -> bool: ...


def paddings(config: Config, plan: Iterable[tuple[Linear, Formats]]) -> list[Padding]:
    """Every product whose summed dimension is padded to whole blocks, in order. Excludes the tokens
    of routed experts, whose number differs between steps.

    Raises ConfigError with the module, the product and the sizes if a shard boundary lies inside a
    block.
    """
    result, context = [], config.parallel.context
    token_cut = f"parallel.context={context}" if context > 1 else ""
    for linear, formats in plan:
        local = shard(linear, config.parallel)
        sums = {
            "fprop": (local.in_size, local.in_cut_by),
            "dgrad": (local.out_size, local.out_cut_by),
            "wgrad": (tokens_per_product(linear, config), token_cut),
        }
        for role, (size, cut_by) in sums.items():
            name = getattr(formats, role)
            block = BLOCK.get(name, 1)
            if size % block and cut_by:
                raise ConfigError(_cut_through(linear, f"{role} in {name}", block, size, cut_by))
            if size % block:
                result.append(Padding(linear.path, role, name, size, -(-size // block) * block))
        for size, cut_by in (sums["fprop"], sums["dgrad"]):
            if formats.weight_2d and cut_by and size % BLOCK[GemmFormat.nvfp4]:
                subject = "its weight in nvfp4 (weight_2d=true)"
                raise ConfigError(
                    _cut_through(linear, subject, BLOCK[GemmFormat.nvfp4], size, cut_by)
                )
    return result


def _cut_through(linear: Linear, subject: str, block: int, size: int, cut_by: str) -> str:
    whole = size * int(cut_by.rpartition("=")[2])
    return (
        f"{linear.path}: {subject} needs blocks of {block}, but {cut_by} leaves a rank {size} of "
        f"{whole}, no multiple of {block}; cut less, change the model's sizes, or give the module "
        "another format in precision.rules"
    )
