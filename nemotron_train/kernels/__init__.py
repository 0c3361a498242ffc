"""C kernels for CPUs, Triton kernels for GPUs, and the functions that call them. README.md lists all forms."""
