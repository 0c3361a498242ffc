"""MXFP8 in plain torch: 8-bit E4M3 codes and a power-of-two (E8M0) scale per block of 32.

Owns: quantization of either orientation, dequantization. Does not own: products (gemm.py), which
products use the format (plan/precision/resolve.py), the same arithmetic in fused kernels
(compiled.py chooses them). Never imports Transformer Engine.

The arithmetic is that of Transformer Engine's MXFP8BlockScaling (2.17.1): E4M3 for activations,
weights and gradients, and the scale `amax · fp32(1/448)` rounded UP to a power of two, so that no
element saturates. The rule in the OCP specification rounds down and saturates; Transformer Engine
does not use it. Both orientations are quantized from the high-precision tensor; one is not the
transpose of the other.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_train.kernels import quantize as quantize_kernels
from nemotron_train.precision import compiled
from nemotron_train.precision.gemm import Operand
from nemotron_train.precision.rounding import round_to_nearest_, rows_per_chunk

BLOCK = 32
E4M3_MAX = 448.0
_E8M0_NAN = 255
_E8M0_MAX = 254
_E8M0_BIAS = 127
# If a block's exponent is below the tensor's largest by more than this, the last bit of a code
# would leave BF16's normal range. Such a block becomes zero in an operand.
_EXPONENT_RANGE = 117
_CHUNK_ELEMENTS = 1 << 19  # as in nvfp4.py


@dataclass(frozen=True)
class MXFP8Tensor:
    """A quantized matrix [R, C] (leading dimensions flattened), blocks along the last dimension.

    codes: uint8 [R, C], E4M3 bit patterns. scales: uint8 [R, ceil(C / 32)], E8M0: 2^(s - 127), or
    NaN for 255. shape: that of the quantized tensor.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    def dequantize(self) -> Tensor:
        """FP32 in the original shape. Exact, except that numbers beyond FP32 become infinite (a
        block with amax > 2^127 can round up to 2^128)."""
        scales = _power_of_two(self.scales.int() - _E8M0_BIAS)
        scales = scales.masked_fill(self.scales == _E8M0_NAN, torch.nan)
        element_scales = scales.repeat_interleave(BLOCK, dim=1)[:, : self.codes.shape[1]]
        return (self.codes.view(torch.float8_e4m3fn).float() * element_scales).view(self.shape)


@torch.no_grad()
def quantize_mxfp8(x: Tensor) -> MXFP8Tensor:
    """Quantize to codes and scales, blocks along the last dimension (for the other, pass `x.t()`).

    A code of zero keeps the sign of its element, as the cast instruction of the hardware does.
    Training uses `mxfp8_operand`, which computes the same numbers. Sizes as there.
    """
    matrix = x.reshape(-1, x.shape[-1])
    blocks = _blocks(matrix, -1)
    exponents, has_nan = _scale_exponents(blocks, -1)
    rounded = _round(blocks, _power_of_two(-exponents))
    rounded = torch.where(rounded == 0, torch.copysign(rounded, blocks.float()), rounded)
    codes = rounded.to(torch.float8_e4m3fn).view(torch.uint8)
    scales = (exponents + _E8M0_BIAS).masked_fill_(has_nan, _E8M0_NAN)
    return MXFP8Tensor(
        codes=codes.flatten(1)[:, : matrix.shape[1]].contiguous(),
        scales=scales.to(torch.uint8).squeeze(-1),
        shape=x.shape,
    )


