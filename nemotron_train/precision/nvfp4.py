"""NVFP4 in plain torch: 4-bit E2M1 codes, an E4M3 scale per block of 16, an FP32 scale per tensor.

Owns: quantization (nearest-even and stochastic), packing, dequantization. Does not own: products
(gemm.py), random words (rounding.py), the Hadamard transform (hadamard.py), the same arithmetic in
fused kernels (compiled.py chooses them), the rounding of each tensor of a linear
(precision/linear.py). Never imports Transformer Engine.

The arithmetic equals Transformer Engine's reference NVFP4 quantizer since 2.14 (pinned: 2.17.1)
bit for bit. Its block scale is `amax · (S · fp32(1/6))`; older releases round twice there. The
training recipe is that of arXiv 2509.25149. Stochastic rounding follows Transformer Engine's
software rounder.

Shape legend: R rows, C columns of the matrix; B blocks along a dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_train.kernels import quantize as quantize_kernels
from nemotron_train.precision import compiled
from nemotron_train.precision.gemm import Operand
from nemotron_train.precision.rounding import RandomWords, round_to_nearest_, rows_per_chunk

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
GLOBAL_DIVISOR = E2M1_MAX * E4M3_MAX
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Block = Literal["1d", "2d"]
ReduceAmax = Callable[[Tensor], Tensor]

_FLOAT_MAX = torch.finfo(torch.float32).max
# Elements per chunk on a CPU: few enough that the FP32 temporaries stay in the cache, and enough
# that starting and joining threads does not dominate the time.
_CHUNK_ELEMENTS = 1 << 19


# --------------------------------------------------------------------------------- the tensor
@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantized matrix [R, C] (leading dimensions flattened), 4.5 bits per element.

    codes: uint8 [R, ceil(C / 2)], element 2i in the low nibble; bit 3 of a nibble is the sign.
    scales: uint8 [rows, ceil(C / 16)], E4M3 bit patterns. A 2-D block repeats its scale for each
    of its 16 rows, so `rows` is then R rounded up to a multiple of 16. amax: FP32 scalar.
    shape: that of the quantized tensor.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor
    shape: torch.Size

    def unpacked_codes(self) -> Tensor:
        """uint8 [R, C], one code per element."""
        pairs = torch.stack((self.codes & 0xF, self.codes >> 4), dim=-1)
        return pairs.flatten(1)[:, : self.shape[-1]]

    def _element_scales(self) -> Tensor:
        scales = self.scales.view(torch.float8_e4m3fn).float()[: self.codes.shape[0]]
        return scales.repeat_interleave(BLOCK, dim=1)[:, : self.shape[-1]]

    def _element_values(self) -> Tensor:
        signed = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
        return signed.to(self.codes.device)[self.unpacked_codes().int()]

    def operand(self) -> Operand:
        """The operand for a product. Equals `nvfp4_operand` of the same tensor bit for bit. Zeros
        are +0, whatever the sign of their code."""
        values = self._element_values().mul_(self._element_scales()).add_(0.0)
        return Operand(values.bfloat16().view(self.shape), self.amax, GLOBAL_DIVISOR)

    def dequantize(self) -> Tensor:
        """FP32 in the original shape: code · ((block scale · amax) · fp32(1/2688)).

        The roundings have the order of Transformer Engine's dequantize kernel. As there, the result
        overflows to infinity if amax exceeds 7.6e35; `operand().dequantize()` does not.
        """
        scale = (self._element_scales() * self.amax) * self.amax.new_full((), 1 / GLOBAL_DIVISOR)
        return (self._element_values() * scale).view(self.shape)


# ----------------------------------------------------------------------------------- quantize
@torch.no_grad()
def quantize_nvfp4(
    x: Tensor,
    *,
    block: Block = "1d",
    random_words: Tensor | None = None,
    amax: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
) -> NVFP4Tensor:
    """Quantize to packed codes, blocks along the last dimension (for the other, pass `x.t()`).

    Arguments as in `nvfp4_operand`. Training uses `nvfp4_operand`; this function serves storage and
    comparisons.
    """
    if x.device.type == "cpu" and random_words is None and quantize_kernels.can_quantize():
        matrix = quantize_kernels.operand_matrix(x)
        if amax is None:
            amax = _segment_amax(quantize_kernels.strip_amax(matrix, BLOCK), None)
        amax = amax.float() if reduce_amax is None else reduce_amax(amax.float())
        packed, bits = quantize_kernels.nvfp4_codes(matrix, 2 if block == "2d" else 0, amax)
        return NVFP4Tensor(packed, bits, amax, x.shape)
    blocks = _Blocks(x, block, dim=-1)
    scales = blocks.scales(amax, reduce_amax)
    words = None if random_words is None else blocks.split(random_words)
    codes = torch.empty(blocks.values.shape, dtype=torch.uint8, device=x.device)
    chunk = rows_per_chunk(codes, _CHUNK_ELEMENTS)
    for start in range(0, codes.shape[0], chunk):
        part = slice(start, start + chunk)
        scaled = _scaled(blocks.values[part], scales.encode[part])
        codes[part] = e2m1_codes(scaled, None if words is None else words[part])
    # Each int16 holds two neighbouring codes, one per byte, the first in the low byte.
    pairs = blocks.join(codes, keep_padded_columns=True).view(torch.int16)
    packed = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    scale_bits = scales.decode.to(torch.float8_e4m3fn).view(torch.uint8)
    if block == "2d":
        scale_bits = scale_bits.expand(-1, BLOCK, -1, -1).flatten(0, 1)
    return NVFP4Tensor(
        codes=packed[:, : (x.shape[-1] + 1) // 2].contiguous(),
        scales=scale_bits.squeeze(-1),
        amax=scales.amax,
        shape=x.shape,
    )


@torch.no_grad()
def nvfp4_operand(
    x: Tensor,
    *,
    block: Block = "1d",
    dim: Literal[-1, 0] = -1,
    random_words: Tensor | RandomWords | None = None,
    amax: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
    rows_per_tensor: Tensor | None = None,
) -> Operand:
    """Quantize and dequantize the blocks in one step: from x to the operand of a product.

    x: [..., C] BF16, FP16 or FP32. A NaN or infinity in x makes the product not finite.
    block: "1d", 16 elements along `dim`; "2d", 16 × 16, the same in both orientations.
    dim: -1, blocks along the last dimension; 0, blocks along the rows of the matrix [R, C], which
    quantizes the transpose without transposing. The result has x's layout in both cases.
    random_words: uint8 words of x's shape, or a RandomWords that draws them for a matrix: round
    stochastically, up with probability (position between the neighbours) minus at most 1/256.
    None: round to nearest, ties to even.
    amax: FP32 scalar to use instead of max |x|. reduce_amax: maps this rank's max |x| to the
    maximum over the ranks that hold parts of one tensor (COLLECTIVE if it is).
    rows_per_tensor: int64 [E]. x is E tensors stacked along its rows (experts), each with its own
    amax. Each must have a multiple of 16 rows unless blocks run along the last dimension. The
    operand's scale is then [E].

    Sizes that are not a multiple of 16 are padded with zeros; the result is cropped.
    Source: Transformer Engine 2.17.1's quantization_ref_nvfp4.py; for stochastic rounding see
    `round_e2m1`.
    """
    layout = 2 if block == "2d" else 1 + dim
    kernels = compiled.kernels_for(x, needs_2d_words=layout == 2 and random_words is not None)
    if kernels is not None and not isinstance(random_words, Tensor):
        return _fused_operand(kernels, x, layout, random_words, amax, reduce_amax, rows_per_tensor)
    if isinstance(random_words, RandomWords):
        random_words = random_words.draw(x.shape, x.device)
    blocks = _Blocks(x, block, dim, rows_per_tensor)
    scales = blocks.scales(amax, reduce_amax)
    # A block whose scale rounded to zero is zero for any codes. Encode it as +0, so that the
    # product gets no negative zero.
    encode = scales.encode.masked_fill_(scales.decode == 0, 0.0)
    decode, words = scales.decode, None
    if random_words is not None:
        words = blocks.split(random_words)
        decode = decode * 0.5  # _round_stochastically_ returns twice the rounded number
    operand = torch.empty(blocks.values.shape, dtype=torch.bfloat16, device=x.device)
    chunk = rows_per_chunk(operand, _CHUNK_ELEMENTS)
    for start in range(0, operand.shape[0], chunk):
        part = slice(start, start + chunk)
        scaled = _scaled(blocks.values[part], encode[part])
        if words is None:
            _round_to_nearest_(scaled)
        else:
            _round_stochastically_(scaled, words[part])
        operand[part] = scaled.mul_(decode[part])
    return Operand(blocks.join(operand).view(x.shape), scales.amax, GLOBAL_DIVISOR)


def _fused_operand(
    kernels: Any,
    x: Tensor,
    layout: int,
    random_words: RandomWords | None,
    amax: Tensor | None,
    reduce_amax: ReduceAmax | None,
    rows_per_tensor: Tensor | None,
) -> Operand:
    """`nvfp4_operand` through the compiled kernels. layout: as in quantize.c."""
    matrix = quantize_kernels.operand_matrix(x)
    height = 1 if layout == 0 and rows_per_tensor is not None else BLOCK
    lengths = None if rows_per_tensor is None else rows_per_tensor.to(x.device) // height
    if amax is None:
        amax = _segment_amax(kernels.strip_amax(matrix, height), lengths)
    amax = amax.float() if reduce_amax is None else reduce_amax(amax.float())
    per_strip = amax
    if lengths is not None:
        # Without the size, a GPU would have to be asked for it.
        strips = -(-matrix.shape[0] // (1 if layout == 0 else BLOCK))
        per_strip = amax.repeat_interleave(lengths, output_size=strips)
    values = kernels.nvfp4_operand(matrix, layout, per_strip, random_words)
    return Operand(values.view(x.shape), amax, GLOBAL_DIVISOR)


# ----------------------------------------------------------------------------------- elements
def round_e2m1(x: Tensor, random_words: Tensor | None = None) -> Tensor:
    """Round FP32 numbers to E2M1, saturating at ±6. Returns a new tensor.

    random_words None: to nearest, ties to the even code. NaN becomes 0, as in the comparisons of
    the reference. With uint8 words r: |x| + step · r/256 in FP32, rounded down to the grid, where
    step is the grid's step at |x|. NaN becomes 6, as in a saturating conversion. A zero result is
    +0. Source of stochastic rounding: Transformer Engine's software rounder (pull request 3281).
    """
    if random_words is None:
        return _round_to_nearest_(x.nan_to_num(nan=0.0, posinf=E2M1_MAX, neginf=-E2M1_MAX))
    finite = x.nan_to_num(nan=E2M1_MAX, posinf=E2M1_MAX, neginf=-E2M1_MAX)
    return _round_stochastically_(finite, random_words).mul_(0.5)


def _round_to_nearest_(scaled: Tensor) -> Tensor:
    return round_to_nearest_(scaled.clamp_(-E2M1_MAX, E2M1_MAX), mantissa_bits=1, min_exponent=0)


def _round_stochastically_(scaled: Tensor, words: Tensor) -> Tensor:
    """Round in place. Returns TWICE the rounded number, which saves one pass over memory.

    The grid's step at z is half of max(1, z's power of two). Below 4, the integer part of twice
    the sum is already on the doubled grid. Keeping only the first mantissa bit puts larger numbers
    on it and leaves those below 4 unchanged. FP32 rounds the sum once, like the fused multiply-add
    of the source: word times step is exact.
    """
    scaled.clamp_(-E2M1_MAX, E2M1_MAX)
    bits = torch.bitwise_and(scaled.view(torch.int32), 0x7F800000)
    power = bits.clamp_(min=0x3F800000).view(torch.float32)
    increments = words.float().mul_(power).copysign_(scaled)
    scaled.add_(increments, alpha=2.0**-9).mul_(2.0)
    scaled.copy_(bits.copy_(scaled))  # the integer part, rounded toward zero
    scaled.view(torch.int32).bitwise_and_(-(1 << 22))
    return scaled


def e2m1_codes(x: Tensor, random_words: Tensor | None = None) -> Tensor:
    """uint8 codes, sign in bit 3, of FP32 numbers rounded as in `round_e2m1`.

    A negative number that rounds to zero keeps its sign. -0 becomes code 0 when rounding to nearest
    (as in the comparisons of the reference) and code 8 when rounding stochastically (the sign is
    copied).
    """
    magnitudes = round_e2m1(x, random_words).abs_()
    # Adding 0.25 puts the eight magnitudes in different half binades: 253 … 259, except for zero.
    codes = magnitudes.add_(0.25).view(torch.int32)
    codes.bitwise_right_shift_(22).sub_(252).clamp_(min=0)
    signs = (x + 0.0 if random_words is None else x).view(torch.int32) >> 28
    if random_words is None:
        signs.masked_fill_(x.isnan(), 0)
    return codes.bitwise_or_(signs.bitwise_and_(8)).to(torch.uint8)


def _scaled(x: Tensor, encode: Tensor) -> Tensor:
    """x · encode in FP32, in a new tensor."""
    if x.dtype == torch.float32:
        return x * encode
    return x.float().mul_(encode)


# ------------------------------------------------------------------------------------- blocks
@dataclass(frozen=True)
class _Scales:
    """Scales per block; the dimensions of a block have size 1. Multiply by `encode` before
    rounding and by `decode` (the E4M3 number) after. amax: FP32 scalar, or [E] if stacked."""

    encode: Tensor
    decode: Tensor
    amax: Tensor


class _Blocks:
    """A matrix viewed as blocks: values are [R, B, 16] (dim -1), [B, 16, C] (dim 0) or
    [R/16, 16, C/16, 16] (2-D). Leading dimensions are flattened, sizes padded with zeros."""

    def __init__(
        self, x: Tensor, block: Block, dim: Literal[-1, 0], rows_per_tensor: Tensor | None = None
    ) -> None:
        assert block in ("1d", "2d") and dim in (-1, 0), (block, dim)
        assert x.dtype in (torch.float32, torch.bfloat16, torch.float16), x.dtype
        self._block, self._dim = block, dim
        self._size = (x.numel() // max(1, x.shape[-1]), x.shape[-1])
        self.values = self.split(x)
        self._lengths = None
        if rows_per_tensor is not None:
            rows_per_entry = 1 if block == "1d" and dim == -1 else BLOCK
            self._lengths = rows_per_tensor.to(x.device) // rows_per_entry

    def split(self, x: Tensor) -> Tensor:
        """The elements of x, or their random words, as blocks; a view if nothing is padded."""
        num_rows, num_columns = self._size
        matrix = x.reshape(num_rows, num_columns)
        pad_rows = -num_rows % BLOCK if self._block == "2d" or self._dim == 0 else 0
        pad_columns = -num_columns % BLOCK if self._block == "2d" or self._dim == -1 else 0
        if pad_rows or pad_columns:
            matrix = F.pad(matrix, (0, pad_columns, 0, pad_rows))
        matrix = matrix.contiguous()
        if self._block == "2d":
            return matrix.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        return matrix.unflatten(self._dim, (-1, BLOCK))

    def join(self, values: Tensor, keep_padded_columns: bool = False) -> Tensor:
        """Blocks back to the matrix, without the padding."""
        num_rows, num_columns = self._size
        matrix = values.flatten(0, 1) if self._block == "2d" or self._dim == 0 else values
        matrix = matrix if matrix.ndim == 2 else matrix.flatten(1)
        if keep_padded_columns:
            return matrix[:num_rows]
        return matrix[:num_rows, :num_columns].contiguous()

    def scales(self, amax: Tensor | None, reduce_amax: ReduceAmax | None) -> _Scales:
        """Roundings and clamps in the order of Transformer Engine's reference,
        `_quantize_blockwise_reference`. Divisions are between tensors: dividing by a Python number
        would become a multiplication by its reciprocal."""
        block_amax = self._block_amax()
        if amax is None:
            entries = block_amax.flatten(1).amax(1) if block_amax.numel() else block_amax.flatten()
            amax = _segment_amax(entries, self._lengths)
        amax = amax.float()
        if reduce_amax is not None:
            amax = reduce_amax(amax)
        tensor_encode = (amax.new_full((), GLOBAL_DIVISOR) / amax).clamp(max=_FLOAT_MAX)
        tensor_encode = tensor_encode.masked_fill(tensor_encode == 0, 1.0)
        tensor_decode = self._spread(tensor_encode.reciprocal())
        sixth = amax.new_full((), E2M1_MAX).reciprocal()
        decode = block_amax.mul_(self._spread(tensor_encode * sixth))
        # No lower clamp: a block far below the tensor's maximum gets scale 0.
        decode = round_to_nearest_(decode.clamp_(max=E4M3_MAX), mantissa_bits=3, min_exponent=-6)
        encode = (decode * tensor_decode).reciprocal_().clamp_(max=_FLOAT_MAX)
        return _Scales(encode, decode, amax)

    def _spread(self, per_tensor: Tensor) -> Tensor:
        """Repeat one number per tensor for each entry of the first dimension of `values`."""
        if self._lengths is None:
            return per_tensor
        # Without the size, a GPU would have to be asked for it.
        spread = per_tensor.repeat_interleave(self._lengths, output_size=len(self.values))
        return spread.view(-1, *[1] * (self.values.ndim - 1))

    def _block_amax(self) -> Tensor:
        """max |x| of each block in FP32; NaN if the block holds a NaN."""
        if self.values.device.type != "cpu":
            dims = (1, 3) if self._block == "2d" else (-1 if self._dim == -1 else 1,)
            return self.values.abs().amax(dims, keepdim=True).float()
        chunk = rows_per_chunk(self.values, _CHUNK_ELEMENTS)
        amax_of = _amax_of_rows if self._dim == -1 and self._block == "1d" else _amax_of_columns
        block_amax = torch.cat([amax_of(part) for part in self.values.split(chunk)])
        if self._block == "2d":
            return _amax_of_rows(block_amax.squeeze(1)).unsqueeze(1)
        return block_amax


def _segment_amax(entries: Tensor, lengths: Tensor | None) -> Tensor:
    """The largest of all entries, or of each segment of `lengths`; 0 for an empty segment."""
    if lengths is None:
        return entries.amax() if entries.numel() else entries.new_zeros(())
    # unsafe: the host does not read the lengths back from a GPU to check them.
    unsafe = entries.is_cuda
    return torch.segment_reduce(entries, "max", lengths=lengths, initial=0.0, unsafe=unsafe)


def _amax_of_rows(x: Tensor) -> Tensor:
    """max |x| over the last dimension, [P, B, 16] → [P, B, 1] in FP32. On a CPU pooling is four
    times as fast as a reduction over so few elements."""
    if x.numel() == 0:  # an expert without tokens: max_pool1d rejects an empty tensor
        return x.new_zeros((*x.shape[:-1], 1), dtype=torch.float32)
    return F.max_pool1d(x.abs().float().flatten(1), BLOCK).unsqueeze(-1)


def _amax_of_columns(x: Tensor) -> Tensor:
    """max |x| over dimension 1, kept with size 1, in FP32. Without the sign bit, floats have the
    order of their bit patterns, with NaN largest. Integers are reduced twice as fast as BF16."""
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    largest = (x.view(integer) & torch.iinfo(integer).max).amax(1, keepdim=True)
    return largest.view(x.dtype).float()
