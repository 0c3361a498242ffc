"""Quantization in one pass on a CPU: quantize.c, compiled where the run is, called on tensors.

Owns: building the C file for this machine's processor, and the tensors' way in and out. Does not
own: the arithmetic, which nvfp4.py and mxfp8.py define and the C file repeats bit for bit, nor what
is done without it: those files' own torch operators, the same numbers in ten times the time.

Without a C compiler it says so once, and the torch operators compute (platform/compiled_c.py).
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from nemotron_train.platform import compiled_c
from nemotron_train.precision.rounding import RandomWords

_SOURCE = Path(__file__).with_name("quantize.c")
# -O3 takes twice as long to compile and is hardly faster.
_FLAGS = ("-O2", "-ftree-vectorize", "-fpeel-loops", "-ffp-contract=off")


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("is_bfloat16", ctypes.c_int32),
    )


class _Words(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("stream", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("row_offset", ctypes.c_int64),
        ("column_offset", ctypes.c_int64),
    )


class Kernels:
    """The functions of quantize.c. Matrices are contiguous [R, C], BF16 or FP32, on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        matrix, pointer = ctypes.POINTER(_Matrix), ctypes.c_void_p
        int32, int64 = ctypes.c_int, ctypes.c_int64
        self._amax, self._mxfp8 = library.strip_amax, library.mxfp8_operand
        self._nvfp4, self._nvfp4_codes = library.nvfp4_operand, library.nvfp4_codes
        self._amax.argtypes = (matrix, int64, int32, pointer)
        self._nvfp4.argtypes = (matrix, int32, pointer, int64, pointer, int32, pointer)
        self._nvfp4_codes.argtypes = (matrix, int32, pointer, int32, pointer, pointer)
        self._mxfp8.argtypes = (matrix, int32, pointer, int32, pointer)
        for function in (self._amax, self._nvfp4, self._nvfp4_codes, self._mxfp8):
            function.restype = None

    def strip_amax(self, x: Tensor, height: int) -> Tensor:
        """max |x| of every `height` rows: FP32 [ceil(R / height)]; NaN if one of them is."""
        amax = torch.empty(-(-x.shape[0] // height))
        self._amax(_matrix(x), height, torch.get_num_threads(), amax.data_ptr())
        return amax

    def nvfp4_operand(
        self, x: Tensor, layout: int, amax: Tensor, words: RandomWords | None
    ) -> Tensor:
        """BF16 [R, C], codes times block scales. layout: blocks are 0: 1 x 16; 1: 16 x 1;
        2: 16 x 16, to nearest only. amax: FP32, of the tensor, or of each row's (layout 0) or 16
        rows' tensor."""
        out = torch.empty(x.shape, dtype=torch.bfloat16)
        drawn = None
        if words is not None:
            drawn = ctypes.byref(
                _Words(words.seed, words.stream, words.step, words.row_offset, words.column_offset)
            )
        num_strips = x.shape[0] if layout == 0 else -(-x.shape[0] // 16)
        assert amax.ndim == 0 or len(amax) == num_strips, (x.shape, layout, amax.shape)
        amax = amax.contiguous()
        stride = 1 if amax.ndim else 0
        threads = torch.get_num_threads()
        self._nvfp4(_matrix(x), layout, amax.data_ptr(), stride, drawn, threads, out.data_ptr())
        return out

    def nvfp4_codes(self, x: Tensor, layout: int, amax: Tensor) -> tuple[Tensor, Tensor]:
        """To nearest: codes and scales as `NVFP4Tensor` has them. layout 0 or 2; amax: FP32."""
        num_rows, num_columns = x.shape
        scale_rows = num_rows if layout == 0 else -(-num_rows // 16) * 16
        codes = torch.empty(num_rows, -(-num_columns // 2), dtype=torch.uint8)
        scales = torch.empty(scale_rows, -(-num_columns // 16), dtype=torch.uint8)
        threads, out = torch.get_num_threads(), (codes.data_ptr(), scales.data_ptr())
        self._nvfp4_codes(_matrix(x), layout, amax.data_ptr(), threads, *out)
        return codes, scales

    def mxfp8_operand(self, x: Tensor, layout: int, amax: Tensor) -> Tensor:
        """BF16 [R, C] relative to the scale of `amax`. layout: blocks are 0: 1 x 32; 1: 32 x 1.
        amax: FP32, of the whole tensor."""
        out = torch.empty(x.shape, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        self._mxfp8(_matrix(x), layout, amax.data_ptr(), threads, out.data_ptr())
        return out


def _matrix(x: Tensor) -> _Matrix:
    assert x.ndim == 2 and x.is_contiguous() and x.device.type == "cpu", (x.shape, x.device)
    assert x.dtype in (torch.bfloat16, torch.float32), x.dtype
    return _Matrix(x.data_ptr(), *x.shape, x.dtype == torch.bfloat16)


@functools.cache
def kernels() -> Kernels | None:
    """None, with a warning that says why, where quantize.c cannot be compiled."""
    library = compiled_c.library((_SOURCE,), _FLAGS)
    return None if library is None else Kernels(library)


def operand_matrix(x: Tensor) -> Tensor:
    """x as `Kernels` take it: [R, C], leading dimensions flattened, FP16 widened."""
    matrix = x.reshape(-1, x.shape[-1]).contiguous()
    return matrix.float() if matrix.dtype == torch.float16 else matrix
