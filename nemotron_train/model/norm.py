"""RMSNorm with Megatron-Core's norm interface.

Owns: the norm before each layer and the final norm. Does not own: the gated grouped norm of a
Mamba-2 mixer (model/mamba/gated_norm.py), Transformer Engine's norms.

Forms: torch's fused kernel on a GPU; a C kernel on a CPU (csrc/norms.c); without a C compiler,
torch operators whose gradient uses layer norm's fused kernel. The last is about twice as fast as
torch's own `rms_norm` on a CPU, which is composed of separate operators.

Shape legend: N rows, D normalized width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_train.kernels import decoding as decoding_kernels
from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import limit, supports
from nemotron_train.platform.device import parameter_device


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RmsNorm(torch.autograd.Function):
    """y = x s w with s = (mean(x²) + ε)^-½, statistics in FP32 or wider.

    The gradient of RMSNorm is ∂x = s (g - x s mean(g x s)) with g = w ∂y, and ∂w = Σ ∂y x s.
    Layer norm's gradient kernel, called with mean 0 and inverse deviation s, returns the same ∂w
    and s (g - mean(g) - x s mean(g x s)), so s mean(g) is added back. The kernel would sum ∂w of
    BF16 inputs in BF16: its inputs are converted to FP32.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide_ND = _wide(x_ND)
        scale_N1 = (wide_ND * wide_ND).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return (wide_ND * scale_N1).mul_(weight_D).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        width = x_ND.shape[1]
        grad_ND, weight = _wide(grads[0]).contiguous(), _wide(weight_D)
        grad_x_ND, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad_ND,
            _wide(x_ND),
            [width],
            torch.zeros_like(scale_N1),
            scale_N1,
            weight,
            None,
            [True, True, False],  # gradients of x and weight, not of a bias
        )
        # s mean(g): mean over D of w ∂y is the product of ∂y with w / D.
        grad_x_ND.add_(torch.mv(grad_ND, weight / width).unsqueeze(1).mul_(scale_N1))
        return grad_x_ND.to(x_ND.dtype), grad_weight_D.to(weight_D.dtype), None


class _CompiledRmsNorm(torch.autograd.Function):
    """One C kernel forward and one backward; saves x, the weight and the scale of each row."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        width = x_ND.shape[1]
        normed_1ND, scale = training_kernels.rms_norm(x_ND[None], None, weight_D, width, epsilon)
        ctx.save_for_backward(x_ND, weight_D, scale)
        return normed_1ND[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, scale = ctx.saved_tensors
        grad_x_1ND, _, grad_weight_D = training_kernels.rms_norm_backward(
            grads[0][None], x_ND[None], None, weight_D, scale
        )
        return grad_x_1ND[0], grad_weight_D.to(weight_D.dtype), None


def rms_norm(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x (mean(x²) + ε)^-½ w over the last dimension of [..., D]; returns x's dtype, computes in
    FP32 (FP64 for FP64 inputs)."""
    if x_ND.is_cuda:
        return F.rms_norm(x_ND, (x_ND.shape[-1],), weight_D, epsilon)
    rows_ND, width = x_ND.reshape(-1, x_ND.shape[-1]), x_ND.shape[-1]
    is_few = len(rows_ND) <= decoding_kernels.MAX_TOKENS and not torch.is_grad_enabled()
    function = _RmsNorm
    if width <= limit("max_width") and supports(x_ND, weight_D):
        if is_few and x_ND.dtype == weight_D.dtype:
            return decoding_kernels.norm_rows(x_ND.contiguous(), weight_D, epsilon)
        function = _CompiledRmsNorm
    normed_ND: Tensor = function.apply(rows_ND, weight_D, epsilon)  # pyright: ignore
    return normed_ND.view(x_ND.shape)


class RMSNorm(torch.nn.Module):
    """The norm slot of Megatron-Core's layers (transformer/torch_norm.py, LayerNormBuilder).

    Unlike Megatron's WrappedTorchNorm, it works under sequence parallelism: each rank normalizes
    its own tokens, and Megatron sums the weight's gradient over the tensor-parallel group.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__()
        assert config.normalization == "RMSNorm", config.normalization
        assert not config.layernorm_zero_centered_gamma, "the weight is not stored minus one"
        self.eps = eps
        device = parameter_device(config.use_cpu_initialization)
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] → the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)

    def reset_parameters(self) -> None:
        """Set the weight to ones. torch's norms have this method too; models built on the meta
        device are materialized through it."""
        torch.nn.init.ones_(self.weight)
