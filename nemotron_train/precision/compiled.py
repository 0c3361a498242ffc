"""The compiled form of the quantizers for a tensor: C on a CPU, Triton on CUDA, or none.

Owns: this choice. Does not own: the kernels (`kernels.quantize`, `kernels.triton.quantize`), what
they compute (nvfp4.py, mxfp8.py).
"""

from typing import Any

from torch import Tensor

from nemotron_train.kernels import quantize as c_kernels
from nemotron_train.kernels.triton import available


def kernels_for(x: Tensor, *, needs_2d_words: bool = False) -> Any:
    """The module whose `strip_amax`, `nvfp4_operand` and `mxfp8_operand` take x; None if torch's
    operators have to compute. needs_2d_words: stochastic rounding of 16 x 16 blocks, which the C
    kernel does not have."""
    if available.can_use(x):
        from nemotron_train.kernels.triton import quantize as triton_kernels

        return triton_kernels
    fits = x.device.type == "cpu" and not needs_2d_words
    return c_kernels if fits and c_kernels.can_quantize() else None
