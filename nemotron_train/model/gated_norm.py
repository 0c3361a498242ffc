"""Mamba-2's grouped gated RMSNorm: gate first, then normalize (norm_before_gate=False).

Owns the function and its hand-derived backward. Does not own the weight, nor the plain RMSNorm
of the residual stream.

Shape suffixes: B batch, S tokens, D channels, G groups, W channels a group (D = G x W).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_rms_norm(
    y_BSD: Tensor, gate_BSD: Tensor, weight_D: Tensor, *, group_size: int, epsilon: float
) -> Tensor:
    """u = y SiLU(gate); weight u / sqrt(mean of u^2 over each `group_size` channels + epsilon).

    Groups are contiguous; Mamba-2 takes `group_size` = inner width / B-C groups, so that a
    tensor-parallel split by groups needs no communication (arXiv 2405.21060, section 8.2).
    Computed in FP32 (FP64 with FP64 inputs), returned in y's dtype. y, gate and weight receive
    gradients.
    """
    assert y_BSD.shape[-1] % group_size == 0, "groups must divide the channels"
    return _GatedRmsNorm.apply(y_BSD, gate_BSD, weight_D, group_size, epsilon)


class _GatedRmsNorm(torch.autograd.Function):
    """Saves the inputs and one reciprocal root a group; recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BSD: Tensor,
        gate_BSD: Tensor,
        weight_D: Tensor,
        group_size: int,
        epsilon: float,
    ) -> Tensor:
        accumulate = torch.promote_types(y_BSD.dtype, torch.float32)
        u_BSGW = F.silu(gate_BSD.to(accumulate)).mul_(y_BSD).unflatten(-1, (-1, group_size))
        norm_BSG1 = torch.linalg.vector_norm(u_BSGW, dim=-1, keepdim=True)
        scale_BSG1 = norm_BSG1.square_().div_(group_size).add_(epsilon).rsqrt_()
        u_BSGW.mul_(scale_BSG1)
        ctx.save_for_backward(y_BSD, gate_BSD, weight_D, scale_BSG1)
        ctx.group_size = group_size
        return u_BSGW.flatten(-2).mul_(weight_D).to(y_BSD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        y_BSD, gate_BSD, weight_D, scale_BSG1 = ctx.saved_tensors
        accumulate, groups = scale_BSG1.dtype, (-1, ctx.group_size)
        gate, dout = gate_BSD.to(accumulate), gradients[0].to(accumulate)
        silu_BSD = F.silu(gate)
        normed = torch.mul(silu_BSD, y_BSD)
        normed.unflatten(-1, groups).mul_(scale_BSG1)
        # With n the normed u and t = dout weight: du = scale (t - n mean(t n)).
        product = normed * dout
        dweight_D = product.sum((0, 1))
        mean_BSG1 = product.mul_(weight_D).unflatten(-1, groups).mean(-1, keepdim=True)
        du = torch.mul(dout, weight_D, out=product)
        du.unflatten(-1, groups).addcmul_(normed.unflatten(-1, groups), mean_BSG1, value=-1).mul_(
            scale_BSG1
        )
        dy = silu_BSD.mul_(du)
        dgate = torch.ops.aten.silu_backward(du.mul_(y_BSD), gate)
        dweight_D = dweight_D.to(weight_D.dtype)
        return dy.to(y_BSD.dtype), dgate.to(gate_BSD.dtype), dweight_D, None, None
