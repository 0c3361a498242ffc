"""Routed experts as grouped products, and the permutation that brings tokens to them.

Owns: the order of tokens by expert on one rank (`plan_permutation`, `permute`, `unpermute`), the
ungated squared-ReLU experts with hand-written gradients (`grouped_mlp`) and both together for a
rank that holds every expert (`routed_mlp`). Does not own: the router, the latent projections, the
exchange between expert-parallel ranks, quantized experts.

Why not a product per expert: with the small experts of a Nemotron 3 proxy, starting a CPU product
costs more than the product itself (benchmarks/moe.py). One batched product over experts padded
to the fullest is faster as long as the padding is small, so the permutation leaves room for the
padding while it gathers, and nothing is copied twice.

Shape legend: S tokens, K choices a token, E experts, T rows sorted by expert (padding included),
D expert input and output width, F expert hidden width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_train.model import compiled_calls, compiled_passes
from nemotron_train.platform.bfloat16_products import product_dtype

# Work that padding may waste, in FLOPs an expert and product: about the cost of starting one more
# product on two Zen 4 cores (benchmarks/moe.py; oneDNN's BF16 products start slower than FP32's).
_PADDING_FLOPS = {torch.float32: 2_000_000, torch.bfloat16: 12_000_000}

_BLOCK_MULTIPLE = 32
_CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Permutation:
    """Where each (token, choice) lies when tokens are sorted by expert; stable in token order.

    `token_of_row_T`: token in each row, `num_tokens` (one past the last) in padding rows.
    `row_of_choice_SK`: int32 row of each token's choice.
    `rows_per_expert`: rows in each expert's block; all equal when the blocks are padded.
    `tokens_per_expert_E`: tokens in each expert's block, int64, on the tokens' device.
    """

    token_of_row_T: Tensor
    row_of_choice_SK: Tensor
    rows_per_expert: list[int]
    tokens_per_expert_E: Tensor

    @property
    def padded(self) -> bool:
        return self.token_of_row_T.numel() > self.row_of_choice_SK.numel()


def affordable_padding(weight_EFD: Tensor) -> int:
    """Padding rows an expert below which one batched product beats a product per expert; 0 where
    that never holds (a GPU's grouped product needs no padding)."""
    if weight_EFD.is_cuda:
        return 0
    _, num_hidden, num_inputs = weight_EFD.shape
    return _PADDING_FLOPS.get(weight_EFD.dtype, 0) // (2 * num_hidden * num_inputs)


def _block_rows(rows_per_expert: list[int]) -> int:
    """Rows of a padded block: the fullest expert's, rounded up so that few lengths occur. oneDNN
    compiles a product for every new shape and keeps it: without rounding a BF16 step spends more
    on that, and on the heap it scatters, than on the experts (docs/log.md)."""
    return -(-max(rows_per_expert) // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE


@torch.no_grad()
def plan_permutation(experts_SK: Tensor, num_experts: int, max_padding: int = 0) -> Permutation:
    """Sort the choices by expert, ties in token order, so the result is deterministic.

    Blocks are padded to the fullest one's length if that adds at most `max_padding` rows an
    expert on average; otherwise they are packed. SYNC: the host reads the counts.
    """
    num_tokens, num_choices = experts_SK.shape
    device = experts_SK.device
    # A radix sort of small integers: three times as fast as one of int64.
    key_dtype = torch.uint8 if num_experts <= 256 else torch.int32
    sorted_T, order_T = torch.sort(experts_SK.reshape(-1).to(key_dtype), stable=True)
    tokens_per_expert_E = torch.bincount(sorted_T, minlength=num_experts)
    rows_per_expert: list[int] = tokens_per_expert_E.tolist()
    num_rows, fullest = sum(rows_per_expert), _block_rows(rows_per_expert)

    row_T = torch.arange(num_rows, device=device, dtype=torch.int32)
    token_T = order_T // num_choices
    if fullest * num_experts - num_rows <= max_padding * num_experts:
        block_E = torch.arange(num_experts, device=device) * fullest
        start_E = tokens_per_expert_E.cumsum(0) - tokens_per_expert_E
        row_T += (block_E - start_E).to(torch.int32).index_select(0, sorted_T.to(torch.int32))
        rows_per_expert = [fullest] * num_experts
        token_of_row_T = token_T.new_full((fullest * num_experts,), num_tokens)
        token_of_row_T[row_T] = token_T
    else:
        token_of_row_T = token_T
    row_of_choice_SK = torch.empty_like(row_T).index_copy_(0, order_T, row_T)
    return Permutation(
        token_of_row_T=token_of_row_T,
        row_of_choice_SK=row_of_choice_SK.view(num_tokens, num_choices),
        rows_per_expert=rows_per_expert,
        tokens_per_expert_E=tokens_per_expert_E,
    )


def _gather_rows(x_SD: Tensor, permutation: Permutation) -> Tensor:
    """Row t of the result is x[token_of_row[t]]; padding rows are zero."""
    if permutation.padded:
        x_SD = torch.cat((x_SD, x_SD.new_zeros(1, x_SD.shape[1])))
    return x_SD.index_select(0, permutation.token_of_row_T)


def _sum_choices(rows_TD: Tensor, permutation: Permutation) -> Tensor:
    """Sum over each token's choices, in their order; low precision is accumulated in FP32."""
    if permutation.row_of_choice_SK.shape[1] == 1:
        return rows_TD.index_select(0, permutation.row_of_choice_SK.view(-1))
    # The one CPU operator that gathers and sums in a single pass.
    return F.embedding_bag(permutation.row_of_choice_SK, rows_TD, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _gather_rows(x_SD, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grads[0].contiguous(), ctx.permutation), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum_choices(rows_TD, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather_rows(grads[0].contiguous(), ctx.permutation), None


def permute(x_SD: Tensor, permutation: Permutation) -> Tensor:
    """Tokens [S, D] → rows [T, D] sorted by expert, each token K times; padding rows are zero."""
    return _Permute.apply(x_SD, permutation)  # pyright: ignore[reportReturnType]


def unpermute(rows_TD: Tensor, permutation: Permutation) -> Tensor:
    """Rows [T, D] → tokens [S, D], the sum over each token's K choices."""
    return _Unpermute.apply(rows_TD, permutation)  # pyright: ignore[reportReturnType]


def permute_probabilities(probabilities_SK: Tensor, permutation: Permutation) -> Tensor:
    """Routing weights [S, K] → [T] in the rows' order, zero in padding rows."""
    rows_T = permutation.row_of_choice_SK.reshape(-1).long()
    zeros_T = probabilities_SK.new_zeros(permutation.token_of_row_T.shape)
    return zeros_T.scatter(0, rows_T, probabilities_SK.reshape(-1))


def _product(x_TA: Tensor, weight_EAB: Tensor, rows_per_expert: list[int]) -> Tensor:
    """x W of each expert's block: [T, A], [E, A, B] → [T, B]."""
    num_experts, num_inputs, num_outputs = weight_EAB.shape
    if min(rows_per_expert) == max(rows_per_expert):
        x_EtA = x_TA.view(num_experts, rows_per_expert[0], num_inputs)
        return torch.bmm(x_EtA, weight_EAB).view(x_TA.shape[0], num_outputs)
    if x_TA.is_cuda and x_TA.dtype == torch.bfloat16:
        return F.grouped_mm(x_TA, weight_EAB, offs=_block_ends(rows_per_expert, x_TA.device))
    y_TB = x_TA.new_empty(x_TA.shape[0], num_outputs)
    blocks = zip(x_TA.split(rows_per_expert), weight_EAB, y_TB.split(rows_per_expert), strict=True)
    for x, weight, y in blocks:
        torch.mm(x, weight, out=y)
    return y_TB


def _outer_product(x_TA: Tensor, y_TB: Tensor, rows_per_expert: list[int]) -> Tensor:
    """xᵀ y of each expert's block: [T, A], [T, B] → [E, A, B]; zero for an empty block."""
    num_experts, num_rows = len(rows_per_expert), rows_per_expert[0]
    num_left, num_right = x_TA.shape[1], y_TB.shape[1]
    if min(rows_per_expert) == max(rows_per_expert):
        x_EAt = x_TA.view(num_experts, num_rows, num_left).transpose(1, 2)
        return torch.bmm(x_EAt, y_TB.view(num_experts, num_rows, num_right))
    if x_TA.is_cuda and x_TA.dtype == torch.bfloat16:
        return F.grouped_mm(x_TA.t(), y_TB, offs=_block_ends(rows_per_expert, x_TA.device))
    out_EAB = x_TA.new_empty(num_experts, num_left, num_right)
    blocks = zip(x_TA.split(rows_per_expert), y_TB.split(rows_per_expert), out_EAB, strict=True)
    for x, y, out in blocks:
        torch.mm(x.t(), y, out=out)
    return out_EAB


def _block_ends(rows_per_expert: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows_per_expert, device=device).cumsum(0, dtype=torch.int32)


def _compiled(hidden_TF: Tensor, probabilities_T: Tensor | None) -> bool:
    weights = () if probabilities_T is None else (probabilities_T,)
    is_wide = all(weight.dtype == torch.float32 for weight in weights)
    fits = hidden_TF.shape[1] <= compiled_calls.MAX_WIDTH and is_wide
    return fits and compiled_calls.take(hidden_TF, *weights)


def _activate(hidden_TF: Tensor, probabilities_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """h → r = relu(h), in place, and p r². A compiled pass leaves h as it is: the gradient takes
    either."""
    if _compiled(hidden_TF, probabilities_T):
        return hidden_TF, compiled_passes.squared_relu(hidden_TF, probabilities_T)
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


def _activate_backward(
    grad_activation_TF: Tensor,
    relu_TF: Tensor,
    probabilities_T: Tensor | None,
    with_probabilities: bool,
) -> tuple[Tensor, Tensor | None]:
    """∂a → ∂h, over ∂a's memory, and ∂p. With a = p r²: ∂p = Σ_F r² ∂a and ∂h = 2 p r ∂a share
    r ∂a."""
    if _compiled(relu_TF, probabilities_T):
        return grad_activation_TF, compiled_passes.squared_relu_backward_(
            grad_activation_TF, relu_TF, probabilities_T, with_probabilities
        )
    grad_probabilities_T = None
    if probabilities_T is not None and with_probabilities:
        grad_probabilities_T = torch.empty_like(probabilities_T)
    chunks, scratch_TF = _row_chunks(relu_TF)
    other_TF = torch.empty_like(scratch_TF)
    for rows in chunks:
        wide_TF = _widened(relu_TF[rows], scratch_TF)
        part_TF = _destination(grad_activation_TF[rows], other_TF)
        torch.mul(wide_TF, grad_activation_TF[rows], out=part_TF)
        if probabilities_T is None:
            part_TF.mul_(2)
        else:
            if grad_probabilities_T is not None:
                product_TF = torch.mul(wide_TF, part_TF, out=scratch_TF[: len(part_TF)])
                grad_probabilities_T[rows] = product_TF.sum(-1)
            part_TF.mul_((2 * probabilities_T[rows]).unsqueeze(1))
        if part_TF.dtype != grad_activation_TF.dtype:
            grad_activation_TF[rows] = part_TF
    return grad_activation_TF, grad_probabilities_T


def _row_chunks(rows_TF: Tensor) -> tuple[list[slice], Tensor]:
    """Row ranges for elementwise work, short on a CPU so that the wide temporaries stay in the
    cache, and room for one of them in FP32 or wider."""
    num_rows, width = rows_TF.shape
    step = num_rows if rows_TF.is_cuda else max(1, _CHUNK_ELEMENTS // max(width, 1))
    step = max(min(step, num_rows), 1)
    dtype = torch.promote_types(rows_TF.dtype, torch.float32)
    chunks = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
    return chunks, rows_TF.new_empty((step, width), dtype=dtype)


def _widened(rows_TF: Tensor, scratch_TF: Tensor) -> Tensor:
    if rows_TF.dtype == scratch_TF.dtype:
        return rows_TF
    return scratch_TF[: len(rows_TF)].copy_(rows_TF)


def _destination(rows_TF: Tensor, scratch_TF: Tensor) -> Tensor:
    """Where to compute what ends in `rows_TF`: there, or in `scratch_TF` if that is wider."""
    return rows_TF if rows_TF.dtype == scratch_TF.dtype else scratch_TF[: len(rows_TF)]


class _GroupedMlp(torch.autograd.Function):
    """The routing weight multiplies the activation, before the second product, as in Megatron-Core
    (transformer/moe/experts.py, TEGroupedMLP.forward). Elementwise work is done in FP32: for BF16
    that costs no more than BF16 arithmetic and rounds once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight1_EFD: Tensor,
        weight2_EDF: Tensor,
        probabilities_T: Tensor | None,
        rows_per_expert: list[int],
    ) -> Tensor:
        hidden_TF = _product(x_TD, weight1_EFD.transpose(1, 2), rows_per_expert)
        relu_TF, activation_TF = _activate(hidden_TF, probabilities_T)
        ctx.save_for_backward(
            x_TD, weight1_EFD, weight2_EDF, probabilities_T, relu_TF, activation_TF
        )
        ctx.rows_per_expert = rows_per_expert
        return _product(activation_TF, weight2_EDF.transpose(1, 2), rows_per_expert)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight1_EFD, weight2_EDF, probabilities_T, relu_TF, activation_TF = ctx.saved_tensors
        rows_per_expert = ctx.rows_per_expert
        grad_y_TD = grads[0].contiguous()
        grad_weight2_EDF = None
        if ctx.needs_input_grad[2]:
            grad_weight2_EDF = _outer_product(grad_y_TD, activation_TF, rows_per_expert)
        grad_activation_TF = _product(grad_y_TD, weight2_EDF, rows_per_expert)
        grad_hidden_TF, grad_probabilities_T = _activate_backward(
            grad_activation_TF, relu_TF, probabilities_T, ctx.needs_input_grad[3]
        )
        grad_weight1_EFD = None
        if ctx.needs_input_grad[1]:
            grad_weight1_EFD = _outer_product(grad_hidden_TF, x_TD, rows_per_expert)
        grad_x_TD = None
        if ctx.needs_input_grad[0]:
            grad_x_TD = _product(grad_hidden_TF, weight1_EFD, rows_per_expert)
        return grad_x_TD, grad_weight1_EFD, grad_weight2_EDF, grad_probabilities_T, None


def _as_multiplied(*tensors: Tensor) -> tuple[Tensor, ...]:
    """FP32 copies on a CPU that multiplies BF16 no other way: cast once, not at each product."""
    return tuple(t.to(product_dtype(t)) for t in tensors)


def grouped_mlp(
    x_TD: Tensor,
    tokens_per_expert_E: list[int] | Tensor,
    weight1_EFD: Tensor,
    weight2_EDF: Tensor,
    probabilities_T: Tensor | None = None,
) -> Tensor:
    """y = (p relu(x W1ᵀ)²) W2ᵀ with each expert's own W1, W2 (Nemotron 3's ungated experts).

    `x_TD` [T, D] is sorted by expert, `tokens_per_expert_E` counts its rows (a list, or an int64
    tensor; SYNC if that is on a GPU), `probabilities_T` [T] is the routing weight, FP32 or x's
    dtype. Experts may be empty. Products take x's dtype and accumulate in FP32. → y [T, D].
    """
    if isinstance(tokens_per_expert_E, Tensor):
        tokens_per_expert_E = tokens_per_expert_E.tolist()
    rows_per_expert: list[int] = tokens_per_expert_E
    assert len(rows_per_expert) == weight1_EFD.shape[0], (len(rows_per_expert), weight1_EFD.shape)
    assert sum(rows_per_expert) == x_TD.shape[0], (sum(rows_per_expert), x_TD.shape)
    dtype = x_TD.dtype
    x_TD, weight1_EFD, weight2_EDF = _as_multiplied(x_TD, weight1_EFD, weight2_EDF)
    num_experts, fullest = len(rows_per_expert), _block_rows(rows_per_expert)
    num_padding = fullest * num_experts - x_TD.shape[0]
    if 0 < num_padding <= affordable_padding(weight1_EFD) * num_experts:
        counts_E = torch.tensor(rows_per_expert)
        experts_T1 = torch.arange(num_experts).repeat_interleave(counts_E).unsqueeze(1)
        permutation = plan_permutation(experts_T1, num_experts, max_padding=num_padding)
        rows_x_TD = permute(x_TD, permutation)
        if probabilities_T is not None:
            probabilities_T = permute_probabilities(probabilities_T.unsqueeze(1), permutation)
        rows_y_TD = _GroupedMlp.apply(
            rows_x_TD, weight1_EFD, weight2_EDF, probabilities_T, permutation.rows_per_expert
        )
        return unpermute(rows_y_TD, permutation).to(dtype)  # pyright: ignore[reportArgumentType]
    y_TD: Tensor = _GroupedMlp.apply(  # pyright: ignore
        x_TD.contiguous(), weight1_EFD, weight2_EDF, probabilities_T, rows_per_expert
    )
    return y_TD.to(dtype)


def routed_mlp(
    x_SD: Tensor,
    experts_SK: Tensor,
    probabilities_SK: Tensor,
    weight1_EFD: Tensor,
    weight2_EDF: Tensor,
) -> tuple[Tensor, Tensor]:
    """All experts on this rank: y_s = Σ_k p_sk expert_{e_sk}(x_s).

    `experts_SK` are the router's choices (any integer dtype), `probabilities_SK` their weights.
    → y [S, D] and the tokens each expert received, int64 [E]. SYNC: the host reads the counts.
    """
    num_experts, dtype = weight1_EFD.shape[0], x_SD.dtype
    x_SD, weight1_EFD, weight2_EDF = _as_multiplied(x_SD, weight1_EFD, weight2_EDF)
    permutation = plan_permutation(experts_SK, num_experts, affordable_padding(weight1_EFD))
    rows_y_TD = _GroupedMlp.apply(
        permute(x_SD, permutation),
        weight1_EFD,
        weight2_EDF,
        permute_probabilities(probabilities_SK, permutation),
        permutation.rows_per_expert,
    )
    y_SD = unpermute(rows_y_TD, permutation)  # pyright: ignore[reportArgumentType]
    return y_SD.to(dtype), permutation.tokens_per_expert_E
