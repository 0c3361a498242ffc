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
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemotron_train.kernels.decoding import few_rows
from nemotron_train.kernels.library import supports
from nemotron_train.model.norm import RMSNorm
from nemotron_train.platform.bfloat16_products import product_dtype
from nemotron_train.platform.device import parameter_device

_FEW_ROWS = 4


def linear(x: Tensor, weight_FD: Tensor) -> Tensor:
    """x Wᵀ, [..., D] -> [..., F]. Where torch would widen all of a BF16 weight for a row or a few,
    without gradients, a compiled pass reads it as it is."""
    is_few = not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * x.shape[-1]
    if is_few and product_dtype(x) != x.dtype and supports(x):
        return few_rows(x.reshape(-1, x.shape[-1]), weight_FD).view(*x.shape[:-1], -1)
    return F.linear(x, weight_FD)


def is_alone(linear: Any) -> bool:
    """Whether the layer is its weight and no other rank has a part of it."""
    return linear.tp_group.size() == 1 and linear.bias is None


def are_plain(norm: Any, *linears: Any) -> bool:
    """Whether a layer is our RMSNorm and plain products, with no part on another rank."""
    if not isinstance(norm, RMSNorm):
        return False
    sharded = [linear for linear in linears if type(linear) is not ReplicatedLinear]
    return all(type(each) in (ColumnLinear, RowLinear) and is_alone(each) for each in sharded)


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


class ReplicatedLinear(nn.Module):
    """A linear whose weight every tensor-parallel rank holds whole: the latent projections.

    Under sequence parallelism each rank multiplies its own tokens and Megatron sums the weight
    gradient over the tensor-parallel group.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **unused: Any
    ) -> None:
        super().__init__()
        device = parameter_device(config.use_cpu_initialization)
        self.weight = nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., input_size] -> [..., output_size]; no bias, as Megatron's linears answer."""
        return linear(x, self.weight), None
