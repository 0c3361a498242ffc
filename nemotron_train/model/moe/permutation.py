"""The permutation that sorts tokens by expert on one rank, and its inverse.

Owns: the row of each choice (`plan_permutation`), the gather and its inverse (`permute`,
`unpermute`; on a GPU by Triton kernels), and how much padding is worth one batched product. Does
not own: the products (`core`), the exchange between expert-parallel ranks (Megatron's dispatchers).

Shape legend: S tokens, K choices a token, E experts, T rows sorted by expert (padding included),
D token width, F expert hidden width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_train.kernels.triton import available
from nemotron_train.platform.device import to_device

# FLOPs that padding may waste, for each expert and product: about the cost of starting one more
# product on two Zen 4 cores (benchmarks/moe.py; oneDNN's BF16 products start slower than FP32's).
_PADDING_FLOPS = {torch.float32: 2_000_000, torch.bfloat16: 12_000_000}

_BLOCK_MULTIPLE = 32  # rows of a padded block are a multiple of this; see `block_rows`


@dataclass(frozen=True)
class Blocks:
    """The block of rows of each expert.

    `lengths`: rows of each block, in host memory; None where the host does not know them: on a GPU
    the grouped product reads `ends_E`, int32 [E], the end of each block, so nobody waits.
    """

    num_experts: int
    lengths: list[int] | None = None
    ends_E: Tensor | None = None

    @classmethod
    def of(cls, counts_E: Tensor | list[int], is_grouped: bool) -> "Blocks":
        """Blocks of `counts_E` rows. is_grouped: for a grouped product; otherwise the counts are
        brought to the host (SYNC if they are on a GPU)."""
        num_experts = len(counts_E)
        if not is_grouped:
            lengths = counts_E.tolist() if isinstance(counts_E, Tensor) else counts_E
            return cls(num_experts, lengths)
        counts_E = torch.as_tensor(counts_E)
        if not counts_E.is_cuda:
            counts_E = to_device(counts_E, "cuda")
        return cls(num_experts, ends_E=counts_E.cumsum(0, dtype=torch.int32))


def count_values(values: Tensor, num_values: int) -> Tensor:
    """How often each of 0 … num_values - 1 occurs in the integers `values`: int64 [num_values].
    Unlike `torch.bincount`, which reads the largest value, the host does not wait for a GPU."""
    flat = values.reshape(-1)
    if not flat.is_cuda:
        return torch.bincount(flat, minlength=num_values)
    counts = torch.zeros(num_values, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))


@dataclass(frozen=True)
class Permutation:
    """The row of each (token, choice) when tokens are sorted by expert, in token order within an
    expert.

    `token_of_row_T`: token of each row; `num_tokens` (one past the last) for padding rows.
    `row_of_choice_SK`: int32 row of each token's choice.
    `blocks`: the block of rows of each expert; all of one length if they are padded.
    `tokens_per_expert_E`: tokens in each expert's block, int64, on the tokens' device.
    """

    token_of_row_T: Tensor
    row_of_choice_SK: Tensor
    blocks: Blocks
    tokens_per_expert_E: Tensor

    @property
    def rows_per_expert(self) -> list[int]:
        """Rows in each expert's block, where the host knows them."""
        assert self.blocks.lengths is not None
        return self.blocks.lengths

    @property
    def padded(self) -> bool:
        """Whether there are padding rows."""
        return self.token_of_row_T.numel() > self.row_of_choice_SK.numel()


def affordable_padding(weight_EFD: Tensor) -> int:
    """Number of padding rows per expert up to which one batched product is faster than one product
    per expert. 0 on a GPU, whose grouped product needs no padding."""
    if weight_EFD.is_cuda:
        return 0
    _, num_hidden, num_inputs = weight_EFD.shape
    return _PADDING_FLOPS.get(weight_EFD.dtype, 0) // (2 * num_hidden * num_inputs)


