"""Megatron's layers, with short ways for the new tokens of generation.

Owns: those ways, norm -> mixer -> residual, through the modules or, for a few tokens, in one
compiled pass. Does not own: anything else about the layers; in training they are Megatron's own.

Megatron's layer looks at a dozen switches around each of these steps: nothing beside a training
pass, and more than the layer itself beside one token.
"""

import functools
from typing import Any, cast

from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import Tensor

from nemotron_train.model import compiled_decoding
from nemotron_train.model.attention import cache_of
from nemotron_train.model.decode_state import NewTokens
from nemotron_train.model.latent_moe import LatentMoELayer, ReplicatedLinear
from nemotron_train.model.linears import ColumnLinear, RowLinear, is_alone
from nemotron_train.model.norm import RMSNorm


def _are_plain(norm: Any, *linears: Any) -> bool:
    """Nothing but products, and no other rank's share of them."""
    if not isinstance(norm, RMSNorm):
        return False
    shared_out = [linear for linear in linears if type(linear) is not ReplicatedLinear]
    return all(type(one) in (ColumnLinear, RowLinear) and is_alone(one) for one in shared_out)


class MambaBlock(MambaLayer):
    """The layer behind an `M`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [S,B,hidden] -> the same."""
        new = kwargs.get("packed_seq_params")
        if not isinstance(new, NewTokens):
            return super().forward(*args, **kwargs)
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        if self._compiles and compiled_decoding.takes_tokens(new, hidden, layer.norm):
            state = layer.mixer.state_of(new, hidden)
            return compiled_decoding.mamba_layer(hidden, layer.norm, layer.mixer, state, new)
        out, _ = layer.mixer(layer.norm(hidden), packed_seq_params=new)
        return hidden + out

    @functools.cached_property
    def _compiles(self) -> bool:
        layer = cast(Any, self)
        is_plain = _are_plain(layer.norm, layer.mixer.in_proj, layer.mixer.out_proj)
        return is_plain and compiled_decoding.takes_mamba(layer.norm, layer.mixer)


class AttentionBlock(TransformerLayer):
    """The layer behind a `*`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] -> the same, and no context."""
        new = kwargs.get("packed_seq_params")
        if not isinstance(new, NewTokens):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportReturnType]
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        norm, attention = layer.input_layernorm, layer.self_attention
        if self._compiles and compiled_decoding.takes_tokens(new, hidden, norm):
            groups, width = attention.num_query_groups_per_partition, attention.config.kv_channels
            like = hidden.new_empty(0, width)
            cache = cache_of(attention.core_attention.layer_number, new, groups, like)
            out = compiled_decoding.attention_layer(hidden, norm, attention, cache, new)
            return out, None
        query, key, value = attention.get_query_key_value_tensors(norm(hidden))
        mixed = attention.core_attention(query, key, value, None, packed_seq_params=new)
        out, _ = attention.linear_proj(mixed)
        return hidden + out, None

    @functools.cached_property
    def _compiles(self) -> bool:
        layer = cast(Any, self)
        norm, attention = layer.input_layernorm, layer.self_attention
        is_plain = _are_plain(norm, attention.linear_qkv, attention.linear_proj)
        return is_plain and compiled_decoding.takes_attention(norm, attention)


class MoEBlock(MoETransformerLayer):
    """The layer behind an `E`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] -> the same, and no context."""
        new = kwargs.get("packed_seq_params")
        if not isinstance(new, NewTokens):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportReturnType]
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        norm, moe = layer.pre_mlp_layernorm, layer.mlp
        if self._compiles and compiled_decoding.takes_tokens(new, hidden, norm):
            return compiled_decoding.moe_layer(hidden, norm, moe), None
        out, _ = moe(norm(hidden))
        return hidden + out, None

    @functools.cached_property
    def _compiles(self) -> bool:
        layer = cast(Any, self)
        norm, moe = layer.pre_mlp_layernorm, layer.mlp
        if not (isinstance(moe, LatentMoELayer) and moe.all_here):  # all_here: GroupedExperts
            return False
        shared: Any = moe.shared_experts
        linears: list[Any] = []
        if shared is not None:
            linears += [shared.linear_fc1, shared.linear_fc2]
        if moe.config.moe_latent_size:
            linears += [moe.fc1_latent_proj, moe.fc2_latent_proj]
        is_plain = _are_plain(norm, *linears) and cast(Any, moe.experts).only_products
        return is_plain and compiled_decoding.takes_moe(norm, moe)
