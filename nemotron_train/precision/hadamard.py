"""Random Hadamard transform of the operands of an NVFP4 weight gradient.

Owns: the matrix with its fixed signs, and its product with either dimension of a tensor. Does not
own: the quantization after it (nvfp4.py), when it is applied (precision/linear.py). Source: arXiv
2509.25149 and Transformer Engine 2.17.1's quantization_ref_nvfp4.py.
"""

import functools
from typing import Literal

import torch
from torch import Tensor

BLOCK = 16  # as in NVFP4
# The signs are drawn once and fixed: the same constant as in Transformer Engine.
HADAMARD_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard_matrix(dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[16, 16]: diag(HADAMARD_SIGNS) times Sylvester's matrix, divided by 4. It is orthogonal, and
    exact in every floating-point format."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < BLOCK:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    signs = torch.tensor(HADAMARD_SIGNS, dtype=torch.float32)
    return (signs[:, None] * matrix / 4.0).to(device=device, dtype=dtype)


@functools.cache
def _matrix_on(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`hadamard_matrix`, built once: a GPU would get it by a copy that the host waits for."""
    with torch.inference_mode(False):
        return hadamard_matrix(dtype, device)


def hadamard(x: Tensor, dim: Literal[-1, 0] = -1) -> Tensor:
    """Random Hadamard transform of every 16 consecutive elements, in x's dtype.

    dim -1: along the last dimension. dim 0: along the rows of the matrix [R, C] (leading
    dimensions flattened); this equals transforming the transpose. The length along `dim` must be
    a multiple of 16. Both operands of a weight gradient are transformed along the tokens, the
    summed dimension; their product is preserved only if both have the same padding.

    The transform is one matrix product. A GPU sums in another order, so after rounding to BF16
    about one element in 10^5 may differ by one ulp from the CPU.
    """
    length = x.shape[-1] if dim == -1 else x.numel() // x.shape[-1]
    assert length % BLOCK == 0, f"cannot transform {length} elements: no multiple of {BLOCK}"
    matrix = _matrix_on(x.dtype, x.device)
    if dim == -1:
        return (x.reshape(-1, BLOCK) @ matrix).view(x.shape)
    return (matrix.t() @ x.reshape(-1, BLOCK, x.shape[-1])).view(x.shape)
