"""Megatron's attention layer with a shorter path for decode batches.

Owns: norm -> attention -> residual of a decode batch, through the modules or, for a few tokens, in
one C kernel. Does not own: the rest of the layer; training runs Megatron's own forward
(`model.mamba.block` explains why decoding does not).
"""

import functools
from typing import Any, cast

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nemotron_train.kernels import decoding as decoding_kernels
from nemotron_train.kernels.decoding import AttentionWeights, ResidualStream
from nemotron_train.model.attention.layer import kv_cache_of
from nemotron_train.model.decode_state import DecodeBatch
from nemotron_train.model.linears import are_plain


class AttentionBlock(TransformerLayer):
    """The layer behind a `*`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] -> the layer's output, same shape, and no context."""
        batch = kwargs.get("packed_seq_params")
        if not isinstance(batch, DecodeBatch):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportReturnType]
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        norm, attention = layer.input_layernorm, layer.self_attention
        weight = getattr(norm, "weight", None)  # None: the norm is part of linear_qkv
        is_compiled = decoding_kernels.accepts_tokens(batch.num_tokens, hidden, weight)
        if is_compiled and self._compiles:
            return compiled_attention(hidden, norm, attention, self._kernel_weights(), batch), None
        query, key, value = attention.get_query_key_value_tensors(norm(hidden))
        mixed = attention.core_attention(query, key, value, None, packed_seq_params=batch)
        out, _ = attention.linear_proj(mixed)
        return hidden + out, None

    @functools.cached_property
    def _compiles(self) -> bool:
        """Whether the C kernel can compute this layer."""
        layer = cast(Any, self)
        norm, attention = layer.input_layernorm, layer.self_attention
        is_plain = are_plain(norm, attention.linear_qkv, attention.linear_proj)
        return is_plain and self._kernel_weights().are_accepted(norm.weight)

    def _kernel_weights(self) -> AttentionWeights:
        """The weights the kernel reads. Collected at each call, since a tensor may be replaced."""
        attention = cast(Any, self).self_attention
        num_groups = attention.num_query_groups_per_partition
        return AttentionWeights(
            attention.linear_qkv.weight,
            attention.linear_proj.weight,
            num_groups=num_groups,
            queries_per_group=attention.num_attention_heads_per_partition // num_groups,
            head_dim=attention.hidden_size_per_attention_head,
        )


def compiled_attention(
    hidden_T1D: Tensor, norm: Any, attention: Any, weights: AttentionWeights, batch: DecodeBatch
) -> Tensor:
    """x + attention(norm(x)), [T,1,D], by the C kernel; appends the new keys and values to the
    layer's cache."""
    hidden_T1D = hidden_T1D.contiguous()
    layer_number = attention.core_attention.layer_number
    like = hidden_T1D.new_empty(0, weights.head_dim)
    cache = kv_cache_of(layer_number, batch, weights.num_groups, like)
    cache.reserve(batch.max_length)
    return decoding_kernels.attention_layer(
        ResidualStream(hidden_T1D, norm.weight, norm.eps),
        weights,
        keys_BGLD=cache.keys_BGLD,
        values_BGLD=cache.values_BGLD,
        longest=batch.max_length,
        row_T=batch.row_T,
        position_T=batch.position_T,
    )
