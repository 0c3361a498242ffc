"""The layers, on any device and one rank."""

from transformer_engine.pytorch import distributed, fp8, ops
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.layers import (
    DotProductAttention,
    Fp8Padding,
    Fp8Unpadding,
    GroupedLinear,
    LayerNorm,
    LayerNormLinear,
    Linear,
    RMSNorm,
)

__all__ = ["DotProductAttention", "Fp8Padding", "Fp8Unpadding", "GroupedLinear", "LayerNorm"]
__all__ += ["LayerNormLinear", "Linear", "RMSNorm", "distributed", "fp8", "fp8_autocast"]
__all__ += ["fp8_model_init", "ops"]
