"""The C kernels as Python functions: the library, argument types, marshalling of tensors.

Owns: the library of layer kernels built from csrc/, the declaration of a C function (`Kernel`), the
size limits that the C code exports, and the conversion of tensors to arguments. Does not own: what
the kernels compute (`training`, `decoding` and `quantize` wrap them, the layers define them), how C
is compiled (`compilation`).

Shape suffixes: B batch, S tokens, C channels.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron_train.kernels import compilation

CSRC = Path(__file__).with_name("csrc")
_TRAINING = ("convolution", "norms", "scan", "activation", "loss")
_DECODING = ("mamba_decoding", "moe_decoding", "attention_decoding", "rows_decoding")
_X86_FLAGS = ("-O3", "-ffp-contract=fast", "-mprefer-vector-width=512")
_PORTABLE_FLAGS = ("-O3", "-ffp-contract=fast")
_TYPES = (torch.bfloat16, torch.float32)


@functools.cache
def layer_library() -> ctypes.CDLL | None:
    """The kernels of training and decoding; None, with a warning, if C cannot be compiled."""
    is_x86 = "avx" in torch.backends.cpu.get_cpu_capability().lower()
    sources = tuple(CSRC / f"{name}.c" for name in _TRAINING + _DECODING)
    return compilation.library(sources, _X86_FLAGS if is_x86 else _PORTABLE_FLAGS)


def supports(*tensors: Tensor) -> bool:
    """Whether the layer kernels accept these tensors: BF16 or FP32 on a CPU, and the library could
    be compiled."""
    fit = all(t.device.type == "cpu" and t.dtype in _TYPES for t in tensors)
    return fit and layer_library() is not None


def limit(name: str) -> int:
    """A size limit that the C code exports, such as `max_width`; 0 without the library, so that no
    tensor fits."""
    library = layer_library()
    return 0 if library is None else _read_limit(library, name)


@functools.cache
def _read_limit(library: ctypes.CDLL, name: str) -> int:
    return ctypes.c_int64.in_dll(library, name).value


class Kernel:
    """One C function without a return value; ctypes checks the argument types at each call.

    Structures are passed by reference if the declared type is a pointer to them. Every kernel takes
    the number of threads as an argument.
    """

    def __init__(
        self,
        name: str,
        *argtypes: Any,
        library: Callable[[], ctypes.CDLL | None] = layer_library,
    ) -> None:
        self.name = name
        self._argtypes, self._library = argtypes, library

    @functools.cached_property
    def _function(self) -> Any:
        library = self._library()
        assert library is not None, "callers ask `supports` first"
        function = getattr(library, self.name)
        function.argtypes = self._argtypes
        function.restype = None
        return function

    def __call__(self, *arguments: object) -> None:
        self._function(*arguments)


# Argument types, named as in C.
POINTER = ctypes.c_void_p
INT64 = ctypes.c_int64
INT32 = ctypes.c_int32


class Rows(ctypes.Structure):
    """struct rows in rows.h."""

    _fields_ = (
        ("data", POINTER),
        ("batch_stride", INT64),
        ("token_stride", INT64),
        ("is_bfloat16", INT32),
    )


ROWS = ctypes.POINTER(Rows)


def channels_last(t: Tensor) -> Tensor:
    """`t`, or a copy, with a contiguous last dimension."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def as_rows(t_BSC: Tensor) -> Rows:
    """The C structure for a [B, S, C] tensor with contiguous channels and any other strides."""
    assert t_BSC.stride(-1) == 1 or t_BSC.shape[-1] == 1, t_BSC.stride()
    return Rows(t_BSC.data_ptr(), t_BSC.stride(0), t_BSC.stride(1), t_BSC.dtype == torch.bfloat16)


def as_pointer(t: Tensor | None) -> int | None:
    """Address of a contiguous tensor's data; None (a null pointer) for None."""
    assert t is None or t.is_contiguous()
    return None if t is None else t.data_ptr()


def as_float_pointers(*tensors: Tensor) -> list[int | None]:
    """Addresses of contiguous FP32 tensors."""
    assert all(t.dtype == torch.float32 for t in tensors)
    return [as_pointer(t) for t in tensors]
