"""Triton kernels for GPUs. Only `available` loads Triton without being asked to compute. No kernel
here has run on a GPU: Triton's interpreter runs them in tests/kernels/triton."""
