"""C kernels of quantization on a CPU: NVFP4 and MXFP8 in one sweep over a matrix (csrc/quantize.c).

Owns: the marshalling of tensors for the C functions. Does not own: the arithmetic.
precision/nvfp4.py and precision/mxfp8.py define it, and the C file gives the same bits. Without a C
compiler their torch operators compute the same numbers in ten times the time.
"""

import ctypes
import functools
from typing import Protocol

import torch
from torch import Tensor

from nemotron_train.kernels import compilation
from nemotron_train.kernels.library import CSRC, INT32, INT64, POINTER, Kernel

# -O3 takes twice as long to compile and is hardly faster at run time. Fused multiply-adds would
# change bits, so contraction is off.
_FLAGS = ("-O2", "-ftree-vectorize", "-fpeel-loops", "-ffp-contract=off")


class RandomSource(Protocol):
    """Counter of the random words of stochastic rounding; see `precision.rounding.RandomWords`."""

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
    """The library of quantize.c; None, with a warning that gives the reason, if it cannot be
    compiled. Separate from `layer_library`, since it needs other compiler flags."""
    return compilation.library((CSRC / "quantize.c",), _FLAGS)


def can_quantize() -> bool:
    """Whether the kernels of this module are available (quantize.c could be compiled)."""
    return quantize_library() is not None


_MATRIX, _WORDS = ctypes.POINTER(_Matrix), ctypes.POINTER(_Words)


def _kernel(name: str, *argtypes: type) -> Kernel:
    # A lambda, so that tests can replace `quantize_library`.
    return Kernel(name, *argtypes, library=lambda: quantize_library())


_strip_amax = _kernel("strip_amax", _MATRIX, INT64, INT32, POINTER)
_nvfp4_operand = _kernel("nvfp4_operand", _MATRIX, INT32, POINTER, INT64, _WORDS, INT32, POINTER)
_nvfp4_codes = _kernel("nvfp4_codes", _MATRIX, INT32, POINTER, INT32, POINTER, POINTER)
_mxfp8_operand = _kernel("mxfp8_operand", _MATRIX, INT32, POINTER, INT32, POINTER)


def strip_amax(x_RC: Tensor, height: int) -> Tensor:
    """max |x| of each strip of `height` rows: FP32 [ceil(R / height)]; NaN if an element is NaN."""
    amax = torch.empty(-(-x_RC.shape[0] // height))
    _strip_amax(_matrix(x_RC), height, torch.get_num_threads(), amax.data_ptr())
    return amax


def nvfp4_operand(x_RC: Tensor, layout: int, amax: Tensor, words: RandomSource | None) -> Tensor:
    """The operand of a product, BF16 [R, C]: NVFP4 codes times block scales.

    layout: block shape, 0: 1 x 16; 1: 16 x 1; 2: 16 x 16 (round to nearest only). amax: FP32, of
    the whole tensor, of each row (layout 0) or of each 16 rows. words: stochastic rounding with
    these random words; None rounds to nearest.
    """
    out = torch.empty(x_RC.shape, dtype=torch.bfloat16)
    random_words = None
    if words is not None:
        random_words = _Words(
            words.seed, words.stream, words.step, words.row_offset, words.column_offset
        )
    num_strips = x_RC.shape[0] if layout == 0 else -(-x_RC.shape[0] // 16)
    assert amax.ndim == 0 or len(amax) == num_strips, (x_RC.shape, layout, amax.shape)
    amax = amax.contiguous()
    stride = 1 if amax.ndim else 0  # 0: every strip uses the same amax
    threads = torch.get_num_threads()
    arguments = (layout, amax.data_ptr(), stride, random_words, threads, out.data_ptr())
    _nvfp4_operand(_matrix(x_RC), *arguments)
    return out


def nvfp4_codes(x_RC: Tensor, layout: int, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales in the form of `NVFP4Tensor`, rounded to nearest: uint8
    [R, ceil(C / 2)], two codes a byte, and uint8 (E4M3 bits) [R, ceil(C / 16)]; with layout 2 the
    scales' rows are padded to a multiple of 16. layout: 0 or 2. amax: FP32, of the whole tensor."""
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
    """The operand of a product, BF16 [R, C]: MXFP8 codes times block scales, relative to the scale
    of `amax` (FP32, of the whole tensor). layout: block shape, 0: 1 x 32; 1: 32 x 1."""
    out = torch.empty(x_RC.shape, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    _mxfp8_operand(_matrix(x_RC), layout, amax.data_ptr(), threads, out.data_ptr())
    return out


def _matrix(x: Tensor) -> _Matrix:
    assert x.ndim == 2 and x.is_contiguous() and x.device.type == "cpu", (x.shape, x.device)
    assert x.dtype in (torch.bfloat16, torch.float32), x.dtype
    return _Matrix(x.data_ptr(), *x.shape, x.dtype == torch.bfloat16)


def operand_matrix(x: Tensor) -> Tensor:
    """x in the form the kernels take: contiguous [R, C], leading dimensions flattened, FP16
    converted to FP32."""
    matrix = x.reshape(-1, x.shape[-1]).contiguous()
    return matrix.float() if matrix.dtype == torch.float16 else matrix
