"""Core attention: grouped queries, causal, no positional embedding, no attention across documents.

This module fills the `core_attention` slot of Megatron's `SelfAttention`, which owns the
projections. Forms: batched products on a CPU (`causal_attention`), `scaled_dot_product_attention`
or, for packed documents, torch's variable-length kernel on a GPU, Transformer Engine's kernel if it
can be used.

Under context parallelism every form gets the whole sequence of some of the heads
(`model.context`). Causal work is then equal on all ranks, without interleaving pieces of the
sequence.

Shapes: S tokens, B rows, H query heads, G key/value heads, D head dimension.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nemotron_train.model.attention.core import causal_attention
from nemotron_train.model.attention.decoding import cached_attention
from nemotron_train.model.context import HeadExchange
from nemotron_train.model.decode_state import DecodeBatch, KVCache
from nemotron_train.model.documents import PackedDocuments


def _causal(q_BSHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor) -> torch.Tensor:
    """Causal attention over whole rows: [B,S,H,D] and twice [B,S,G,D] -> [B,S,H,D]; scale
    1/sqrt(D)."""
    if not q_BSHD.is_cuda:
        return causal_attention(q_BSHD, k_BSGD, v_BSGD)
    output_BHSD = F.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGD.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BSHD.shape[2] != k_BSGD.shape[2],
    )
    return output_BHSD.transpose(1, 2)


def _by_document(
    q_BSHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, documents: PackedDocuments
) -> torch.Tensor:
    """`_causal` of each document, separately: one call a document."""
    rows = [
        torch.cat(
            [
                _causal(
                    q_BSHD[row : row + 1, start:end],
                    k_BSGD[row : row + 1, start:end],
                    v_BSGD[row : row + 1, start:end],
                )
                for start, end in parts
            ],
            dim=1,
        )
        for row, parts in enumerate(documents.segments)
    ]
    return torch.cat(rows)


def _in_one_kernel(
    q_BSHD: torch.Tensor, k_BSGD: torch.Tensor, v_BSGD: torch.Tensor, documents: PackedDocuments
) -> torch.Tensor:
    """The same by torch's variable-length kernel, for all documents of all rows. The tests compare
    it over a stand-in for the kernel; it has not run on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    lengths, longest = documents.cumulative_lengths, documents.longest
    output_THD = varlen_attn(
        q_BSHD.flatten(0, 1),
        k_BSGD.flatten(0, 1),
        v_BSGD.flatten(0, 1),
        lengths,
        lengths,
        longest,
        longest,
        window_size=(-1, 0),  # causal
        enable_gqa=q_BSHD.shape[2] != k_BSGD.shape[2],
    )
    assert isinstance(output_THD, torch.Tensor)
    return output_THD.view_as(q_BSHD)


