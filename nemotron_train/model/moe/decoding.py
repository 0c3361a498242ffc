"""Routed experts for a few tokens of decoding: computes only the chosen experts.

Owns: the result of `core.routed_mlp` for so few choices that reading the weights is the whole cost
of a product. Does not own: gradients, many tokens, GPUs (all in `core`).

Shape legend: S tokens, K choices a token, E experts, T = S K rows sorted by expert, D expert input
and output width, F expert hidden width.
"""

import torch
from torch import Tensor

from nemotron_train.model.moe.permutation import permute_probabilities, plan_permutation, unpermute
from nemotron_train.platform.bfloat16_products import product_dtype

FEW_CHOICES = 64  # tokens x choices a token
# Up to this many elements of all chosen W1, copying the matrices into one tensor costs less than
# starting a product for each (about 40 microseconds for two of a small model's experts).
_COPIED = 1 << 18


def are_few(x_SD: Tensor, experts_SK: Tensor) -> bool:
    """Whether `few_experts` handles these: no gradients, on a CPU, at most FEW_CHOICES choices."""
    is_few = experts_SK.numel() <= FEW_CHOICES and not x_SD.is_cuda
    return is_few and not torch.is_grad_enabled()


def few_experts(
    x_SD: Tensor,
    experts_SK: Tensor,
    probabilities_SK: Tensor,
    weight1_EFD: Tensor,
    weight2_EDF: Tensor,
) -> Tensor:
    """y_s = Σ_k p_sk W2 relu(W1 x_s)² over the chosen experts e_sk: [S, D] in x's dtype.

    The weights are read in place, or copied if they are small (`_COPIED`).
    """
    if experts_SK.numel() * weight1_EFD[0].numel() <= _COPIED:
        return _side_by_side(x_SD, experts_SK, probabilities_SK, weight1_EFD, weight2_EDF)
    permutation = plan_permutation(experts_SK, weight1_EFD.shape[0])
    x_TD = x_SD.index_select(0, permutation.token_of_row_T).to(product_dtype(x_SD))
    chosen = [(e, count) for e, count in enumerate(permutation.rows_per_expert) if count]
    counts = [count for _, count in chosen]
    hidden_TF = x_TD.new_empty(x_TD.shape[0], weight1_EFD.shape[1])
    _products(chosen, x_TD.split(counts), weight1_EFD, hidden_TF.split(counts))
    p_T = permute_probabilities(probabilities_SK, permutation)
    active_TF = hidden_TF.float().clamp_(min=0).square_().mul_(p_T.unsqueeze(1)).to(x_TD.dtype)
    y_TD = torch.empty_like(x_TD)
    _products(chosen, active_TF.split(counts), weight2_EDF, y_TD.split(counts))
    return unpermute(y_TD, permutation).to(x_SD.dtype)


def _side_by_side(
    x_SD: Tensor,
    experts_SK: Tensor,
    probabilities_SK: Tensor,
    weight1_EFD: Tensor,
    weight2_EDF: Tensor,
) -> Tensor:
    """`few_experts` as two batched products over copies of each choice's matrices."""
    (num_tokens, num_choices), dtype = experts_SK.shape, product_dtype(x_SD)
    experts_T = experts_SK.flatten()
    weight1_TFD = weight1_EFD.index_select(0, experts_T).to(dtype)
    weight2_TDF = weight2_EDF.index_select(0, experts_T).to(dtype)
    x_TD1 = x_SD.to(dtype).repeat_interleave(num_choices, dim=0).unsqueeze(-1)
    hidden_TF1 = torch.bmm(weight1_TFD, x_TD1)
    p_T11 = probabilities_SK.reshape(-1, 1, 1)
    active_TF1 = hidden_TF1.float().clamp_(min=0).square_().mul_(p_T11).to(dtype)
    y_SKD = torch.bmm(weight2_TDF, active_TF1).view(num_tokens, num_choices, -1)
    return y_SKD.float().sum(1).to(x_SD.dtype)


def _products(
    chosen: list[tuple[int, int]],
    inputs: tuple[Tensor, ...],
    weight_EBA: Tensor,
    outputs: tuple[Tensor, ...],
) -> None:
    """outputs_e = inputs_e W_eᵀ for each chosen (expert, number of rows)."""
    for (expert, _), x, y in zip(chosen, inputs, outputs, strict=True):
        torch.mm(x, weight_EBA[expert].to(x.dtype).t(), out=y)
