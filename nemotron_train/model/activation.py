"""Squared ReLU (arXiv 2109.08668), Nemotron's activation in every MLP, plain and multiplied by the
routing weight of an expert.

Owns: both variants, as torch operators and as C kernels on a CPU. Does not own: the products before
and after.

Shape legend: T rows, F hidden width.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import limit, supports

_CHUNK_ELEMENTS = 1 << 18


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (arXiv 2109.08668), Nemotron's activation in every MLP."""
    if x.shape[-1] <= limit("max_width") and supports(x):
        if not torch.is_grad_enabled():
            rows_TF = x.reshape(-1, x.shape[-1]).contiguous()
            return training_kernels.squared_relu(rows_TF, None).view(x.shape)
        return _CompiledSquaredRelu.apply(x)  # pyright: ignore[reportReturnType]
    return torch.square(torch.relu(x))


class _CompiledSquaredRelu(torch.autograd.Function):
    """One C kernel forward and one backward (csrc/activation.c); saves x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        rows_TF = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows_TF)
        return training_kernels.squared_relu(rows_TF, None).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (rows_TF,) = ctx.saved_tensors
        # A copy: the kernel overwrites it, and autograd may still need the incoming gradient.
        grad_TF = gradients[0].reshape(rows_TF.shape).clone(memory_format=torch.contiguous_format)
        training_kernels.squared_relu_backward_(grad_TF, rows_TF, None, False)
        return grad_TF.view(gradients[0].shape)


def _compiled(hidden_TF: Tensor, probabilities_T: Tensor | None) -> bool:
    """Whether the C kernels handle these: BF16 or FP32 on a CPU, FP32 routing weights."""
    weights = () if probabilities_T is None else (probabilities_T,)
    is_wide = all(weight.dtype == torch.float32 for weight in weights)
    fits = hidden_TF.shape[1] <= limit("max_width") and is_wide
    return fits and supports(hidden_TF, *weights)


def activate(hidden_TF: Tensor, probabilities_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """h → r = relu(h), in place, and the activation p r² (r² without probabilities).

    The C kernel does not change h and returns h instead of r. `activate_backward` accepts either.
    """
    if _compiled(hidden_TF, probabilities_T):
        return hidden_TF, training_kernels.squared_relu(hidden_TF, probabilities_T)
    relu_TF = hidden_TF.clamp_min_(0)
    activation_TF = torch.empty_like(relu_TF)
    chunks, scratch_TF = _row_chunks(relu_TF)
    for rows in chunks:
        wide_TF = _widened(relu_TF[rows], scratch_TF)
        part_TF = torch.mul(wide_TF, wide_TF, out=_destination(activation_TF[rows], scratch_TF))
        if probabilities_T is not None:
            part_TF.mul_(probabilities_T[rows].unsqueeze(1))
        if part_TF.dtype != activation_TF.dtype:
            activation_TF[rows] = part_TF
    return relu_TF, activation_TF


def activate_backward(
    grad_activation_TF: Tensor,
    relu_TF: Tensor,
    probabilities_T: Tensor | None,
    with_probabilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """∂a → ∂h, written into ∂a's memory, and ∂p or None.

    With a = p r² and r = relu(h): ∂h = 2 p r ∂a and ∂p = Σ_F r² ∂a, which share r ∂a. No test for
    h > 0 is needed, since r is zero elsewhere. relu_TF: either result of `activate`.
    """
    if _compiled(relu_TF, probabilities_T):
        return grad_activation_TF, training_kernels.squared_relu_backward_(
            grad_activation_TF, relu_TF, probabilities_T, with_probabilities
        )
    grad_probabilities_T = None
    if probabilities_T is not None and with_probabilities:
        grad_probabilities_T = torch.empty_like(probabilities_T)
    chunks, scratch_TF = _row_chunks(relu_TF)
    part_scratch_TF = torch.empty_like(scratch_TF)
    for rows in chunks:
        wide_TF = _widened(relu_TF[rows], scratch_TF)
        part_TF = _destination(grad_activation_TF[rows], part_scratch_TF)
        torch.mul(wide_TF, grad_activation_TF[rows], out=part_TF)  # r ∂a
        if probabilities_T is None:
            part_TF.mul_(2)
        else:
            if grad_probabilities_T is not None:
                # `scratch_TF` may hold the FP32 copy of r, which is not needed after this.
                product_TF = torch.mul(wide_TF, part_TF, out=scratch_TF[: len(part_TF)])
                grad_probabilities_T[rows] = product_TF.sum(-1)
            part_TF.mul_((2 * probabilities_T[rows]).unsqueeze(1))
        if part_TF.dtype != grad_activation_TF.dtype:
            grad_activation_TF[rows] = part_TF
    return grad_activation_TF, grad_probabilities_T


def _row_chunks(rows_TF: Tensor) -> tuple[list[slice], Tensor]:
    """Row ranges for elementwise work, and a buffer for one range in FP32 or wider. The ranges are
    short on a CPU, so that the wide temporaries stay in the cache; one range on a GPU."""
    num_rows, width = rows_TF.shape
    step = num_rows if rows_TF.is_cuda else max(1, _CHUNK_ELEMENTS // max(width, 1))
    step = max(min(step, num_rows), 1)
    dtype = torch.promote_types(rows_TF.dtype, torch.float32)
    chunks = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    return chunks, rows_TF.new_empty((step, width), dtype=dtype)


def _widened(rows_TF: Tensor, scratch_TF: Tensor) -> Tensor:
    """The rows in the scratch buffer's dtype: the rows themselves, or a copy in the buffer."""
    if rows_TF.dtype == scratch_TF.dtype:
        return rows_TF
    return scratch_TF[: len(rows_TF)].copy_(rows_TF)


def _destination(rows_TF: Tensor, scratch_TF: Tensor) -> Tensor:
    """The memory in which to compute `rows_TF`: itself, or `scratch_TF` if that is wider."""
    return rows_TF if rows_TF.dtype == scratch_TF.dtype else scratch_TF[: len(rows_TF)]