@torch.no_grad()
def mxfp8_operand(x: Tensor, *, dim: Literal[-1, 0] = -1) -> Operand:
    """Quantize and dequantize the blocks in one step: from x to the operand of a product.

    x: [..., C] BF16, FP16 or FP32. NaN passes through and infinity saturates the scale of its
    block; the product is not finite in either case. dim: -1, blocks of 32 along the last dimension;
    0, blocks along the rows of the matrix [R, C], which quantizes the transpose without
    transposing.

    The operand's values are codes · 2^(exponent - largest exponent of the tensor), its scale is
    2^(largest exponent). This is a power of two, so nothing is rounded and no block is too large
    for BF16. Blocks whose exponent is more than 117 below the largest become zero (2^-117 of the
    tensor's maximum is far below the precision of an FP32 sum of the two).
    Source: Transformer Engine 2.17.1, quantize_mxfp8.cuh and float_to_e8m0 in ptx.cuh.
    """
    kernels = compiled.kernels_for(x)
    if kernels is not None:
        matrix = quantize_kernels.operand_matrix(x)
        amax = kernels.strip_amax(matrix, BLOCK)
        amax = amax.amax() if amax.numel() else amax.new_zeros(())
        values = kernels.mxfp8_operand(matrix, 1 + dim, amax)
        return Operand(values.view(x.shape), _power_of_two(_exponents_of(amax)), 1.0)
    matrix = x.reshape(-1, x.shape[-1])
    blocks = _blocks(matrix, dim)
    exponents, has_nan = _scale_exponents(blocks, dim)
    largest = exponents.amax() if exponents.numel() else exponents.new_zeros(())
    encode = _power_of_two(-exponents)
    below = exponents - largest
    decode = _power_of_two(below).masked_fill_(below < -_EXPONENT_RANGE, 0.0)
    decode.masked_fill_(has_nan, torch.nan)
    operand = torch.empty(blocks.shape, dtype=torch.bfloat16, device=x.device)
    chunk = rows_per_chunk(operand, _CHUNK_ELEMENTS)
    for start in range(0, operand.shape[0], chunk):
        part = slice(start, start + chunk)
        operand[part] = _round(blocks[part], encode[part]).mul_(decode[part])
    joined = operand.flatten(0, 1) if dim == 0 else operand.flatten(1)
    cropped = joined[: matrix.shape[0], : matrix.shape[1]].reshape(x.shape)
    return Operand(cropped, _power_of_two(largest), 1.0)


def _blocks(matrix: Tensor, dim: Literal[-1, 0]) -> Tensor:
    """[R, B, 32] or [B, 32, C], padded with zeros."""
    assert matrix.dtype in (torch.float32, torch.bfloat16, torch.float16), matrix.dtype
    padding = -matrix.shape[dim] % BLOCK
    if padding:
        matrix = F.pad(matrix, (0, padding) if dim == -1 else (0, 0, 0, padding))
    return matrix.contiguous().unflatten(dim, (-1, BLOCK))


def _scale_exponents(blocks: Tensor, dim: Literal[-1, 0]) -> tuple[Tensor, Tensor]:
    """Per block (`dim` has size 1): the int32 exponent of its scale, -127 … 127, and whether the
    block holds a NaN."""
    if dim == -1 and blocks.device.type == "cpu" and blocks.numel():
        # Pooling is four times as fast as a reduction over so few elements.
        chunks = blocks.split(rows_per_chunk(blocks, _CHUNK_ELEMENTS))
        pooled = [F.max_pool1d(chunk.abs().float().flatten(1), BLOCK) for chunk in chunks]
        amax = torch.cat(pooled).unsqueeze(-1)
    else:
        amax = blocks.abs().amax(-1 if dim == -1 else 1, keepdim=True).float()
    return _exponents_of(amax), amax.isnan()


def _exponents_of(amax: Tensor) -> Tensor:
    """int32 exponent, -127 … 127, of the scale of blocks with these largest magnitudes."""
    scale = amax * amax.new_full((), E4M3_MAX).reciprocal()
    bits = scale.view(torch.int32) & 0x7FFFFFFF  # a NaN may have either sign
    exponents, mantissas = bits >> 23, bits & 0x7FFFFF
    # Round up to the next power of two. Exponent field 0 holds the subnormals below 2^-126; their
    # lower half rounds up to 2^-127. The largest finite exponent field is kept.
    rounds_up = (mantissas > 0) & ~((exponents == 0) & (mantissas <= 0x400000))
    exponents = (exponents + rounds_up).clamp_(max=_E8M0_MAX)
    return exponents - _E8M0_BIAS


def _power_of_two(exponents: Tensor) -> Tensor:
    """Exact FP32 2^e for int32 exponents -127 … 127; 2^-127 (subnormal) for any lower exponent."""
    return ((exponents + 127) << 23).clamp_(min=1 << 22).view(torch.float32)


def _round(blocks: Tensor, encode: Tensor) -> Tensor:
    """blocks · encode rounded to E4M3 numbers, saturating, in a new FP32 tensor. `encode` is a
    power of two, so only subnormal products round twice, far below E4M3's step."""
    scaled = blocks * encode if blocks.dtype == torch.float32 else blocks.float().mul_(encode)
    scaled.clamp_(-E4M3_MAX, E4M3_MAX)
    return round_to_nearest_(scaled, mantissa_bits=3, min_exponent=-6)
