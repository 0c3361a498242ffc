"""`core.ssd` by our Triton kernels, as an autograd function.

Owns: what is saved (the arguments only), and the order of the gradients. Does not own: the
arithmetic (kernels/triton/scan.py, scan_backward.py), the choice of the form (`core`).

Shape suffixes: as in core.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_CHANNELS = 128  # of a head: a program holds them all


def takes(x_BSHP: Tensor, B_BSGN: Tensor, C_BSGN: Tensor) -> bool:
    """Whether the kernels take these shapes and dtypes (`kernels.triton.available` answers for the
    device)."""
    has_one_dtype = x_BSHP.dtype == B_BSGN.dtype == C_BSGN.dtype
    return has_one_dtype and x_BSHP.shape[3] <= MAX_CHANNELS and x_BSHP.numel() > 0


class TritonSsd(torch.autograd.Function):
    """y, and the final state in FP32. Arguments: those of `kernels.triton.scan.scan`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """y_BSHP, and the final state BHPN."""
        from nemotron_train.kernels.triton import scan

        tensors, ctx.chunk_size = arguments[:-1], arguments[-1]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return scan.scan(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        from nemotron_train.kernels.triton import scan_backward

        x_BSHP, dt_BSH, A_H, _, _, D_H, initial_BHPN, _ = ctx.saved_tensors
        dy_BSHP, dfinal_BHPN = gradients
        if dy_BSHP is None:
            dy_BSHP = torch.zeros_like(x_BSHP)
        dx, ddt, dA, dB, dC, dD, dinitial = scan_backward.scan_backward(
            dy_BSHP,
            dfinal_BHPN,
            *ctx.saved_tensors,
            ctx.chunk_size,  # pyright: ignore
        )
        if initial_BHPN is not None:
            dinitial = dinitial.to(initial_BHPN.dtype)
        first = (dx, ddt.to(dt_BSH.dtype), dA.to(A_H.dtype), dB, dC, dD.to(D_H.dtype))
        return *first, dinitial if initial_BHPN is not None else None, None, None
