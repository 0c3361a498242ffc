"""Rounding to a low-precision grid, and the random words for stochastic rounding.

Owns: nearest-even rounding of FP32 numbers to a floating-point grid; a counter-based generator of
8-bit words. Does not own: scales and blocks (nvfp4.py, mxfp8.py), the rounding of each tensor
(precision/linear.py).

The generator has no state: a word is a function of (seed, stream, step, row, column). So a rank can
draw the words of its slice of a tensor, and a resumed run draws those of its step again.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

_BYTES_PER_WORD = 4
# Words generated at a time on a CPU, so that the temporaries stay in the cache.
_CHUNK_ELEMENTS = 1 << 21

_EXPONENT_MASK = 0x7F800000
_MANTISSA_BITS = 23


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], num_rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: 128 random bits from a 128-bit counter.

    counter: four int64 tensors of one shape, each element in [0, 2^32).
    key: two integers in [0, 2^32). Returns four int64 tensors with elements in [0, 2^32).
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.
    """
    c0, c1, c2, c3 = counter
    key_0, key_1 = key
    for _ in range(num_rounds):
        # The 64-bit product of two 32-bit numbers may wrap to a negative int64. Its bits are right,
        # and the mask removes the sign bits that the arithmetic shift adds.
        product_0, product_1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0 = ((product_1 >> 32) & _WORD) ^ c1 ^ key_0
        c2 = ((product_0 >> 32) & _WORD) ^ c3 ^ key_1
        c1, c3 = product_1 & _WORD, product_0 & _WORD
        key_0, key_1 = (key_0 + _PHILOX_WEYL[0]) & _WORD, (key_1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def random_words(
    shape: tuple[int, int],
    *,
    seed: int,
    stream: int,
    step: int = 0,
    row_offset: int = 0,
    column_offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """uint8 words, uniform on 0…255, for the elements of a matrix or of a slice of it.

    The word of an element depends only on seed (64 bits), stream (which tensor: 32 bits), step (32
    bits) and the element's row and column in the whole matrix (32 bits each). So
    `random_words((2, 3), row_offset=r, column_offset=c, …)` is [r:r+2, c:c+3] of the whole.

    Philox4x32-10 turns (seed, stream, step, row) into a 64-bit key for the row. The words of the
    row are a 32-bit mix with two multiplications (MurmurHash3's finalizer) of that key and the
    column, four words per mix. This is a few times cheaper than Philox for every element, and good
    enough for 8-bit rounding; tests/precision/test_rounding.py checks the statistics.
    """
    num_rows, num_columns = shape
    first_group = column_offset // _BYTES_PER_WORD
    skipped = column_offset - first_group * _BYTES_PER_WORD
    num_groups = -(-(skipped + num_columns) // _BYTES_PER_WORD)
    rows = torch.arange(row_offset, row_offset + num_rows, device=device)
    streams, steps = torch.full_like(rows, stream & _WORD), torch.full_like(rows, step & _WORD)
    counter = (rows, streams, steps, torch.zeros_like(rows))
    key_0, key_1, _, _ = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD), _PHILOX_ROUNDS)
    groups = torch.arange(first_group, first_group + num_groups, device=device)
    spread = _as_int32(groups * _PHILOX_WEYL[0])
    words = torch.empty(num_rows, num_groups, dtype=torch.int32, device=device)
    chunk = rows_per_chunk(words, _CHUNK_ELEMENTS // _BYTES_PER_WORD)
    keys = (_as_int32(key_0)[:, None], _as_int32(key_1)[:, None])
    for start in range(0, num_rows, chunk):
        part = slice(start, start + chunk)
        _mix(spread, keys[0][part], keys[1][part], out=words[part])
    return words.view(torch.uint8)[:, skipped : skipped + num_columns]


@dataclass(frozen=True)
class RandomWords:
    """Random words that are not drawn yet: the arguments of `random_words` except the shape. A
    kernel can compute each word where it needs it. Fields: see `random_words`."""

    seed: int
    stream: int
    step: int = 0
    row_offset: int = 0
    column_offset: int = 0

    def draw(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """The words, uint8 of `shape` [R, C]."""
        num_rows, num_columns = shape
        return random_words((num_rows, num_columns), **asdict(self), device=device)


def _mix(spread: Tensor, key_0: Tensor, key_1: Tensor, out: Tensor) -> None:
    """MurmurHash3's 32-bit finalizer, with a key XORed before and another added in the middle."""
    # int32 shifts copy the sign bit in; the masks remove it.
    shifted = torch.bitwise_xor(spread, key_0, out=out).bitwise_right_shift(16)
    out.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(0x85EBCA6B - (1 << 32)).add_(key_1)
    torch.bitwise_right_shift(out, 13, out=shifted)
    out.bitwise_xor_(shifted.bitwise_and_(0x7FFFF)).mul_(0xC2B2AE35 - (1 << 32))
    torch.bitwise_right_shift(out, 16, out=shifted)
    out.bitwise_xor_(shifted.bitwise_and_(0xFFFF))


def _as_int32(values: Tensor) -> Tensor:
    """The low 32 bits of each int64, as int32."""
    return values.view(torch.int32).view(*values.shape, 2)[..., 0].contiguous()


def rows_per_chunk(rows: Tensor, elements: int) -> int:
    """Number of entries of the leading dimension to process at a time: about `elements` elements
    on a CPU, all of them elsewhere (a GPU is faster with few, large kernels)."""
    num_rows = max(1, rows.shape[0])
    if rows.device.type != "cpu":
        return num_rows
    return max(1, elements * num_rows // max(1, rows.numel()))


def round_to_nearest_(values: Tensor, *, mantissa_bits: int, min_exponent: int) -> Tensor:
    """Round FP32 values in place to the nearest number of a floating-point grid, ties to even.

    The grid has `mantissa_bits` stored mantissa bits. Below 2^min_exponent it keeps the step of
    that binade (subnormals). Values must already lie within the range of the format. A zero result
    is +0. NaN stays NaN.

    Five passes over memory: adding and subtracting 1.5 · 2^(23 - mantissa_bits) times a number's
    power of two makes the FP32 adder round it, exactly once.
    """
    magic_bits = torch.bitwise_and(values.view(torch.int32), _EXPONENT_MASK)
    magic_bits.clamp_(min=(min_exponent + 127) << _MANTISSA_BITS)
    magic_bits.add_(((_MANTISSA_BITS - mantissa_bits) << _MANTISSA_BITS) | (1 << 22))
    magic = magic_bits.view(torch.float32)
    return values.add_(magic).sub_(magic)
