"""RMSNorm, with statistics in FP32."""

from typing import Any

from torch import Tensor

from tests.platform.transformer_engine.quantized import quantize


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, epsilon: float, out: Any, quantizer: Any, dtype: int, margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:  # fmt: skip
    """[tokens, width] -> the normalized rows, no mean, and one reciprocal of the norm a token."""
    scale = x.float().square().mean(-1).add(epsilon).rsqrt()
    y = (x.float() * scale[:, None] * (weight.float() + zero_centered)).to(x.dtype)
    return (y if quantizer is None else quantize(y, quantizer, out, None)), None, scale


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    normalized = x.float() * scale[:, None]
    inner = dz.float() * (weight.float() + zero_centered)
    dx = scale[:, None] * (inner - normalized * (inner * normalized).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.float() * normalized).sum(0).to(weight.dtype)


FUNCTIONS = {"rmsnorm_fwd": rmsnorm_fwd, "rmsnorm_bwd": rmsnorm_bwd}
