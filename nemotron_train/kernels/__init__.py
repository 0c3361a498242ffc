"""C kernels for CPUs, Triton kernels for GPUs, their typed callers. README.md lists all forms."""
