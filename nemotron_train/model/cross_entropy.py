"""Cross entropy over logits whose vocabulary is split across the tensor-parallel ranks.

Owns: the loss of each token and its gradient. Does not own: the loss mask, its normalization or
the output layer. A form that never holds all logits (output layer and loss chunk by chunk) was
measured and not kept: on a CPU its products take all the time, so it was no faster.

Shape legend: N tokens, V vocabulary entries of this rank.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """loss = lse(logits) - logits[label]; ∂logits = (softmax - onehot) ∂loss.

    One fused softmax over this rank's slice gives everything: its largest entry is
    exp(max - lse), at least 1/V, so the slice's lse is max - log of it without another pass of
    exponentials. Slices are joined by the lse of their lse. The softmax is the only tensor of the
    logits' size that is kept, and the gradient overwrites it.
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
        labels_N = labels_N - rank * vocab_slice
        owned_N = (labels_N >= 0) & (labels_N < vocab_slice)
        labels_N = labels_N.where(owned_N, 0)
        label_logit_N = logits_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1).to(wide)
        label_logit_N = label_logit_N.where(owned_N, 0)
        largest_N = logits_NV.amax(-1).to(wide)
        if logits_NV.dtype == wide and not logits_NV.is_cuda:
            # Over the logits themselves: a second tensor of their size is the largest of a step,
            # and touching fresh memory costs more than the softmax.
            softmax_NV = torch.softmax(logits_NV, dim=-1, out=logits_NV)
        else:
            softmax_NV = torch.softmax(logits_NV, dim=-1, dtype=wide)
        lse_N = largest_N.sub_(softmax_NV.amax(-1).log_())

        slice_share_N = None
        if num_ranks > 1:
            slice_lse_N, max_N = lse_N, lse_N.clone()
            # COLLECTIVE: two small all-reduces over the tensor-parallel group.
            torch.distributed.all_reduce(
                max_N, op=torch.distributed.ReduceOp.MAX, group=tensor_group
            )
            sums_2N = torch.stack(((slice_lse_N - max_N).exp_(), label_logit_N))
            torch.distributed.all_reduce(sums_2N, group=tensor_group)
            lse_N, label_logit_N = sums_2N[0].log().add_(max_N), sums_2N[1]
            slice_share_N = (slice_lse_N - lse_N).exp_()
        ctx.save_for_backward(softmax_NV, labels_N, owned_N, slice_share_N)
        ctx.logits_dtype = logits_NV.dtype
        return lse_N - label_logit_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax_NV, labels_N, owned_N, slice_share_N = ctx.saved_tensors
        grad_N = grads[0].to(softmax_NV.dtype)
        factor_N = grad_N if slice_share_N is None else grad_N * slice_share_N
        # In place: a second backward through the same graph raises instead of being wrong.
        grad_logits_NV = softmax_NV.mul_(factor_N.unsqueeze(1))
        grad_logits_NV.scatter_add_(
            1, labels_N.unsqueeze(1), (-grad_N).where(owned_N, 0).unsqueeze(1)
        )
        return grad_logits_NV.to(ctx.logits_dtype), None, None


def vocab_parallel_cross_entropy(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    tensor_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """-log softmax(logits)[label] of each token: [S, B, V of this rank], [S, B] → [S, B] FP32.

    On a CPU, FP32 logits are overwritten. The results are those of
    `megatron.core.tensor_parallel.vocab_parallel_cross_entropy`; labels outside the vocabulary
    lose nothing but their own term (loss = lse) and so must be masked by the caller. Every rank
    of `tensor_group` gets the same loss. COLLECTIVE if it has more than one rank; None means one.
    """
    loss_N: Tensor = _VocabParallelCrossEntropy.apply(  # pyright: ignore
        logits_SBV.reshape(-1, logits_SBV.shape[-1]), labels_SB.reshape(-1), tensor_group
    )
    return loss_N.view(labels_SB.shape)
