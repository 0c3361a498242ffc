"""What the Triton kernels share: loading and storing BF16, sigmoid, tiles and products.

Owns: conversions by integer arithmetic. Does not own: any layer's arithmetic.

Kernels see BF16 tensors as int16 (`as_bits`) and convert by shifts. Reason: the interpreter's own
conversions lose the carry into the exponent, do not round ties to even and change subnormals
(triton 3.7.1), so its result would not show what a GPU computes. The integer operations cost
nothing that is visible in a kernel whose time is that of its memory accesses.
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def loaded(value):
    """FP32 from what was loaded: BF16 bits as int16, or FP32."""
    if value.dtype == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value


@triton.jit
def stored(value, pointer):
    """FP32 as the elements of `pointer`: BF16 bits rounded to nearest, ties to even, or FP32."""
    if pointer.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding would carry the largest payload of a NaN into the sign.
        return tl.where(value != value, 0x7FC0, rounded).to(tl.int16)
    else:
        return value


@triton.jit
def sigmoid(value):
    """1 / (1 + e^-value), within a few units in the last place. 0 or 1 far from zero."""
    return 1.0 / (1.0 + tl.exp(-value))


# The interpreter multiplies the bit patterns of BF16 operands (triton 3.7.1).
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # pyright: ignore


@triton.jit
def product(a, b):
    """a @ b with FP32 sums, for operands as they are loaded: BF16 bits as int16, or FP32 (without
    TF32). All sizes at least 16."""
    if a.dtype == tl.int16 and not _INTERPRETED:
        return tl.dot(a.to(tl.bfloat16, bitcast=True), b.to(tl.bfloat16, bitcast=True))
    else:
        return tl.dot(loaded(a), loaded(b), input_precision="ieee")


@triton.jit
def narrowed(value, NARROW: tl.constexpr):
    """FP32 as an operand of `product`: BF16 bits if NARROW, rounded to nearest even."""
    if not NARROW:
        return value
    elif _INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return value.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def tile_of(matrix, rows, columns, row_stride, column_stride, num_rows, num_columns):
    """[R, C] of a matrix, as loaded; zero outside. The offsets have 64 bits."""
    at = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(matrix + at, mask=inside, other=0)


@triton.jit
def _twice(x, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < N, other=0.0)
    tl.store(out + at, value + value, mask=at < N)


def twice(x_N: Tensor) -> Tensor:
    """2 x, contiguous FP32 [N]: the kernel by which `available` tests Triton."""
    out_N = torch.empty_like(x_N)
    _twice[(tiles(len(x_N), 128),)](x_N, out_N, len(x_N), BLOCK=128)
    return out_N


def as_bits(t: Tensor) -> Tensor:
    """A BF16 tensor viewed as int16, with the same strides; any other tensor itself."""
    return t.view(torch.int16) if t.dtype == torch.bfloat16 else t


def tiles(size: int, tile: int) -> int:
    """Number of tiles that cover `size`."""
    return -(-size // tile)


def as_int32(value: int) -> int:
    """The low 32 bits of an integer, as a signed integer: one argument type for every value, so
    that no value compiles the kernel again."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
