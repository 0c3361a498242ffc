"""What the package causal_conv1d 1.7.0 asks of its arguments, with the arithmetic of its reference,
on a CPU. It has no form of its own without a GPU.

Shape suffixes: B batch, C channels, S tokens, K taps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_VECTOR = 8  # channels of a load


def _check_layout(x_BCS: Tensor, name: str) -> bool:
    """Whether the channels are last. Raises RuntimeError where the package would."""
    if x_BCS.stride(1) != 1 and x_BCS.stride(2) != 1:
        raise RuntimeError(f"{name}: neither the channels nor the tokens are contiguous")
    is_channels_last = x_BCS.stride(1) == 1 and x_BCS.stride(2) > 1
    if is_channels_last:
        if x_BCS.shape[1] % _VECTOR:
            raise RuntimeError("causal_conv1d only supports channel dimension divisible by 8")
        if x_BCS.stride(2) % _VECTOR or x_BCS.stride(0) % _VECTOR:
            raise RuntimeError(
                f"causal_conv1d with channel last layout requires strides ({name}.stride(0) and "
                f"{name}.stride(2)) to be multiples of 8: {x_BCS.stride()}"
            )
        if x_BCS.storage_offset() % _VECTOR:
            raise RuntimeError(f"{name}: misaligned address")  # what a vector load would meet
    return is_channels_last


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCS: Tensor, weight_CK: Tensor, bias_C: Tensor, seq_idx_BS: Tensor | None
    ) -> Tensor:
        assert x_BCS.is_cuda and weight_CK.is_cuda and bias_C.is_cuda
        assert bias_C.dtype == weight_CK.dtype and 2 <= weight_CK.shape[1] <= 4
        is_channels_last = _check_layout(x_BCS, "x")
        if seq_idx_BS is not None:
            assert is_channels_last, "seq_idx is only supported for channel last layout"
            assert seq_idx_BS.dtype == torch.int32 and seq_idx_BS.is_cuda
            assert seq_idx_BS.is_contiguous()
            assert seq_idx_BS.shape == (x_BCS.shape[0], x_BCS.shape[2])
        inputs = (x_BCS, weight_CK, bias_C)
        with torch.enable_grad():
            leaves = [t.detach().float().requires_grad_() for t in inputs]
            y_BCS = _reference(leaves[0], leaves[1], leaves[2], seq_idx_BS)
        ctx.leaves, ctx.y_BCS = leaves, y_BCS
        ctx.dtypes = [t.dtype for t in inputs]
        return torch.empty_like(x_BCS).copy_(y_BCS.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dy_BCS = gradients[0]
        if dy_BCS.stride(1) != 1:
            dy_BCS = dy_BCS.mT.contiguous().mT
        _check_layout(dy_BCS, "dout")
        found = torch.autograd.grad(ctx.y_BCS, ctx.leaves, dy_BCS.float())
        return *(g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)), None


def _reference(x_BCS: Tensor, weight_CK: Tensor, bias_C: Tensor, seq_idx: Tensor | None) -> Tensor:
    num_taps, length = weight_CK.shape[1], x_BCS.shape[2]
    total = bias_C[None, :, None] * torch.ones_like(x_BCS)
    for j in range(num_taps):
        shifted = F.pad(x_BCS, (j, 0))[..., :length]
        if seq_idx is not None and j:
            same = F.pad(seq_idx, (j, 0), "constant", -1)[:, :length] == seq_idx
            shifted = shifted * same[:, None]
        total = total + shifted * weight_CK[:, num_taps - 1 - j, None]
    return F.silu(total)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """SiLU of the convolution: [B,C,S] -> [B,C,S]."""
    assert activation == "silu" and initial_states is None
    return _Convolution.apply(x, weight, bias, seq_idx)  # pyright: ignore[reportReturnType]