def _head_exchange(
    config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> HeadExchange:
    """The exchange for the query, key and value heads of one tensor-parallel rank. `config` is the
    one Megatron passes to its core attention: at least one key/value head a rank."""
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    assert groups is not None and width is not None
    num_shards = pg_collection.tp.size()
    counts = [heads // num_shards, *[groups // num_shards] * 2]
    return HeadExchange(pg_collection.cp, [(count, width) for count in counts])


def _to_heads(exchange: HeadExchange, *query_key_value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[s,B,heads,D] each, of this rank's piece -> [S,B,local heads,D], of the whole sequence.
    COLLECTIVE under context parallelism."""
    if exchange.num_ranks == 1:
        return query_key_value
    width = query_key_value[0].shape[-1]
    packed_SBF = exchange.to_heads(*(x.flatten(2) for x in query_key_value))
    return tuple(x.unflatten(-1, (-1, width)) for x in packed_SBF.split(exchange.widths, dim=-1))


def kv_cache_of(
    layer_number: int, batch: DecodeBatch, num_heads: int, like: torch.Tensor
) -> KVCache:
    """This layer's cache, created empty on first use. `like` gives the dtype and device, and its
    last dimension is the head dimension."""
    caches = batch.states.attention
    if layer_number not in caches:
        caches[layer_number] = KVCache(len(batch.counts), num_heads, like.shape[-1], like)
    return caches[layer_number]


def _attend_to_cache(
    layer_number: int,
    query_T1HD: torch.Tensor,
    key_T1GD: torch.Tensor,
    value_T1GD: torch.Tensor,
    batch: DecodeBatch,
) -> torch.Tensor:
    """Attention of new tokens over this layer's cache: -> [T,1,H*D]."""
    cache = kv_cache_of(layer_number, batch, key_T1GD.shape[2], key_T1GD)
    return cached_attention(query_T1HD, key_T1GD, value_T1GD, cache, batch)


class CoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(D)) V per document: `causal_attention` on a CPU, torch's fused kernel on
    a GPU.

    Each document is computed separately. The isolation is exact, and no S x S mask is needed, which
    would not fit for a long context.
    """

    _attend_documents = staticmethod(_by_document)

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        assert not config.attention_dropout, "Nemotron 3 trains without dropout"
        assert pg_collection is not None
        self.exchange = _head_exchange(config, pg_collection)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S,B,H,D], key and value [S,B,G,D] -> [S,B,H*D]; S is this rank's piece under
        context parallelism. `attention_mask` and the other unused arguments are Megatron's."""
        if isinstance(packed_seq_params, DecodeBatch):
            return _attend_to_cache(self.layer_number, query, key, value, packed_seq_params)
        whole = _to_heads(self.exchange, query, key, value)
        q_BSHD, k_BSGD, v_BSGD = (x.transpose(0, 1) for x in whole)
        if isinstance(packed_seq_params, PackedDocuments) and packed_seq_params.boundaries:
            output_BSHD = self._attend_documents(q_BSHD, k_BSGD, v_BSGD, packed_seq_params)
        else:
            output_BSHD = _causal(q_BSHD, k_BSGD, v_BSGD)
        output_SBI = output_BSHD.transpose(0, 1).flatten(2)
        return self.exchange.to_tokens(output_SBI) if self.exchange.num_ranks > 1 else output_SBI


class VariableLengthAttention(CoreAttention):
    """The same with one kernel for all packed documents (`plan.switches` says where it exists)."""

    _attend_documents = staticmethod(_in_one_kernel)


class TransformerEngineAttention(MegatronModule):
    """The same by Transformer Engine's variable-length kernel.

    Written but not run: no GPU with Transformer Engine was available.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__(config)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.exchange = _head_exchange(config, pg_collection)
        self.layer_number: int = kwargs["layer_number"]
        # The kernel gets whole sequences, so its own context parallelism is off, and its head
        # counts are those of a rank after the exchange.
        kernel_config = copy.copy(config)
        num_shards = pg_collection.tp.size()
        heads, groups, _ = (width // config.kv_channels for width in self.exchange.widths)
        kernel_config.num_attention_heads = heads * num_shards
        kernel_config.num_query_groups = groups * num_shards
        kernel_config.context_parallel_size = 1
        self.kernel = TEDotProductAttention(kernel_config, pg_collection=pg_collection, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [S,B,H,D], key and value [S,B,G,D] -> [S,B,H*D]; S is this rank's piece under
        context parallelism."""
        if isinstance(packed_seq_params, DecodeBatch):
            return _attend_to_cache(self.layer_number, query, key, value, packed_seq_params)
        assert attn_mask_type is not None
        whole = _to_heads(self.exchange, query, key, value)
        output_SBI = self._attend(whole, attention_mask, attn_mask_type, packed_seq_params)
        return self.exchange.to_tokens(output_SBI) if self.exchange.num_ranks > 1 else output_SBI

    def _attend(
        self,
        query_key_value: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams | None,
    ) -> torch.Tensor:
        """The kernel over whole rows, or over all documents of all rows as one "thd" sequence."""
        if not isinstance(packed_seq_params, PackedDocuments):
            return self.kernel(*query_key_value, attention_mask, attn_mask_type)
        num_tokens, num_rows = query_key_value[0].shape[:2]
        flat = [x.transpose(0, 1).flatten(0, 1) for x in query_key_value]
        lengths = packed_seq_params.cumulative_lengths
        output = self.kernel(
            *flat,
            attention_mask,
            AttnMaskType.padding_causal,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=lengths,
                cu_seqlens_kv=lengths,
                max_seqlen_q=packed_seq_params.longest,
                max_seqlen_kv=packed_seq_params.longest,
            ),
        )
        return output.view(num_rows, num_tokens, -1).transpose(0, 1)
