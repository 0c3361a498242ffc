"""Attention of new tokens over the KV cache, with grouped queries and no positional embedding.

Owns: softmax(Q Kᵀ / √D) V, where each query sees the cached keys of its sequence up to itself. Does
not own: the cache (`decode_state`), the projections, whole rows without a cache (`core`).

The arithmetic and dtypes are those of `core.causal_attention`, so both give the same numbers up to
the order of sums.

Shapes: B sequences, n new tokens of each (padded), H query heads, G key/value heads, D head
dimension, L cached tokens of the longest sequence, b queries of a block; R = H / G.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_train.model.decode_state import DecodeBatch, KVCache
from nemotron_train.platform.bfloat16_products import product_dtype

_SCORES = 1 << 22  # maximum elements of the score matrix; longer inputs go block by block


def cached_attention(
    query_T1HD: Tensor, key_T1GD: Tensor, value_T1GD: Tensor, cache: KVCache, batch: DecodeBatch
) -> Tensor:
    """Append the new keys and values to the cache and attend: [T,1,H,D] -> [T,1,H*D]."""
    cache.write(key_T1GD[:, 0], value_T1GD[:, 0], batch)
    length = batch.max_length
    keys_BGLD, values_BGLD = cache.keys_BGLD[:, :, :length], cache.values_BGLD[:, :, :length]
    q_BnHD = batch.to_padded(query_T1HD.flatten(2)).unflatten(-1, query_T1HD.shape[2:])
    attend = _fused if q_BnHD.is_cuda else _products
    size = max(1, _SCORES // (len(batch.counts) * q_BnHD.shape[2] * length))
    blocks = [
        attend(q_BnHD[:, start : start + size], keys_BGLD, values_BGLD, _unseen(batch, start, size))
        for start in range(0, batch.max_new, size)
    ]
    output_BnHD = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return batch.to_packed(output_BnHD.flatten(2))


def _unseen(batch: DecodeBatch, start: int, size: int) -> Tensor | None:
    """The mask of a block of queries, [B,b,L]: True for keys that a query must not see. None if
    every query sees every key (one new token, sequences of equal length)."""
    if batch.max_new == 1 and len(set(batch.lengths_before)) == 1:
        return None
    device = batch.lengths_before_B.device
    queries_b = torch.arange(start, min(start + size, batch.max_new), device=device)
    last_Bb = batch.lengths_before_B[:, None] + queries_b
    return torch.arange(batch.max_length, device=device) > last_Bb[..., None]


def _products(
    q_BbHD: Tensor, keys_BGLD: Tensor, values_BGLD: Tensor, unseen_BbL: Tensor | None
) -> Tensor:
    """Attention as batched products (CPU): the queries of all heads that share a key head are one
    product. FP32 on a CPU without BF16 instructions."""
    num_rows, num_queries, num_heads, width = q_BbHD.shape
    num_products, dtype = num_rows * keys_BGLD.shape[1], q_BbHD.dtype
    q, keys, values = (t.to(product_dtype(t)) for t in (q_BbHD, keys_BGLD, values_BGLD))
    q_NAD = q.transpose(1, 2).reshape(num_products, -1, width)  # A = R x b
    keys_NLD, values_NLD = keys.flatten(0, 1), values.flatten(0, 1)
    scores_NAL = q_NAD.new_empty(num_products, q_NAD.shape[1], keys_NLD.shape[1])
    torch.baddbmm(scores_NAL, q_NAD, keys_NLD.mT, beta=0, alpha=width**-0.5, out=scores_NAL)
    if unseen_BbL is not None:
        scores = scores_NAL.view(num_rows, num_heads, num_queries, -1)
        scores.masked_fill_(unseen_BbL[:, None], float("-inf"))
    out_NAD = torch.bmm(torch.softmax(scores_NAL, dim=-1), values_NLD).to(dtype)
    return out_NAD.view(num_rows, num_heads, num_queries, width).transpose(1, 2)


def _fused(
    q_BbHD: Tensor, keys_BGLD: Tensor, values_BGLD: Tensor, unseen_BbL: Tensor | None
) -> Tensor:
    """torch's fused kernel (GPU). Not run yet: no GPU was available."""
    output_BHbD = F.scaled_dot_product_attention(
        q_BbHD.transpose(1, 2),
        keys_BGLD,
        values_BGLD,
        attn_mask=None if unseen_BbL is None else ~unseen_BbL[:, None],
        enable_gqa=q_BbHD.shape[2] != keys_BGLD.shape[1],
    )
    return output_BHbD.transpose(1, 2)
