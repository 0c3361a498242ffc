"""Cross entropy over logits whose vocabulary is split across the tensor-parallel ranks.

Owns: the loss of each token and its gradient, by torch operators or by C kernels on a CPU
(kernels/csrc/loss.c). Does not own: the loss mask, its normalization, the output layer. A form that
never holds all logits (output layer and loss chunk by chunk) was measured and not adopted: on a CPU
the products take nearly all the time, so it was no faster.

Shape legend: N tokens, V vocabulary entries of this rank.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import supports

# Elements of logits processed at a time on a CPU, so that their FP32 copy stays in the cache. A
# copy of all logits would be the largest tensor of a step, and touching new memory costs more than
# the exponentials.
_CHUNK_ELEMENTS = 1 << 18


def _chunks(logits_NV: Tensor) -> list[slice]:
    """Row ranges to process: short ones on a CPU, all rows at once on a GPU."""
    num_rows, vocab_slice = logits_NV.shape
    step = num_rows if logits_NV.is_cuda else max(1, _CHUNK_ELEMENTS // vocab_slice)
    return [slice(start, start + step) for start in range(0, num_rows, max(1, step))]


def _scratch(logits_NV: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer for the longest chunk in `dtype`, used for every chunk."""
    rows = _chunks(logits_NV)[:1]
    return logits_NV.new_empty(
        len(logits_NV[rows[0]]) if rows else 0, logits_NV.shape[1], dtype=dtype
    )


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """loss = lse(logits) - logits[label]; ∂logits = (softmax(logits) - onehot) ∂loss.

    lse is log sum exp. Over several ranks, the lse of the whole vocabulary is the lse of the ranks'
    lse. Of [N, V] tensors only the logits are saved, and the gradient overwrites them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        labels_N: Tensor,
        tensor_group: torch.distributed.ProcessGroup | None,
    ) -> Tensor:
        num_ranks = 1 if tensor_group is None else tensor_group.size()
        rank = 0 if tensor_group is None else tensor_group.rank()
        vocab_slice = logits_NV.shape[1]
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        labels_N = labels_N - rank * vocab_slice  # index in this rank's slice
        owned_N = (labels_N >= 0) & (labels_N < vocab_slice)
        labels_N = labels_N.where(owned_N, 0)  # any valid index; masked below
        label_logit_N = logits_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1).to(wide)
        label_logit_N = label_logit_N.where(owned_N, 0)
        largest_N, sum_N = _sums(logits_NV, wide)
        lse_N = sum_N.log().add_(largest_N)
        # softmax = exp(logit - largest) scale. exp(logit - lse) would be less accurate: lse has
        # been rounded.
        scale_N = sum_N.reciprocal_()
        if num_ranks > 1:
            slice_lse_N, max_N = lse_N, lse_N.clone()
            # COLLECTIVE: two small all-reduces over the tensor-parallel group, of the maximum lse,
            # then of exp(lse - maximum) and of the label's logit (zero on all ranks but one).
            torch.distributed.all_reduce(
                max_N, op=torch.distributed.ReduceOp.MAX, group=tensor_group
            )
            sums_2N = torch.stack(((slice_lse_N - max_N).exp_(), label_logit_N))
            torch.distributed.all_reduce(sums_2N, group=tensor_group)
            lse_N, label_logit_N = sums_2N[0].log().add_(max_N), sums_2N[1]
            # The scale so far normalizes over this rank's slice only.
            scale_N.mul_((slice_lse_N - lse_N).exp_())
        ctx.save_for_backward(logits_NV, labels_N, owned_N, largest_N, scale_N)
        return lse_N - label_logit_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, labels_N, owned_N, largest_N, scale_N = ctx.saved_tensors
        grad_N = grads[0].to(largest_N.dtype)
        onehot_N = (-grad_N).where(owned_N, 0)  # added at the label, on the rank that has it
        # In place: a second backward through the same graph raises instead of being wrong.
        _gradient_(logits_NV, largest_N, grad_N * scale_N, labels_N, onehot_N)
        return logits_NV, None, None


def _sums(logits_NV: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row's largest logit, and its sum of e^(logit - largest); [N] each in FP32 or wider."""
    if supports(logits_NV) and logits_NV.is_contiguous():
        return training_kernels.cross_entropy_sums(logits_NV)
    largest_N = logits_NV.amax(-1).to(wide)
    sum_N = torch.empty_like(largest_N)
    scratch_NV = _scratch(logits_NV, wide)
    for rows in _chunks(logits_NV):
        shift_N1 = largest_N[rows].unsqueeze(1)
        part_NV = torch.sub(logits_NV[rows], shift_N1, out=scratch_NV[: len(shift_N1)])
        torch.sum(part_NV.exp_(), -1, out=sum_N[rows])
    return largest_N, sum_N


def _gradient_(
    logits_NV: Tensor, largest_N: Tensor, factor_N: Tensor, labels_N: Tensor, onehot_N: Tensor
) -> None:
    """Replace the logits by e^(logit - largest) factor, plus onehot at the label. With factor =
    scale ∂loss and onehot = -∂loss, this is (softmax - onehot) ∂loss."""
    if supports(logits_NV) and logits_NV.is_contiguous():
        # The kernel writes behind autograd's back: count the change, so that a second backward
        # raises.
        torch.autograd.graph.increment_version(logits_NV)
        training_kernels.cross_entropy_gradient_(logits_NV, largest_N, factor_N, labels_N, onehot_N)
        return
    factor_N1, onehot_N1 = factor_N.unsqueeze(1), onehot_N.unsqueeze(1)
    scratch_NV = _scratch(logits_NV, largest_N.dtype)
    for rows in _chunks(logits_NV):
        shift_N1 = largest_N[rows].unsqueeze(1)
        part_NV = torch.sub(logits_NV[rows], shift_N1, out=scratch_NV[: len(shift_N1)])
        part_NV.exp_().mul_(factor_N1[rows])
        part_NV.scatter_add_(1, labels_N[rows].unsqueeze(1), onehot_N1[rows])
        logits_NV[rows] = part_NV


def vocab_parallel_cross_entropy(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    tensor_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """-log softmax(logits)[label] of each token: [S, B, V of this rank], [S, B] → [S, B] FP32.

    The backward pass overwrites the logits. The results equal those of
    `megatron.core.tensor_parallel.vocab_parallel_cross_entropy`. A label outside the vocabulary
    gives loss = lse, so the caller must mask it. Every rank of `tensor_group` gets the same loss.
    COLLECTIVE if it has more than one rank; None means one rank.
    """
    loss_N: Tensor = _VocabParallelCrossEntropy.apply(  # pyright: ignore
        logits_SBV.reshape(-1, logits_SBV.shape[-1]), labels_SB.reshape(-1), tensor_group
    )
    return loss_N.view(labels_SB.shape)
