"""BF16 matrix products through FP32 on processors without BF16 instructions.

On a processor with neither AVX-512 BF16 nor AMX, oneDNN emulates BF16 at a fifth of the FP32
rate. There, this module widens the operands to FP32, runs the FP32 kernel and rounds the result
once. BF16 units do the same, up to the order of the sums.

Owns: which processors need this, and the replacement of torch's CPU kernels. Does not own: products
on a GPU, emulated block-scaled formats (precision/gemm.py).
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The operators behind every matrix product, and whether they overwrite their first argument.
_OPERATORS = {"mm": False, "bmm": False, "addmm": False, "baddbmm": False}
_OPERATORS |= {"addmm_": True, "baddbmm_": True}


@functools.cache
def needed() -> bool:
    """Whether this is an x86-64 processor without BF16 instructions. False for other processors:
    torch cannot query their features."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product_dtype(t: Tensor) -> torch.dtype:
    """The fastest dtype for a chain of products on `t`: FP32 if every BF16 product would widen its
    operands and round its result (see `needed`), else the dtype of `t`."""
    widens = t.dtype == torch.bfloat16 and t.device.type == "cpu" and needed()
    return torch.float32 if widens else t.dtype


def _are_bfloat16(arguments: tuple[Any, ...]) -> bool:
    """Whether all tensors are BF16. Mixed dtypes go to torch's own kernel, which rejects them."""
    return all(a.dtype == torch.bfloat16 for a in arguments if isinstance(a, Tensor))


def _widened(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.float() if isinstance(a, Tensor) else a for a in arguments]


def _through_float32(name: str, in_place: bool) -> Callable[..., Tensor]:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
    functional = torch.library.get_kernel(f"aten::{name.removesuffix('_')}", "CPU")

    def product(keys: Any, *arguments: Any, **scales: Any) -> Tensor:
        if not _are_bfloat16(arguments):
            return kernel.call_boxed(keys, *arguments, **scales)
        wide = functional.call_boxed(keys, *_widened(arguments), **scales)
        return arguments[0].copy_(wide) if in_place else wide.to(torch.bfloat16)

    return product


def _with_out(name: str) -> Callable[..., Tensor]:
    """The replacement of the `out=` variant of an operator."""
    kernel = torch.library.get_kernel(f"aten::{name}.out", "CPU")

    def product(keys: Any, *arguments: Any, out: Tensor, **scales: Any) -> Tensor:
        if not _are_bfloat16((*arguments, out)):
            return kernel.call_boxed(keys, *arguments, **scales, out=out)
        wide = torch.empty_like(out, dtype=torch.float32)
        kernel.call_boxed(keys, *_widened(arguments), **scales, out=wide)
        return out.copy_(wide)

    return product


@functools.cache
def install() -> torch.library.Library:
    """Replace the CPU kernels in this process. Other dtypes call torch's kernel, at a cost of a few
    microseconds. Returns the torch library that holds the replacements."""
    kernels = {name: _through_float32(name, in_place) for name, in_place in _OPERATORS.items()}
    kernels |= {f"{name}.out": _with_out(name) for name in ("mm", "bmm", "addmm", "baddbmm")}
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return library
