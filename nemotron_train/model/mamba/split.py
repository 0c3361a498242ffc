"""Split a packed projection into its parts, with one buffer for the gradients of all parts.

Owns: the split only. torch's own split joins the gradients in the order of the parts' strides.
After a transpose that takes one copy to join and one more to reorder, each as large as the widest
activation of a Mamba-2 layer.

Shape suffixes: S tokens, B batch, F packed features, W features of one part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SplitToBatchFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed_SBF: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.widths, ctx.like = widths, (packed_SBF.shape, packed_SBF.dtype, packed_SBF.device)
        return packed_SBF.transpose(0, 1).split(widths, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_BSW: Tensor | None) -> tuple[Tensor, None]:
        shape, dtype, device = ctx.like
        grad_SBF = torch.empty(shape, dtype=dtype, device=device)
        parts_BSW = grad_SBF.transpose(0, 1).split(ctx.widths, dim=-1)  # views of grad_SBF
        for part_BSW, grad_BSW in zip(parts_BSW, grads_BSW, strict=True):
            if grad_BSW is None:
                part_BSW.zero_()
            else:
                part_BSW.copy_(grad_BSW)
        return grad_SBF, None


def split_to_batch_first(packed_SBF: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """[S, B, F] -> views [B, S, W] of the given widths, which sum to F. The gradient is a new
    contiguous [S, B, F]."""
    assert sum(widths) == packed_SBF.shape[-1], (widths, packed_SBF.shape)
    return _SplitToBatchFirst.apply(packed_SBF, tuple(widths))  # pyright: ignore
