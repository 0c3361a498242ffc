"""C passes (passes/*.c) called on tensors: the library, and the tensors' way in.

Owns: which tensors the passes take, how a tensor becomes an argument, the call. Does not own: the
passes of training (`compiled_passes`) and decoding (`compiled_decoding`), nor how C is compiled
(platform/compiled_c.py).

Shape suffixes: B batch, S tokens, C channels.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from nemotron_train.platform import compiled_c

_FOLDER = Path(__file__).with_name("passes")
_TRAINING = ("convolution", "norms", "scan", "activation", "loss")
_DECODING = ("mamba_decoding", "moe_decoding", "attention_decoding", "rows_decoding")
_SOURCES = tuple(_FOLDER / f"{name}.c" for name in _TRAINING + _DECODING)
_FLAGS = ("-O3", "-ffp-contract=fast", "-mprefer-vector-width=512")
_PORTABLE_FLAGS = ("-O3", "-ffp-contract=fast")
MAX_WIDTH = 8192  # MAX_WIDTH in rows.h
_TYPES = (torch.bfloat16, torch.float32)


class Rows(ctypes.Structure):
    """struct rows in rows.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("is_bfloat16", ctypes.c_int32),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    is_x86 = "avx" in torch.backends.cpu.get_cpu_capability().lower()
    return compiled_c.library(_SOURCES, _FLAGS if is_x86 else _PORTABLE_FLAGS)


def take(*tensors: Tensor) -> bool:
    """Whether the passes compute on these: on a CPU, BF16 or FP32, and C compiles here."""
    fit = all(t.device.type == "cpu" and t.dtype in _TYPES for t in tensors)
    return fit and _library() is not None


def call(name: str, *arguments: object) -> None:
    """One pass; structures go by reference."""
    library = _library()
    assert library is not None
    getattr(library, name)(
        *(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments)
    )


def channels_last(t: Tensor) -> Tensor:
    """`t` with its last dimension contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_rows(t_BSC: Tensor) -> Rows:
    """Channels contiguous, any other strides."""
    assert t_BSC.stride(-1) == 1 or t_BSC.shape[-1] == 1, t_BSC.stride()
    return Rows(t_BSC.data_ptr(), t_BSC.stride(0), t_BSC.stride(1), t_BSC.dtype == torch.bfloat16)


def as_pointer(t: Tensor | None) -> ctypes.c_void_p:
    """Of a contiguous tensor, or null."""
    assert t is None or t.is_contiguous()
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def as_numbers(*numbers: Tensor) -> list[ctypes.c_void_p]:
    """Of contiguous FP32 tensors."""
    assert all(t.dtype == torch.float32 for t in numbers)
    return [as_pointer(t) for t in numbers]
