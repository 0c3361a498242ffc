"""The C library's heap on a CPU: keep freed memory instead of returning it to the kernel.

By default glibc returns large freed blocks to the kernel and requests new ones later. Every page of
a new block causes a page fault on first access. A training step frees and allocates the same
tensors each time: in a virtual machine one 5 MiB temporary took 30 ms instead of 0.2 ms. Does not
own: the GPU allocator, which has its own cache.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_THRESHOLD_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Raise glibc's trim and mmap thresholds for this process. Returns False, without a change, if
    the C library is not glibc (musl, macOS). Fragmentation may increase peak memory."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        and mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)
    )
