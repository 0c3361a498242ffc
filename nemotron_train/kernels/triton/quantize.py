"""Triton kernels of quantization: NVFP4 and MXFP8 from a matrix to the BF16 operand in one pass.

Owns: the kernels and their launches. Does not own: the arithmetic (precision/nvfp4.py, mxfp8.py and
rounding.py define it; these kernels give the same bits), the amax of several ranks, the Hadamard
transform. The functions are those of kernels/quantize.py, which holds the C form.

Floor: an operand reads 2 bytes and writes 2 an element (BF16), 4 bytes over the bandwidth: 0.84 us
for a million elements at 4.8 TB/s (H200). `strip_amax` reads 2 more, because the scale of the
tensor must be known before the first block. Random words are computed and cost no bytes.

No kernel may be compiled with fused multiply-adds (`enable_fp_fusion=False`): they change bits.
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_train.kernels.quantize import RandomSource
from nemotron_train.kernels.triton.elements import as_bits, as_int32, loaded, tiles

# Elements of a tile: rows x columns a program, for each block height.
_TILES = {1: (16, 128), 16: (16, 128), 32: (32, 64)}
_AMAX_COLUMNS = 1024
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits_of(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _clamped(value, limit):
    """Into [-limit, limit]; a NaN stays NaN."""
    value = tl.where(value > limit, limit, value)
    return tl.where(value < -limit, -limit, value)


@triton.jit
def _to_nearest(value, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """round_to_nearest_ in rounding.py: the FP32 adder rounds once, ties to even."""
    bits = tl.maximum(_bits_of(value) & 0x7F800000, (MIN_EXPONENT + 127) << 23)
    magic = _float_of(bits + (((23 - MANTISSA_BITS) << 23) | (1 << 22)))
    return (value + magic) - magic


@triton.jit
def _stochastically(value, words):
    """_round_stochastically_ in nvfp4.py, but not doubled. A NaN becomes zero; the scale of its
    block is NaN."""
    power = _float_of(tl.maximum(_bits_of(value) & 0x7F800000, 0x3F800000))
    increment = words.to(tl.float32) * power
    increment = tl.where(value < 0, -increment, increment) * 0.001953125  # 2^-9
    total = (value + increment) * 2.0
    whole = tl.where(total != total, 0.0, total).to(tl.int32).to(tl.float32)
    return _float_of(_bits_of(whole) & -4194304) * 0.5  # the sign, the exponent, one mantissa bit


@triton.jit
def _words(rows, columns, seed_low, seed_high, stream, step):
    """random_words in rounding.py for int32 rows [R] and columns [C]: uint8 values [R, C]."""
    zeros = tl.zeros_like(rows)
    key_low, key_high, _, _ = tl.random.philox_impl(
        rows.to(tl.uint32, bitcast=True),
        (zeros + stream).to(tl.uint32, bitcast=True),
        (zeros + step).to(tl.uint32, bitcast=True),
        zeros.to(tl.uint32, bitcast=True),
        (zeros + seed_low).to(tl.uint32, bitcast=True),
        (zeros + seed_high).to(tl.uint32, bitcast=True),
        10,
    )
    columns = columns.to(tl.uint32, bitcast=True)
    spread = (columns >> 2) * tl.full([1], 0x9E3779B9, tl.uint32)
    mixed = spread[None, :] ^ key_low[:, None]
    mixed = (mixed ^ (mixed >> 16)) * tl.full([1, 1], 0x85EBCA6B, tl.uint32) + key_high[:, None]
    mixed = (mixed ^ (mixed >> 13)) * tl.full([1, 1], 0xC2B2AE35, tl.uint32)
    mixed = mixed ^ (mixed >> 16)
    return (mixed >> ((columns & 3) * 8)[None, :]) & 0xFF


@triton.jit
def _nvfp4_factors(block_amax, amax):
    """`_Blocks.scales` in nvfp4.py: what multiplies a block's elements before and after rounding.
    All divisions are rounded correctly. amax broadcasts to block_amax."""
    encode_all = tl.div_rn(tl.full([1, 1], 2688.0, tl.float32), amax)
    encode_all = tl.where(encode_all > _FLOAT_MAX, _FLOAT_MAX, encode_all)
    encode_all = tl.where(encode_all == 0.0, 1.0, encode_all)
    decode_all = tl.div_rn(tl.full([1, 1], 1.0, tl.float32), encode_all)
    decode = block_amax * (encode_all * 0.16666667163372040)  # FP32's 1/6
    decode = _to_nearest(tl.where(decode > 448.0, 448.0, decode), 3, -6)
    encode = tl.div_rn(tl.full([1, 1], 1.0, tl.float32), decode * decode_all)
    encode = tl.where(encode > _FLOAT_MAX, _FLOAT_MAX, encode)
    return tl.where(decode == 0.0, 0.0, encode), decode


@triton.jit
def _exponent(amax):
    """`_exponents_of` in mxfp8.py."""
    bits = _bits_of(amax * 0.002232142956927419) & 0x7FFFFFFF  # FP32's 1/448
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    rounds_up = (mantissa > 0) & ((exponent != 0) | (mantissa > 0x400000))
    return tl.minimum(exponent + rounds_up.to(tl.int32), 254) - 127


@triton.jit
def _power_of_two(exponent):
    """2^exponent; 2^-127 for any smaller exponent."""
    return _float_of(tl.maximum((exponent + 127) << 23, 1 << 22))


@triton.jit
def _mxfp8_factors(block_amax, amax):
    """As `_nvfp4_factors`, for `mxfp8_operand` in mxfp8.py."""
    exponent = _exponent(block_amax)
    below = exponent - _exponent(amax)
    decode = tl.where(below < -117, 0.0, _power_of_two(below))
    return _power_of_two(-exponent), tl.where(block_amax != block_amax, block_amax, decode)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "step", "row_0", "column_0"])
def _quantized_operand(
    x,
    out,
    amax_of_strip,
    rows,
    columns,
    amax_stride,
    seed_low,
    seed_high,
    stream,
    step,
    row_0,
    column_0,
    IS_MXFP8: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tile = tl.program_id(0) // column_tiles
    r = row_tile * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    at = r.to(tl.int64)[:, None] * columns + c[None, :]
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    value = loaded(tl.load(x + at, mask=inside, other=0))

    # Without the sign, floats have the order of their bits, and a NaN is the largest.
    bits = tl.reshape(
        _bits_of(value) & 0x7FFFFFFF, [ROWS // HEIGHT, HEIGHT, COLUMNS // WIDTH, WIDTH]
    )
    block_amax = _float_of(tl.max(tl.max(bits, axis=3), axis=1))
    strip = row_tile * (ROWS // HEIGHT) + tl.arange(0, ROWS // HEIGHT)
    amax = tl.load(amax_of_strip + strip * amax_stride, mask=strip * HEIGHT < rows, other=0.0)
    if IS_MXFP8:
        encode, decode = _mxfp8_factors(block_amax, amax[:, None])
    else:
        encode, decode = _nvfp4_factors(block_amax, amax[:, None])
    zeros = tl.zeros([ROWS // HEIGHT, HEIGHT, COLUMNS // WIDTH, WIDTH], tl.float32)
    encode = tl.reshape(encode[:, None, :, None] + zeros, [ROWS, COLUMNS])
    decode = tl.reshape(decode[:, None, :, None] + zeros, [ROWS, COLUMNS])

    scaled = value * encode
    if IS_MXFP8:
        rounded = _to_nearest(_clamped(scaled, 448.0), 3, -6)
    elif STOCHASTIC:
        words = _words(r + row_0, c + column_0, seed_low, seed_high, stream, step)
        rounded = _stochastically(_clamped(scaled, 6.0), words)
    else:
        rounded = _to_nearest(_clamped(scaled, 6.0), 1, 0)
    # A code times its block's scale is a BF16 number, so cutting off the lower half is exact.
    result = _bits_of(rounded * decode)
    result = tl.where(decode != decode, 0x7FC00000, result)
    tl.store(out + at, (result >> 16).to(tl.int16), mask=inside)


@triton.jit
def _strip_amax(x, out, rows, columns, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    largest = tl.zeros([HEIGHT, COLUMNS], tl.int32)
    for start in range(0, columns, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        at = r.to(tl.int64)[:, None] * columns + c[None, :]
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        value = loaded(tl.load(x + at, mask=inside, other=0))
        largest = tl.maximum(largest, _bits_of(value) & 0x7FFFFFFF)
    tl.store(out + tl.program_id(0), _float_of(tl.max(tl.max(largest, axis=1), axis=0)))


def strip_amax(x_RC: Tensor, height: int) -> Tensor:
    """max |x| of each strip of `height` rows: FP32 [ceil(R / height)]; NaN if an element is NaN.
    x: contiguous BF16 or FP32. height: a power of two."""
    out = torch.empty(tiles(x_RC.shape[0], height), device=x_RC.device)
    if out.numel():
        columns = max(16, _AMAX_COLUMNS // height)
        sizes = {"HEIGHT": height, "COLUMNS": columns}
        _strip_amax[(len(out),)](as_bits(x_RC), out, *x_RC.shape, **sizes)
    return out


def nvfp4_operand(x_RC: Tensor, layout: int, amax: Tensor, words: RandomSource | None) -> Tensor:
    """The operand of a product, BF16 [R, C]: NVFP4 codes times block scales.

    x: contiguous BF16 or FP32. layout: block shape, 0: 1 x 16; 1: 16 x 1; 2: 16 x 16. amax: FP32,
    of the whole tensor, of each row (layout 0) or of each 16 rows. words: stochastic rounding with
    these random words; None rounds to nearest.
    """
    height, width = ((1, 16), (16, 1), (16, 16))[layout]
    return _launch(x_RC, (height, width), amax, words, is_mxfp8=False)


def mxfp8_operand(x_RC: Tensor, layout: int, amax: Tensor) -> Tensor:
    """The operand of a product, BF16 [R, C]: MXFP8 codes times block scales, relative to the scale
    of `amax` (FP32, of the whole tensor). layout: block shape, 0: 1 x 32; 1: 32 x 1."""
    return _launch(x_RC, ((1, 32), (32, 1))[layout], amax, None, is_mxfp8=True)


def _launch(
    x_RC: Tensor,
    block: tuple[int, int],
    amax: Tensor,
    words: RandomSource | None,
    *,
    is_mxfp8: bool,
) -> Tensor:
    assert x_RC.ndim == 2 and x_RC.is_contiguous(), (x_RC.shape, x_RC.stride())
    out = torch.empty(x_RC.shape, dtype=torch.bfloat16, device=x_RC.device)
    if not out.numel():
        return out
    height, width = block
    assert amax.ndim == 0 or len(amax) == tiles(x_RC.shape[0], height), (x_RC.shape, amax.shape)
    counter = (0, 0, 0, 0, 0, 0)
    if words is not None:
        seed = (words.seed, words.seed >> 32)
        position = (words.row_offset, words.column_offset)
        counter = tuple(as_int32(n) for n in (*seed, words.stream, words.step, *position))
    rows, columns = _TILES[height]
    num_tiles = tiles(x_RC.shape[0], rows) * tiles(x_RC.shape[1], columns)
    _quantized_operand[(num_tiles,)](
        as_bits(x_RC),
        as_bits(out),
        amax.contiguous(),
        *x_RC.shape,
        1 if amax.ndim else 0,  # 0: every strip uses the same amax
        *counter,
        IS_MXFP8=is_mxfp8,
        STOCHASTIC=words is not None,
        HEIGHT=height,
        WIDTH=width,
        ROWS=rows,
        COLUMNS=columns,
        enable_fp_fusion=False,
    )
    return out
