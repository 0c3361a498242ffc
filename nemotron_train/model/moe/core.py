"""Routed experts as grouped products, with hand-derived gradients.

Owns: the ungated squared-ReLU experts over rows sorted by expert (`grouped_mlp`), and the same with
the permutation, for a rank that holds every expert (`routed_mlp`). Does not own: the permutation
(`permutation`), the activation (`model.activation`), the router, the latent projections, the
exchange between expert-parallel ranks, quantized experts.

Why not one product per expert: for the small experts of a Nemotron 3 proxy, starting a CPU product
costs more than the product itself (benchmarks/moe.py). One batched product over experts padded to
the fullest one is faster if the padding is small. The permutation adds the padding rows while it
gathers, so nothing is copied twice.

Shape legend: S tokens, K choices a token, E experts, T rows sorted by expert (padding included),
D expert input and output width, F expert hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_train.model.activation import activate, activate_backward
from nemotron_train.model.moe.permutation import (
    Blocks,
    affordable_padding,
    block_rows,
    permute,
    permute_probabilities,
    plan_permutation,
    unpermute,
)
from nemotron_train.platform.bfloat16_products import product_dtype


def _has_grouped_product(x_TD: Tensor) -> bool:
    """Whether torch's grouped product takes these rows: BF16 on a GPU."""
    return x_TD.is_cuda and x_TD.dtype == torch.bfloat16


def _product(x_TA: Tensor, weight_EAB: Tensor, blocks: Blocks) -> Tensor:
    """x W for each expert's block of rows: [T, A], [E, A, B] → [T, B].

    torch's grouped product where the host does not know the blocks, one batched product if all
    have equal length, else one product per expert.
    """
    num_experts, num_inputs, num_outputs = weight_EAB.shape
    lengths = blocks.lengths
    if lengths is None:
        return F.grouped_mm(x_TA, weight_EAB, offs=blocks.ends_E)
    if min(lengths) == max(lengths):
        x_EtA = x_TA.view(num_experts, lengths[0], num_inputs)
        return torch.bmm(x_EtA, weight_EAB).view(x_TA.shape[0], num_outputs)
    y_TB = x_TA.new_empty(x_TA.shape[0], num_outputs)
    for x, weight, y in zip(x_TA.split(lengths), weight_EAB, y_TB.split(lengths), strict=True):
        torch.mm(x, weight, out=y)
    return y_TB


def _outer_product(x_TA: Tensor, y_TB: Tensor, blocks: Blocks) -> Tensor:
    """xᵀ y for each expert's block of rows: [T, A], [T, B] → [E, A, B]; zero for an empty block.
    The three forms of `_product`."""
    num_experts, lengths = blocks.num_experts, blocks.lengths
    num_left, num_right = x_TA.shape[1], y_TB.shape[1]
    if lengths is None:
        return F.grouped_mm(x_TA.t(), y_TB, offs=blocks.ends_E)
    if min(lengths) == max(lengths):
        x_EAt = x_TA.view(num_experts, lengths[0], num_left).transpose(1, 2)
        return torch.bmm(x_EAt, y_TB.view(num_experts, lengths[0], num_right))
    out_EAB = x_TA.new_empty(num_experts, num_left, num_right)
    for x, y, out in zip(x_TA.split(lengths), y_TB.split(lengths), out_EAB, strict=True):
        torch.mm(x.t(), y, out=out)
    return out_EAB


class _GroupedMlp(torch.autograd.Function):
    """h = x W1ᵀ, a = p relu(h)², y = a W2ᵀ for each expert's block of rows.

    The routing weight p multiplies the activation, before the second product, as in Megatron-Core
    (transformer/moe/experts.py, TEGroupedMLP.forward). Elementwise work is done in FP32: for BF16
    that costs no more than BF16 arithmetic and rounds once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight1_EFD: Tensor,
        weight2_EDF: Tensor,
        probabilities_T: Tensor | None,
        blocks: Blocks,
    ) -> Tensor:
        hidden_TF = _product(x_TD, weight1_EFD.transpose(1, 2), blocks)
        # relu_TF is relu(h), in h's memory, or h itself (C kernel); `activate_backward` takes both.
        relu_TF, activation_TF = activate(hidden_TF, probabilities_T)
        ctx.save_for_backward(
            x_TD, weight1_EFD, weight2_EDF, probabilities_T, relu_TF, activation_TF
        )
        ctx.blocks = blocks
        return _product(activation_TF, weight2_EDF.transpose(1, 2), blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """∂W2 = ∂yᵀ a, ∂a = ∂y W2, ∂h = 2 p relu(h) ∂a, ∂p = Σ_F relu(h)² ∂a, ∂W1 = ∂hᵀ x,
        ∂x = ∂h W1, for each expert's block of rows. Padding rows have x = 0 and p = 0, so they add
        nothing to the weight gradients."""
        x_TD, weight1_EFD, weight2_EDF, probabilities_T, relu_TF, activation_TF = ctx.saved_tensors
        blocks = ctx.blocks
        grad_y_TD = grads[0].contiguous()
        grad_weight2_EDF = None
        if ctx.needs_input_grad[2]:
            grad_weight2_EDF = _outer_product(grad_y_TD, activation_TF, blocks)
        grad_activation_TF = _product(grad_y_TD, weight2_EDF, blocks)
        # grad_hidden_TF overwrites grad_activation_TF.
        grad_hidden_TF, grad_probabilities_T = activate_backward(
            grad_activation_TF, relu_TF, probabilities_T, ctx.needs_input_grad[3]
        )
        grad_weight1_EFD = None
        if ctx.needs_input_grad[1]:
            grad_weight1_EFD = _outer_product(grad_hidden_TF, x_TD, blocks)
        grad_x_TD = None
        if ctx.needs_input_grad[0]:
            grad_x_TD = _product(grad_hidden_TF, weight1_EFD, blocks)
        return grad_x_TD, grad_weight1_EFD, grad_weight2_EDF, grad_probabilities_T, None


def _as_multiplied(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands in the dtype of the products: FP32 on a CPU without BF16 instructions. Converted
    once here, not at each product."""
    return tuple(t.to(product_dtype(t)) for t in tensors)


