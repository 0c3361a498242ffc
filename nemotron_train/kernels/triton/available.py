"""Whether the Triton kernels of this folder can compute on given tensors.

Owns: the check of Triton, its compiler and the driver, once a process, and the warning if they
cannot be used. Does not own: which calls prefer Triton (the layers and quantizers in `model` and
`precision` choose).

Triton compiles a launcher in C at first use. It therefore needs a C compiler and Python's headers
besides the driver. A package that can be imported proves none of these, so the check computes a few
numbers. With TRITON_INTERPRET=1 in the environment the interpreter computes on the host, slowly:
for tests.
"""

import functools
import warnings

import torch
from torch import Tensor

# Channels of a group of a norm: one program of `gated_norm` holds a group in registers.
MAX_NORM_WIDTH = 8192

_PROBE_ELEMENTS = 128


def can_use(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors: BF16 or FP32 on CUDA, and Triton works here.

    The first call with such tensors compiles and runs a kernel. SYNC: once a process. One warning
    gives the reason if that fails.
    """
    types = (torch.bfloat16, torch.float32)
    return all(t.is_cuda and t.dtype in types for t in tensors) and _works(tensors[0].device)


@functools.cache
def _works(device: torch.device) -> bool:
    reason = failure(device)
    if reason:
        warnings.warn(
            f"Triton kernels cannot be used on {device} ({reason}); torch's operators compute "
            "instead, the same but slower: install triton, a C compiler (gcc) and Python's headers",
            stacklevel=3,
        )
    return not reason


def failure(device: torch.device) -> str:
    """Why Triton does not compute on this device: the first line of its error, or "" if it does.
    SYNC: reads the result."""
    try:
        from nemotron_train.kernels.triton import elements

        numbers = torch.arange(_PROBE_ELEMENTS, dtype=torch.float32, device=device)
        doubled = elements.twice(numbers)
        is_right = torch.equal(doubled, numbers + numbers)
    # Whatever a compiler, a linker or a driver raises: torch's operators can still compute.
    except Exception as error:
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return "" if is_right else "a test kernel computed wrong numbers"
