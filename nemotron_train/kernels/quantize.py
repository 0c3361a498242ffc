"""C kernels of quantization on a CPU: NVFP4 and MXFP8 in one pass over a matrix (csrc/quantize.c).

Owns: the C functions' arguments as tensors. Does not own: the arithmetic. precision/nvfp4.py and
precision/mxfp8.py define it, and the C file repeats it bit for bit; without a C compiler their
torch operators compute the same numbers in ten times the time.
"""

import ctypes
import functools
from typing import Protocol

import torch
from torch import Tensor

from nemotron_train.kernels import compilation
from nemotron_train.kernels.library import CSRC, INT32, INT64, POINTER, Kernel

# -O3 takes twice as long to compile and is hardly faster. Fused multiply-adds would change bits.
_FLAGS = ("-O2", "-ftree-vectorize", "-fpeel-loops", "-ffp-contract=off")


class RandomSource(Protocol):
    """The counter of stochastic rounding's random words (`precision.rounding.RandomWords`)."""

    @property
    def seed(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def row_offset(self) -> int: ...
    @property
    def column_offset(self) -> int: ...


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("values", POINTER),
        ("rows", INT64),
        ("columns", INT64),
        ("is_bfloat16", INT32),
    )


class _Words(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("row_offset", INT64),
        ("column_offset", INT64),
    )


@functools.cache
def quantize_library() -> ctypes.CDLL | None:
    """quantize.c, compiled; None, with a warning that says why, where it cannot be compiled."""
    return compilation.library((CSRC / "quantize.c",), _FLAGS)


def can_quantize() -> bool:
    """Whether the kernels of this module can run here."""
    return quantize_library() is not None


_MATRIX, _WORDS = ctypes.POINTER(_Matrix), ctypes.POINTER(_Words)


def _kernel(name: str, *argtypes: type) -> Kernel:
    return Kernel(name, *argtypes, library=lambda: quantize_library())


_strip_amax = _kernel("strip_amax", _MATRIX, INT64, INT32, POINTER)
_nvfp4_operand = _kernel("nvfp4_operand", _MATRIX, INT32, POINTER, INT64, _WORDS, INT32, POINTER)
_nvfp4_codes = _kernel("nvfp4_codes", _MATRIX, INT32, POINTER, INT32, POINTER, POINTER)
_mxfp8_operand = _kernel("mxfp8_operand", _MATRIX, INT32, POINTER, INT32, POINTER)


def strip_amax(x_RC: Tensor, height: int) -> Tensor:
    """max |x| of every `height` rows: FP32 [ceil(R / height)]; NaN if one of them is NaN."""
    amax = torch.empty(-(-x_RC.shape[0] // height))
    _strip_amax(_matrix(x_RC), height, torch.get_num_threads(), amax.data_ptr())
    return amax


def nvfp4_operand(x_RC: Tensor, layout: int, amax: Tensor, words: RandomSource | None) -> Tensor:
    """BF16 [R, C], codes times block scales.

    layout: blocks are 0: 1 x 16; 1: 16 x 1; 2: 16 x 16, to nearest only. amax: FP32, of the tensor,
    or of each row (layout 0) or each 16 rows. words: stochastic rounding; None rounds to nearest.
    """
    out = torch.empty(x_RC.shape, dtype=torch.bfloat16)
    drawn = None
    if words is not None:
        drawn = _Words(words.seed, words.stream, words.step, words.row_offset, words.column_offset)
    num_strips = x_RC.shape[0] if layout == 0 else -(-x_RC.shape[0] // 16)
    assert amax.ndim == 0 or len(amax) == num_strips, (x_RC.shape, layout, amax.shape)
    amax = amax.contiguous()
    stride = 1 if amax.ndim else 0
    threads = torch.get_num_threads()
    _nvfp4_operand(_matrix(x_RC), layout, amax.data_ptr(), stride, drawn, threads, out.data_ptr())
    return out


def nvfp4_codes(x_RC: Tensor, layout: int, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as `NVFP4Tensor` holds them, to nearest. layout: 0 or 2; amax: FP32."""
    num_rows, num_columns = x_RC.shape
    scale_rows = num_rows if layout == 0 else -(-num_rows // 16) * 16
    codes = torch.empty(num_rows, -(-num_columns // 2), dtype=torch.uint8)
    scales = torch.empty(scale_rows, -(-num_columns // 16), dtype=torch.uint8)
    threads = torch.get_num_threads()
    _nvfp4_codes(
        _matrix(x_RC), layout, amax.data_ptr(), threads, codes.data_ptr(), scales.data_ptr()
    )
    return codes, scales


def mxfp8_operand(x_RC: Tensor, layout: int, amax: Tensor) -> Tensor:
    """BF16 [R, C] relative to the scale of `amax` (FP32, of the whole tensor). layout: blocks are
    0: 1 x 32; 1: 32 x 1."""
    out = torch.empty(x_RC.shape, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    _mxfp8_operand(_matrix(x_RC), layout, amax.data_ptr(), threads, out.data_ptr())
    return out


def _matrix(x: Tensor) -> _Matrix:
    assert x.ndim == 2 and x.is_contiguous() and x.device.type == "cpu", (x.shape, x.device)
    assert x.dtype in (torch.bfloat16, torch.float32), x.dtype
    return _Matrix(x.data_ptr(), *x.shape, x.dtype == torch.bfloat16)


def operand_matrix(x: Tensor) -> Tensor:
    """x as the kernels take it: [R, C], leading dimensions flattened, FP16 widened."""
    matrix = x.reshape(-1, x.shape[-1]).contiguous()
    return matrix.float() if matrix.dtype == torch.float16 else matrix
