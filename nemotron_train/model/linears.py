"""Megatron's parallel linears, with a short way where nothing is parallel and nothing is learned.

Owns: that way. Does not own: anything else about them; with gradients, or where ranks share the
layer, they are Megatron's own.

A decoding pass multiplies one row or a few: what surrounds the product (autograd functions, lookups
of process groups) then costs several times the product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from nemotron_train.model import compiled_calls
from nemotron_train.model.compiled_decoding import few_rows
from nemotron_train.platform.bfloat16_products import product_dtype

_FEW_ROWS = 4


def linear(x: Tensor, weight_FD: Tensor) -> Tensor:
    """x Wᵀ, [..., D] -> [..., F]. Where torch would widen all of a BF16 weight for a row or a few,
    without gradients, a compiled pass reads it as it is."""
    is_few = not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * x.shape[-1]
    if is_few and product_dtype(x) != x.dtype and compiled_calls.take(x):
        return few_rows(x.reshape(-1, x.shape[-1]), weight_FD).view(*x.shape[:-1], -1)
    return F.linear(x, weight_FD)


def is_alone(linear: Any) -> bool:
    """Whether the layer is its weight and no other rank has a part of it."""
    return linear.tp_group.size() == 1 and linear.bias is None


class ColumnLinear(ColumnParallelLinear):
    """Cut along its outputs."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and no bias."""
        if torch.is_grad_enabled() or not is_alone(self):
            return super().forward(input_, weight, runtime_gather_output)
        return linear(input_, self.weight if weight is None else weight), None  # pyright: ignore


class RowLinear(RowParallelLinear):
    """Cut along its inputs."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and no bias."""
        if torch.is_grad_enabled() or not is_alone(self):
            return super().forward(input_)
        return linear(input_, self.weight), None
