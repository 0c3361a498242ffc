"""Context parallelism: one sequence over several ranks, each with a contiguous piece of it.

Owns the cut of a row into pieces and the exchange that Mamba-2 and attention need: before what
mixes tokens, a rank trades its piece of all heads for the whole sequence of some heads; after it,
back (arXiv 2309.14509 does so for attention). Does not own the arithmetic between, which sees whole
sequences and knows nothing of pieces, nor who sums gradients (Megatron, over all data- and
context-parallel ranks). docs/decisions/0004-context-parallelism.md says why.

What is cheap is whole on every rank: token ids, labels, loss masks, document ids. So shifting them
for multi-token prediction and finding document boundaries needs no neighbour.

Shapes: S tokens of the whole sequence, s = S / ranks of a piece, B rows, W channels of one part, F
channels of all parts together.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def piece(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns of whole rows: [B,S] -> [B,s], a view."""
    if group.size() == 1:
        return x_BS
    length = x_BS.shape[1] // group.size()
    return x_BS[:, group.rank() * length : (group.rank() + 1) * length]


def shares(count: int, width: int, num_ranks: int) -> list[slice]:
    """Channels of each rank, of `count` heads of `width` channels packed one after the other.

    Equal runs of heads; where there are fewer heads than ranks, one head each, the same for
    num_ranks / count ranks in a row. That is the head which those ranks' query heads (Mamba-2's
    heads) read, since these are shared out in equal runs too.
    """
    assert count % num_ranks == 0 or num_ranks % count == 0, (count, num_ranks)
    each = max(1, count // num_ranks)
    starts = (rank * count // num_ranks for rank in range(num_ranks))
    return [slice(start * width, (start + each) * width) for start in starts]


class HeadExchange:
    """Between «my tokens, all heads» and «all tokens, my heads» of several packed parts.

    parts: (heads, channels a head) of each part on this tensor-parallel rank. All parts travel in
    one all-to-all. A head that several ranks share is sent to each of them, and its gradients add
    up where it came from.
    """

    def __init__(self, group: dist.ProcessGroup, parts: Sequence[tuple[int, int]]) -> None:
        self.group, self.num_ranks = group, group.size()
        self._shares = [shares(count, width, self.num_ranks) for count, width in parts]
        self.widths = [part[0].stop - part[0].start for part in self._shares]  # after it, [W]

    def to_heads(self, *parts_sBW: Tensor) -> Tensor:
        """[s,B,W] a part -> [S,B,F], this rank's heads of all parts side by side (`widths`).
        COLLECTIVE."""
        return _ToHeads.apply(self.group, self._shares, *parts_sBW)

    def to_tokens(self, y_SBW: Tensor) -> Tensor:
        """[S,B,W] of this rank's heads -> [s,B,W x ranks]: its tokens of all heads, in order. Not
        for a part that ranks share. COLLECTIVE."""
        return _ToTokens.apply(y_SBW, self.group)

    def own(self, packed: Tensor, parts: Sequence[int]) -> Tensor:
        """This rank's slices along the first dimension of a parameter that packs the parts with
        these numbers. The gradient is zero elsewhere: over all ranks it adds up to the whole."""
        if self.num_ranks == 1:
            return packed
        cuts = [self._shares[number] for number in parts]
        widths = [cut[-1].stop for cut in cuts]
        split = packed.split(widths)
        rank = self.group.rank()
        own = [part[cut[rank]] for part, cut in zip(split, cuts, strict=True)]
        return own[0] if len(own) == 1 else torch.cat(own)


def _all_to_all(blocks: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Block i of the first dimension goes to rank i, and block i of the result came from it."""
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks, group=group)
    return received


class _ToHeads(torch.autograd.Function):
    """One copy into what is sent, and one out of the gradients that come back: a slice of torch's
    would bring a gradient as wide as the part. Those of a shared head add up in FP32."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, shares_of_parts: list[list[slice]], *parts_sBW: Tensor
    ) -> Tensor:
        ctx.group, ctx.shares = group, shares_of_parts
        ctx.widths = [part.shape[-1] for part in parts_sBW]
        ctx.own_widths = own_widths = [cut[0].stop - cut[0].start for cut in shares_of_parts]
        sent = parts_sBW[0].new_empty((group.size(), *parts_sBW[0].shape[:2], sum(own_widths)))
        for rank, block in enumerate(sent):
            columns = block.split(own_widths, dim=-1)
            for own, part, cut in zip(columns, parts_sBW, shares_of_parts, strict=True):
                own.copy_(part[..., cut[rank]])
        return _all_to_all(sent, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blocks = grads[0].contiguous().unflatten(0, (ctx.group.size(), -1))
        received = _all_to_all(blocks, ctx.group)
        columns = received.split(ctx.own_widths, dim=-1)
        return None, None, *map(_joined, columns, ctx.shares, ctx.widths)


def _joined(blocks: Tensor, cut: list[slice], width: int) -> Tensor:
    """[ranks,s,B,own W] -> [s,B,W]; what several ranks have of one channel is added up."""
    if cut[-1].stop - cut[-1].start == width // len(cut):
        return blocks.movedim(0, 2).flatten(2)
    wide = torch.promote_types(blocks.dtype, torch.float32)
    total = blocks.new_zeros((*blocks.shape[1:3], width), dtype=wide)
    for block, columns in zip(blocks, cut, strict=True):
        total[..., columns] += block
    return total.to(blocks.dtype)


class _ToTokens(torch.autograd.Function):
    """The way back; no head is shared here."""

    @staticmethod
    def forward(ctx: Any, y_SBW: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        blocks = y_SBW.contiguous().unflatten(0, (group.size(), -1))
        return _all_to_all(blocks, group).movedim(0, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        blocks = grads[0].unflatten(-1, (ctx.group.size(), -1)).movedim(2, 0).contiguous()
        return _all_to_all(blocks, ctx.group).flatten(0, 1), None
