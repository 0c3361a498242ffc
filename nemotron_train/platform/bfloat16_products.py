"""BF16 matrix products through FP32 on processors without BF16 instructions.

oneDNN emulates BF16 where the processor has neither AVX-512 BF16 nor AMX, at a fifth of FP32's
rate. There a product is computed by FP32's own kernel on widened operands and rounded once: what
BF16 units do, up to the order of the sums. Owns: which processors need it, and the replacement
of torch's CPU kernels. Does not own: products on a GPU, emulated formats (precision/gemm.py).
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The operators that every product of two matrices ends in, and whether they overwrite the first.
_OPERATORS = {"mm": False, "bmm": False, "addmm": False, "baddbmm": False}
_OPERATORS |= {"addmm_": True, "baddbmm_": True}


@functools.cache
def needed() -> bool:
    """x86-64 without BF16 instructions. Other processors are left alone: torch cannot tell."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product_dtype(t: Tensor) -> torch.dtype:
    """What a chain of products on `t` is best computed in: FP32 where each product of BF16 would
    widen its operands and round its result, t's own type everywhere else."""
    widens = t.dtype == torch.bfloat16 and t.device.type == "cpu" and needed()
    return torch.float32 if widens else t.dtype


def _are_bfloat16(arguments: tuple[Any, ...]) -> bool:
    """Unlike types go to torch's own kernel, which refuses them."""
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
    """The form that writes into `out`."""
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
    """Replace the CPU kernels for this process; FP32 passes through (a few microseconds more)."""
    kernels = {name: _through_float32(name, in_place) for name, in_place in _OPERATORS.items()}
    kernels |= {f"{name}.out": _with_out(name) for name in ("mm", "bmm", "addmm", "baddbmm")}
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return library
