"""Causal grouped-query attention on a CPU as batched products, with a hand-written gradient.

Owns: softmax(Q Kᵀ / √D) V of whole causal rows. Does not own: the projections, documents, GPUs
(model/attention/layer.py chooses).

Why not `scaled_dot_product_attention`: its CPU kernel multiplies tiles one head at a time. For
heads of 32 and rows of 512, forward and backward, it took 1.5 times as long in FP32 and 2.9 times
in BF16. Here, the queries of one block and of all heads that share a key head are one product,
against only the keys that the block may see. The probabilities are saved for the gradient, half of
S² per head, so rows longer than `LONGEST_ROW` use torch's kernel.

Shape legend: B rows, S tokens, H query heads, G key and value heads, D head width; N = B G
batched products, R = H / G query heads per key head, b queries of a block, e keys it may see.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_train.platform.bfloat16_products import product_dtype

LONGEST_ROW = 1024
_BLOCK = 64  # queries a block: smaller wastes less on the diagonal, larger makes larger products


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left right, with the scale inside the product: no extra sweep, no extra rounding."""
    out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


class _CausalAttention(torch.autograd.Function):
    """Block by block over the queries; saves q, k, v and the probabilities of each block."""

    @staticmethod
    def forward(ctx: Any, q_NRSD: Tensor, k_NSD: Tensor, v_NSD: Tensor) -> Tensor:
        num_products, heads_a_key, num_tokens, width = q_NRSD.shape
        size = min(_BLOCK, num_tokens)
        future_bb = q_NRSD.new_full((size, size), float("-inf")).triu_(1)
        out_NRSD = torch.empty_like(q_NRSD)
        probabilities = []
        for start in range(0, num_tokens, size):
            end = min(start + size, num_tokens)
            q = q_NRSD[:, :, start:end].reshape(num_products, -1, width)
            scores = _scaled_product(q, k_NSD[:, :end].transpose(1, 2), width**-0.5)
            # Only the last keys, those of this block itself, need the causal mask.
            diagonal = scores.view(num_products, heads_a_key, -1, end)[..., start:]
            diagonal += future_bb[: end - start, : end - start]
            probability = torch.softmax(scores, dim=-1)
            out = torch.bmm(probability, v_NSD[:, :end])
            out_NRSD[:, :, start:end] = out.view(num_products, heads_a_key, -1, width)
            probabilities.append(probability)
        ctx.save_for_backward(q_NRSD, k_NSD, v_NSD, *probabilities)
        return out_NRSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per block, with P the probabilities and ∂O the output's gradient:
        ∂V += Pᵀ ∂O, ∂P = ∂O Vᵀ, ∂scores = P (∂P - Σ ∂P P), ∂Q = ∂scores K / √D,
        ∂K += ∂scoresᵀ Q / √D."""
        q_NRSD, k_NSD, v_NSD, *probabilities = ctx.saved_tensors
        num_products, heads_a_key, num_tokens, width = q_NRSD.shape
        size, scale = min(_BLOCK, num_tokens), width**-0.5
        wide = torch.promote_types(q_NRSD.dtype, torch.float32)
        grad_q_NRSD = torch.empty_like(q_NRSD)
        # Sums over blocks in FP32: in BF16 the rounding errors of the blocks would add up.
        grad_k_NSD, grad_v_NSD = (torch.zeros_like(k_NSD, dtype=wide) for _ in range(2))
        for block, probability in enumerate(probabilities):
            start = block * size
            end = min(start + size, num_tokens)
            q = q_NRSD[:, :, start:end].reshape(num_products, -1, width)
            grad = grads[0][:, :, start:end].reshape(num_products, -1, width)
            grad_v_NSD[:, :end] += torch.bmm(probability.transpose(1, 2), grad)
            grad_probability = torch.bmm(grad, v_NSD[:, :end].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probability, probability, -1, probability.dtype
            )
            grad_q = _scaled_product(grad_scores, k_NSD[:, :end], scale)
            grad_q_NRSD[:, :, start:end] = grad_q.view(num_products, heads_a_key, -1, width)
            grad_k_NSD[:, :end] += _scaled_product(grad_scores.transpose(1, 2), q, scale)
        return grad_q_NRSD, grad_k_NSD.to(k_NSD.dtype), grad_v_NSD.to(v_NSD.dtype)


def causal_attention(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √D) V, causal: [B,S,H,D] and twice [B,S,G,D] → [B,S,H,D].

    H is a multiple of G; query head h reads key head h G / H (rounded down). BF16 scores are
    rounded to BF16 before the softmax, which is computed in FP32. On a processor without BF16
    instructions only the result is rounded. Rows longer than `LONGEST_ROW` use torch's kernel.
    """
    num_rows, num_tokens, num_heads, width = q_BSHD.shape
    q_BHSD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
    if num_tokens > LONGEST_ROW:
        long_BHSD = F.scaled_dot_product_attention(
            q_BHSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=k_BGSD.shape[1] != num_heads
        )
        return long_BHSD.transpose(1, 2)
    num_products, dtype = num_rows * k_BGSD.shape[1], q_BHSD.dtype
    q_BHSD, k_BGSD, v_BGSD = (x.to(product_dtype(x)) for x in (q_BHSD, k_BGSD, v_BGSD))
    out_NRSD: Tensor = _CausalAttention.apply(  # pyright: ignore
        q_BHSD.reshape(num_products, -1, num_tokens, width),
        k_BGSD.reshape(num_products, num_tokens, width),
        v_BGSD.reshape(num_products, num_tokens, width),
    )
    out_NRSD = out_NRSD.to(dtype)
    return out_NRSD.view(num_rows, num_heads, num_tokens, width).transpose(1, 2)
