"""Context parallelism: one sequence over several ranks, each with a contiguous piece of it.

Owns: the pieces of a row, and the all-to-all that Mamba-2 and attention need. Before layers that
mix tokens, a rank exchanges its piece of all heads for the whole sequence of some heads, and back
after them (arXiv 2309.14509 does so for attention). Does not own: the arithmetic between the
exchanges, which always gets whole sequences; the reduction of gradients (Megatron, over all data-
and context-parallel ranks). docs/decisions/0004-context-parallelism.md gives the reasons.

Token ids, labels, loss masks and document ids are small, so every rank has whole rows of them.
Shifting them for multi-token prediction and finding document boundaries needs no communication.

Shapes: S tokens of the whole sequence, s = S / ranks of a piece, B rows, W channels of one part, F
channels of all parts together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def piece(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece of whole rows: [B,S] -> [B,s], a view."""
    if group.size() == 1:
        return x_BS
    length = x_BS.shape[1] // group.size()
    return x_BS[:, group.rank() * length : (group.rank() + 1) * length]


def shares(count: int, width: int, num_ranks: int) -> list[slice]:
    """The channels of each rank, for `count` packed heads of `width` channels each.

    Each rank gets an equal run of heads. With fewer heads than ranks, num_ranks / count consecutive
    ranks share one head. That is the key/value head (Mamba-2: the group) that the query heads
    (Mamba-2: the heads) of those ranks read, since these are split in equal runs too.
    """
    assert count % num_ranks == 0 or num_ranks % count == 0, (count, num_ranks)
    heads_per_rank = max(1, count // num_ranks)
    starts = (rank * count // num_ranks for rank in range(num_ranks))
    return [slice(start * width, (start + heads_per_rank) * width) for start in starts]


class HeadExchange:
    """Exchange between this rank's tokens of all heads and all tokens of this rank's heads.

    parts: (heads, channels a head) of each packed part on this tensor-parallel rank. One all-to-all
    carries all parts. A head that several ranks share is sent to each of them, and its gradients
    are summed on the rank that sent it.
    """

    def __init__(self, group: dist.ProcessGroup, parts: Sequence[tuple[int, int]]) -> None:
        self.group, self.num_ranks = group, group.size()
        self._shares = [shares(count, width, self.num_ranks) for count, width in parts]
        # Channels of each part on one rank after `to_heads`.
        self.widths = [part[0].stop - part[0].start for part in self._shares]

    def to_heads(self, *parts_sBW: Tensor) -> Tensor:
        """[s,B,W] for each part -> [S,B,F], this rank's heads of all parts, concatenated with the
        widths `widths`. COLLECTIVE."""
        return _ToHeads.apply(self.group, self._shares, *parts_sBW)

    def to_tokens(self, y_SBW: Tensor) -> Tensor:
        """[S,B,W] of this rank's heads -> [s,B,W x ranks]: this rank's tokens of all heads, in
        order. Not for parts whose heads ranks share. COLLECTIVE."""
        return _ToTokens.apply(y_SBW, self.group)

    def own(self, packed: Tensor, parts: Sequence[int]) -> Tensor:
        """This rank's slices, along the first dimension, of a parameter that packs the parts with
        these indices. The gradient is zero outside the slices; summed over all ranks it is the
        whole gradient."""
        if self.num_ranks == 1:
            return packed
        shares_of_parts = [self._shares[index] for index in parts]
        widths = [slices[-1].stop for slices in shares_of_parts]
        split = packed.split(widths)
        rank = self.group.rank()
        local = [part[slices[rank]] for part, slices in zip(split, shares_of_parts, strict=True)]
        return local[0] if len(local) == 1 else torch.cat(local)


def _all_to_all(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send block i of the first dimension to rank i; block i of the result comes from rank i.
    COLLECTIVE."""
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=group)
    return received


class _ToHeads(torch.autograd.Function):
    """One copy into the send buffer, and one out of the received gradients. With torch's slicing,
    each slice would get a gradient as wide as its part. Gradients of a shared head are summed in
    FP32."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, shares_of_parts: list[list[slice]], *parts_sBW: Tensor
    ) -> Tensor:
        ctx.group, ctx.shares = group, shares_of_parts
        ctx.widths = [part.shape[-1] for part in parts_sBW]
        local_widths = [slices[0].stop - slices[0].start for slices in shares_of_parts]
        ctx.local_widths = local_widths
        sent = parts_sBW[0].new_empty((group.size(), *parts_sBW[0].shape[:2], sum(local_widths)))
        for rank, block in enumerate(sent):
            columns = block.split(local_widths, dim=-1)
            for target, part, slices in zip(columns, parts_sBW, shares_of_parts, strict=True):
                target.copy_(part[..., slices[rank]])
        return _all_to_all(sent, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blocks = grads[0].contiguous().unflatten(0, (ctx.group.size(), -1))
        received = _all_to_all(blocks, ctx.group)
        columns = received.split(ctx.local_widths, dim=-1)
        return None, None, *map(_joined, columns, ctx.shares, ctx.widths)


def _joined(blocks: Tensor, slices: list[slice], width: int) -> Tensor:
    """[ranks,s,B,local W] -> [s,B,W]; channels that several ranks share are summed."""
    if slices[-1].stop - slices[-1].start == width // len(slices):  # no rank shares a channel
        return blocks.movedim(0, 2).flatten(2)
    wide = torch.promote_types(blocks.dtype, torch.float32)
    total = blocks.new_zeros((*blocks.shape[1:3], width), dtype=wide)
    for block, columns in zip(blocks, slices, strict=True):
        total[..., columns] += block
    return total.to(blocks.dtype)


class _ToTokens(torch.autograd.Function):
    """The inverse of `_ToHeads` for one part whose heads are not shared."""

    @staticmethod
    def forward(ctx: Any, y_SBW: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        blocks = y_SBW.contiguous().unflatten(0, (group.size(), -1))
        return _all_to_all(blocks, group).movedim(0, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        blocks = grads[0].unflatten(-1, (ctx.group.size(), -1)).movedim(2, 0).contiguous()
        return _all_to_all(blocks, ctx.group).flatten(0, 1), None