def grouped_mlp(
    x_TD: Tensor,
    tokens_per_expert_E: list[int] | Tensor,
    weight1_EFD: Tensor,
    weight2_EDF: Tensor,
    probabilities_T: Tensor | None = None,
) -> Tensor:
    """y = (p relu(x W1ᵀ)²) W2ᵀ with W1, W2 of each row's expert (Nemotron 3's ungated experts).

    `x_TD` [T, D] is sorted by expert. `tokens_per_expert_E` counts the rows of each expert (a list,
    or an int64 tensor; SYNC if that and x are on a GPU and x is not BF16) and may contain zeros.
    `probabilities_T` [T] is the routing weight, FP32 or x's dtype; None means 1. Products take x's
    dtype and accumulate in FP32. → y [T, D] in x's dtype.
    """
    dtype = x_TD.dtype
    x_TD, weight1_EFD, weight2_EDF = _as_multiplied(x_TD, weight1_EFD, weight2_EDF)
    blocks = Blocks.of(tokens_per_expert_E, _has_grouped_product(x_TD))
    num_experts, rows_per_expert = blocks.num_experts, blocks.lengths
    assert num_experts == weight1_EFD.shape[0], (num_experts, weight1_EFD.shape)
    num_padding = 0
    if rows_per_expert is not None:
        assert sum(rows_per_expert) == x_TD.shape[0], (sum(rows_per_expert), x_TD.shape)
        num_padding = block_rows(rows_per_expert) * num_experts - x_TD.shape[0]
    if 0 < num_padding <= affordable_padding(weight1_EFD) * num_experts:
        # Rows are sorted already: this permutation only inserts the padding rows.
        counts_E = torch.tensor(blocks.lengths)
        experts_T1 = torch.arange(num_experts).repeat_interleave(counts_E).unsqueeze(1)
        permutation = plan_permutation(experts_T1, num_experts, max_padding=num_padding)
        rows_x_TD = permute(x_TD, permutation)
        if probabilities_T is not None:
            probabilities_T = permute_probabilities(probabilities_T.unsqueeze(1), permutation)
        rows_y_TD = _GroupedMlp.apply(
            rows_x_TD, weight1_EFD, weight2_EDF, probabilities_T, permutation.blocks
        )
        return unpermute(rows_y_TD, permutation).to(dtype)  # pyright: ignore[reportArgumentType]
    y_TD: Tensor = _GroupedMlp.apply(  # pyright: ignore
        x_TD.contiguous(), weight1_EFD, weight2_EDF, probabilities_T, blocks
    )
    return y_TD.to(dtype)


def routed_mlp(
    x_SD: Tensor,
    experts_SK: Tensor,
    probabilities_SK: Tensor,
    weight1_EFD: Tensor,
    weight2_EDF: Tensor,
) -> tuple[Tensor, Tensor]:
    """y_s = Σ_k p_sk expert_{e_sk}(x_s), with every expert on this rank.

    `experts_SK` are the router's choices (any integer dtype), `probabilities_SK` their weights.
    → y [S, D] in x's dtype, and the number of tokens of each expert, int64 [E]. SYNC on a GPU
    unless x is BF16: the host reads the counts.
    """
    num_experts, dtype = weight1_EFD.shape[0], x_SD.dtype
    x_SD, weight1_EFD, weight2_EDF = _as_multiplied(x_SD, weight1_EFD, weight2_EDF)
    permutation = plan_permutation(
        experts_SK,
        num_experts,
        affordable_padding(weight1_EFD),
        is_grouped=_has_grouped_product(x_SD),
    )
    rows_y_TD = _GroupedMlp.apply(
        permute(x_SD, permutation),
        weight1_EFD,
        weight2_EDF,
        permute_probabilities(probabilities_SK, permutation),
        permutation.blocks,
    )
    y_SD = unpermute(rows_y_TD, permutation)  # pyright: ignore[reportArgumentType]
    return y_SD.to(dtype), permutation.tokens_per_expert_E