def block_rows(rows_per_expert: list[int]) -> int:
    """Rows of a padded block: those of the fullest expert, rounded up to a multiple so that few
    lengths occur. oneDNN compiles and caches a product for every new shape. Without rounding, a
    BF16 step spends more time on that, and on the heap fragmentation it causes, than on the experts
    (docs/log.md)."""
    return -(-max(rows_per_expert) // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE


@torch.no_grad()
def plan_permutation(
    experts_SK: Tensor, num_experts: int, max_padding: int = 0, *, is_grouped: bool = False
) -> Permutation:
    """Sort the choices by expert, ties in token order, so the result is deterministic.

    Blocks are padded to the length of the fullest one if that adds at most `max_padding` rows per
    expert on average; otherwise there is no padding. is_grouped: for a GPU's grouped product,
    which needs no padding and no counts on the host. Otherwise SYNC on a GPU: the host reads the
    counts.
    """
    num_tokens, num_choices = experts_SK.shape
    device = experts_SK.device
    # A radix sort of small integers: three times as fast as one of int64.
    key_dtype = torch.uint8 if num_experts <= 256 else torch.int32
    sorted_T, order_T = torch.sort(experts_SK.reshape(-1).to(key_dtype), stable=True)
    tokens_per_expert_E = count_values(sorted_T, num_experts)
    blocks = Blocks.of(tokens_per_expert_E, is_grouped)
    num_rows = sorted_T.numel()
    fullest = block_rows(blocks.lengths) if blocks.lengths else 0

    row_T = torch.arange(num_rows, device=device, dtype=torch.int32)
    token_T = order_T // num_choices
    if blocks.lengths and fullest * num_experts - num_rows <= max_padding * num_experts:
        # Move each row by the distance between its expert's padded and packed block.
        block_E = torch.arange(num_experts, device=device) * fullest
        start_E = tokens_per_expert_E.cumsum(0) - tokens_per_expert_E
        row_T += (block_E - start_E).to(torch.int32).index_select(0, sorted_T.to(torch.int32))
        blocks = Blocks(num_experts, [fullest] * num_experts)
        token_of_row_T = token_T.new_full((fullest * num_experts,), num_tokens)
        token_of_row_T[row_T] = token_T
    else:
        token_of_row_T = token_T
    row_of_choice_SK = torch.empty_like(row_T).index_copy_(0, order_T, row_T)
    return Permutation(
        token_of_row_T=token_of_row_T,
        row_of_choice_SK=row_of_choice_SK.view(num_tokens, num_choices),
        blocks=blocks,
        tokens_per_expert_E=tokens_per_expert_E,
    )


def _gather_rows(x_SD: Tensor, permutation: Permutation) -> Tensor:
    """Row t of the result is x[token_of_row[t]]; padding rows are zero."""
    if available.can_use(x_SD):
        from nemotron_train.kernels.triton import permutation as triton_kernels

        return triton_kernels.gather_rows(x_SD, permutation.token_of_row_T)
    if permutation.padded:  # index `num_tokens` reads this row of zeros
        x_SD = torch.cat((x_SD, x_SD.new_zeros(1, x_SD.shape[1])))
    return x_SD.index_select(0, permutation.token_of_row_T)


def _sum_choices(rows_TD: Tensor, permutation: Permutation) -> Tensor:
    """Sum over each token's choices, in their order; low precision is accumulated in FP32."""
    if available.can_use(rows_TD):
        from nemotron_train.kernels.triton import permutation as triton_kernels

        return triton_kernels.sum_rows(rows_TD, permutation.row_of_choice_SK)
    if permutation.row_of_choice_SK.shape[1] == 1:
        return rows_TD.index_select(0, permutation.row_of_choice_SK.view(-1))
    # The only CPU operator that gathers and sums in one sweep.
    return F.embedding_bag(permutation.row_of_choice_SK, rows_TD, mode="sum")


class _Permute(torch.autograd.Function):
    """Gather; its gradient sums over the K copies of a token."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _gather_rows(x_SD, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grads[0].contiguous(), ctx.permutation), None


class _Unpermute(torch.autograd.Function):
    """Sum over the K rows of a token; its gradient gathers."""

    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum_choices(rows_TD, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather_rows(grads[0].contiguous(), ctx.permutation), None


def permute(x_SD: Tensor, permutation: Permutation) -> Tensor:
    """Tokens [S, D] → rows [T, D] sorted by expert; each token appears K times, padding is zero."""
    return _Permute.apply(x_SD, permutation)  # pyright: ignore[reportReturnType]


def unpermute(rows_TD: Tensor, permutation: Permutation) -> Tensor:
    """Rows [T, D] → tokens [S, D], the sum over each token's K choices."""
    return _Unpermute.apply(rows_TD, permutation)  # pyright: ignore[reportReturnType]


def permute_probabilities(probabilities_SK: Tensor, permutation: Permutation) -> Tensor:
    """Routing weights [S, K] → [T], one a row; zero for padding rows."""
    rows_T = permutation.row_of_choice_SK.reshape(-1).long()
    zeros_T = probabilities_SK.new_zeros(permutation.token_of_row_T.shape)
    return zeros_T.scatter(0, rows_T, probabilities_SK.reshape(-1))
