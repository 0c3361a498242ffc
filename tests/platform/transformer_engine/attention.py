"""What attention asks of the extension when it computes in torch: packed rows and padded batches.

Fused attention is never available, so Transformer Engine's own unfused form computes.
"""

import itertools
from typing import Any

import torch
import transformer_engine_torch
from torch import Tensor

_MASKED = -10000.0  # the score of a key that is not seen


def convert_thd_to_bshd(packed: Tensor, ends: Tensor, batch: int, longest: int) -> Tensor:
    """[tokens, heads, width] -> [documents, longest, heads, width], zeros behind each document."""
    out = packed.new_zeros(batch, longest, *packed.shape[1:])
    cuts = ends.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(cuts)):
        out[row, : end - start] = packed[start:end]
    return out


def convert_bshd_to_thd(padded: Tensor, ends: Tensor, total: int) -> Tensor:
    """The reverse: [documents, longest, heads, width] -> [total, heads, width]."""
    out = padded.new_zeros(total, *padded.shape[2:])
    cuts = ends.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(cuts)):
        out[start:end] = padded[row, : end - start]
    return out


def get_fused_attn_backend(parameters: Any) -> tuple[Any, str]:
    """None, and why."""
    return transformer_engine_torch.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no GPU"


def scaled_softmax(scores: Tensor, scale: float) -> Tensor:
    """[batch, heads, queries, keys] -> the same shape; summed in FP32."""
    return (scores.float() * scale).softmax(-1).to(scores.dtype)


def scaled_masked_softmax(scores: Tensor, mask: Tensor, scale: float) -> Tensor:
    """mask: [batch, 1, queries, keys], true where a query does not see a key. A row that sees none
    is zero."""
    mask = mask.bool()
    weights = (scores.float() * scale).masked_fill(mask, _MASKED).softmax(-1)
    return weights.masked_fill(mask.all(-1, keepdim=True), 0.0).to(scores.dtype)


def scaled_causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """The last query sees all keys, and each one before it one key less."""
    queries, keys = scores.shape[-2:]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(
        1 + keys - queries
    )
    return scaled_masked_softmax(scores, mask[None, None], scale)


def softmax_backward(gradient: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, from the softmax's own result."""
    inner = gradient.float() * weights.float()
    return (scale * (inner - weights.float() * inner.sum(-1, keepdim=True))).to(gradient.dtype)


FUNCTIONS = {
    "scaled_softmax_forward": scaled_softmax,
    "scaled_softmax_backward": softmax_backward,
    "scaled_masked_softmax_forward": scaled_masked_softmax,
    "scaled_masked_softmax_backward": softmax_backward,
    "scaled_aligned_causal_masked_softmax_forward": scaled_causal_softmax,
    "scaled_aligned_causal_masked_softmax_backward": softmax_backward,
    "convert_thd_to_bshd": convert_thd_to_bshd,
    "convert_bshd_to_thd": convert_bshd_to_thd,
    "get_fused_attn_backend": get_fused_attn_backend,
}
