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


def _is_alone(linear: Any) -> bool:
    return not torch.is_grad_enabled() and linear.tp_group.size() == 1 and linear.bias is None


class ColumnLinear(ColumnParallelLinear):
    """Cut along its outputs."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and no bias."""
        if not _is_alone(self):
            return super().forward(input_, weight, runtime_gather_output)
        return F.linear(input_, self.weight if weight is None else weight), None  # pyright: ignore


class RowLinear(RowParallelLinear):
    """Cut along its inputs."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and no bias."""
        if not _is_alone(self):
            return super().forward(input_)
        return F.linear(input_, self.weight), None
