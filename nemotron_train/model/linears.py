"""Megatron's parallel linears with a shorter path for inference on one tensor-parallel rank.

Owns: that path, and the replicated linear. Does not own: the rest; with gradients, or if ranks
share the layer, Megatron's own forward runs.

Decoding multiplies one row or a few. The work around the product (autograd functions, lookups of
process groups) then costs several times the product.
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
    """x Wᵀ, [..., D] -> [..., F].

    For a few BF16 rows without gradients, on a CPU where torch would convert the whole weight to
    FP32, a C kernel reads the BF16 weight directly.
    """
    is_few = not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * x.shape[-1]
    if is_few and product_dtype(x) != x.dtype and supports(x):
        return few_rows(x.reshape(-1, x.shape[-1]), weight_FD).view(*x.shape[:-1], -1)
    return F.linear(x, weight_FD)


def is_alone(linear: Any) -> bool:
    """Whether the layer has no bias and is not shared with another tensor-parallel rank."""
    return linear.tp_group.size() == 1 and linear.bias is None


def are_plain(norm: Any, *linears: Any) -> bool:
    """Whether the norm is our RMSNorm and the linears are plain products, all on this rank. The C
    kernels of decoding compute only such layers."""
    if not isinstance(norm, RMSNorm):
        return False
    sharded = [linear for linear in linears if type(linear) is not ReplicatedLinear]
    return all(type(layer) in (ColumnLinear, RowLinear) and is_alone(layer) for layer in sharded)


class ColumnLinear(ColumnParallelLinear):
    """Sharded along its outputs."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and no bias (None)."""
        if torch.is_grad_enabled() or not is_alone(self):
            return super().forward(input_, weight, runtime_gather_output)
        return linear(input_, self.weight if weight is None else weight), None  # pyright: ignore


class RowLinear(RowParallelLinear):
    """Sharded along its inputs."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and no bias (None)."""
        if torch.is_grad_enabled() or not is_alone(self):
            return super().forward(input_)
        return linear(input_, self.weight), None


class ReplicatedLinear(nn.Module):
    """A linear whose whole weight is on every tensor-parallel rank: the latent projections.

    Under sequence parallelism each rank multiplies its own tokens, and Megatron sums the weight
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
        """[..., input_size] -> [..., output_size], and no bias (None), as Megatron's linears do."""
        return linear(x, self.weight), None
