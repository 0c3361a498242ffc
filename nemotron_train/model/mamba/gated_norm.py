"""Mamba-2's grouped gated RMSNorm: gate first, then normalize (norm_before_gate=False).

Owns: the function and its hand-derived backward. Does not own: the weight, the plain RMSNorm of
the residual stream (`model.norm`).

Shape suffixes: B batch, S tokens, D channels, G groups, W channels a group (D = G x W).
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import limit, supports
from nemotron_train.kernels.triton import available


def gated_rms_norm(
    y_BSD: Tensor,
    gate_BSD: Tensor,
    weight_D: Tensor,
    *,
    group_size: int,
    epsilon: float,
    force_torch: bool = False,
) -> Tensor:
    """weight u / sqrt(mean of u^2 over each `group_size` channels + epsilon), u = y SiLU(gate).

    Groups are contiguous. Mamba-2 uses `group_size` = inner width / B-C groups, so that a
    tensor-parallel split by groups needs no communication (arXiv 2405.21060, section 8.2).
    Computed in FP32 (FP64 with FP64 inputs), returned in y's dtype. y, gate and weight receive
    gradients. One kernel computes BF16 and FP32: in C on a CPU, in Triton on CUDA (if it can be
    used, and not with `force_torch`).
    """
    assert y_BSD.shape[-1] % group_size == 0, "groups must divide the channels"
    kernels = None if force_torch else _kernels(group_size, y_BSD, gate_BSD, weight_D)
    if kernels is None and group_size <= limit("max_width") and supports(y_BSD, gate_BSD, weight_D):
        kernels = training_kernels
    if kernels is not None and not torch.is_grad_enabled():
        return kernels.rms_norm(y_BSD, gate_BSD, weight_D, group_size, epsilon)[0]
    if kernels is not None:
        return _CompiledGatedRmsNorm.apply(  # pyright: ignore[reportReturnType]
            kernels, y_BSD, gate_BSD, weight_D, group_size, epsilon
        )
    return _GatedRmsNorm.apply(y_BSD, gate_BSD, weight_D, group_size, epsilon)


class _CompiledGatedRmsNorm(torch.autograd.Function):
    """One kernel forward and one backward, of `kernels.training` (C) or `kernels.triton`; saves
    what `_GatedRmsNorm` saves."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        y_BSD: Tensor,
        gate_BSD: Tensor,
        weight_D: Tensor,
        group_size: int,
        epsilon: float,
    ) -> Tensor:
        out_BSD, scale = kernels.rms_norm(y_BSD, gate_BSD, weight_D, group_size, epsilon)
        ctx.kernels = kernels
        ctx.save_for_backward(y_BSD, gate_BSD, weight_D, scale)
        return out_BSD

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # Unpack `saved_tensors` once: under recomputation it can be read only once.
        y_BSD, gate_BSD, weight_D, scale = ctx.saved_tensors
        dy_BSD, dgate_BSD, dweight_D = ctx.kernels.rms_norm_backward(
            gradients[0], y_BSD, gate_BSD, weight_D, scale
        )
        return None, dy_BSD, dgate_BSD, dweight_D.to(weight_D.dtype), None, None


def _kernels(group_size: int, *tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, if they can be used and take these tensors."""
    if group_size <= available.MAX_NORM_WIDTH and available.can_use(*tensors):
        from nemotron_train.kernels.triton import gated_norm as triton_kernels

        return triton_kernels
    return None


class _GatedRmsNorm(torch.autograd.Function):
    """Saves the inputs and one scale 1 / sqrt(...) a group; recomputes everything else.

    One row at a time on a CPU: the FP32 temporaries of one row stay in the cache for the next.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_BSD: Tensor,
        gate_BSD: Tensor,
        weight_D: Tensor,
        group_size: int,
        epsilon: float,
    ) -> Tensor:
        wide = torch.promote_types(y_BSD.dtype, torch.float32)
        out_BSD = torch.empty_like(y_BSD)
        num_groups = y_BSD.shape[-1] // group_size
        scale_BSG1 = y_BSD.new_empty((*y_BSD.shape[:2], num_groups, 1), dtype=wide)
        for rows in _row_blocks(y_BSD):
            u_BSD = F.silu(gate_BSD[rows].to(wide)).mul_(y_BSD[rows])
            u_BSGW = u_BSD.unflatten(-1, (num_groups, group_size))  # a view of u_BSD
            norm_BSG1 = torch.linalg.vector_norm(u_BSGW, dim=-1, keepdim=True)
            scale_BSG1[rows] = norm_BSG1.square_().div_(group_size).add_(epsilon).rsqrt_()
            u_BSGW.mul_(scale_BSG1[rows])
            out_BSD[rows] = u_BSD.mul_(weight_D)
        ctx.save_for_backward(y_BSD, gate_BSD, weight_D, scale_BSG1)
        ctx.groups = (num_groups, group_size)
        return out_BSD

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """With u = y SiLU(gate), n = scale u (the normed u) and t = dout weight, per group:

            dweight = sum over tokens of dout n
            du      = scale (t - n mean(t n))
            dy      = du SiLU(gate),  dgate = du y SiLU'(gate)

        The mean(t n) term is the derivative of scale = (mean(u^2) + epsilon)^-1/2.
        """
        y_BSD, gate_BSD, weight_D, scale_BSG1 = ctx.saved_tensors
        wide = scale_BSG1.dtype
        dy_BSD, dgate_BSD = torch.empty_like(y_BSD), torch.empty_like(gate_BSD)
        dweight_D = torch.zeros_like(weight_D, dtype=wide)
        for rows in _row_blocks(y_BSD):
            y, scale = y_BSD[rows], scale_BSG1[rows]
            gate, dout = gate_BSD[rows].to(wide), gradients[0][rows].to(wide)
            silu = F.silu(gate)
            normed = torch.mul(silu, y)
            normed.unflatten(-1, ctx.groups).mul_(scale)  # n, in place through the view
            product = normed * dout
            dweight_D += product.sum((0, 1))
            # product becomes t n; its mean over the group's channels is all that du needs of it.
            mean = product.mul_(weight_D).unflatten(-1, ctx.groups).mean(-1, keepdim=True)
            du = torch.mul(dout, weight_D, out=product)  # t, in the memory of `product`
            du_groups, normed_groups = (t.unflatten(-1, ctx.groups) for t in (du, normed))
            du_groups.addcmul_(normed_groups, mean, value=-1).mul_(scale)
            dy_BSD[rows] = silu.mul_(du)
            dgate_BSD[rows] = torch.ops.aten.silu_backward(du.mul_(y), gate)
        return dy_BSD, dgate_BSD, dweight_D.to(weight_D.dtype), None, None


def _row_blocks(y_BSD: Tensor) -> list[slice]:
    """The rows of one iteration: one at a time on a CPU, all at once on a GPU."""
    step = y_BSD.shape[0] if y_BSD.is_cuda else 1
    return [slice(start, start + step) for start in range(0, y_BSD.shape[0], step)]
