"""Megatron's MoE layer with a shorter path for decode batches.

Owns: norm -> MoE -> residual of a decode batch, through the modules or, for a few tokens, in one C
kernel. Does not own: the rest of the layer; training runs Megatron's own forward
(`model.mamba.block` explains why decoding does not).
"""

import functools
from typing import Any, cast

from megatron.core.transformer.transformer_layer import MoETransformerLayer
from torch import Tensor

from nemotron_train.kernels import decoding as decoding_kernels
from nemotron_train.kernels.decoding import MoEWeights, ResidualStream
from nemotron_train.model.decode_state import DecodeBatch
from nemotron_train.model.linears import are_plain
from nemotron_train.model.moe.layer import LatentMoELayer


class MoEBlock(MoETransformerLayer):
    """The layer behind an `E`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] -> the layer's output, same shape, and no context."""
        batch = kwargs.get("packed_seq_params")
        if not isinstance(batch, DecodeBatch):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportReturnType]
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        norm, moe = layer.pre_mlp_layernorm, layer.mlp
        is_compiled = decoding_kernels.accepts_tokens(batch.num_tokens, hidden, norm.weight)
        if is_compiled and self._compiles:
            return compiled_moe(hidden, norm, moe, self._kernel_weights()), None
        out, _ = moe(norm(hidden))
        return hidden + out, None

    @functools.cached_property
    def _compiles(self) -> bool:
        """Whether the C kernel can compute this layer."""
        layer = cast(Any, self)
        norm, moe = layer.pre_mlp_layernorm, layer.mlp
        # `all_here` also means that the experts are GroupedExperts.
        if not (isinstance(moe, LatentMoELayer) and moe.all_here):
            return False
        linears = [*(_shared(moe) or ()), *(_latent(moe) or ())]
        if not (are_plain(norm, *linears) and cast(Any, moe.experts).only_products):
            return False
        has_bias = cast(Any, moe.router).expert_bias is not None
        return has_bias and self._kernel_weights().are_accepted(norm.weight)

    def _kernel_weights(self) -> MoEWeights:
        """The weights the kernel reads. Collected at each call, since a tensor may be replaced."""
        moe = cast(Any, self).mlp
        return MoEWeights(
            moe.router.weight,
            moe.router.expert_bias,
            moe.experts.linear_fc1.weight,
            moe.experts.linear_fc2.weight,
            shared=_weights_of(_shared(moe)),
            latent=_weights_of(_latent(moe)),
        )


def _shared(moe: Any) -> tuple[Any, Any] | None:
    """The shared expert's two linears; None without a shared expert."""
    shared = moe.shared_experts
    return None if shared is None else (shared.linear_fc1, shared.linear_fc2)


def _latent(moe: Any) -> tuple[Any, Any] | None:
    """The two latent projections; None without a latent size."""
    return (moe.fc1_latent_proj, moe.fc2_latent_proj) if moe.config.moe_latent_size else None


def _weights_of(pair: tuple[Any, Any] | None) -> tuple[Tensor, Tensor] | None:
    return None if pair is None else (pair[0].weight, pair[1].weight)


def compiled_moe(hidden_T1D: Tensor, norm: Any, moe: Any, weights: MoEWeights) -> Tensor:
    """x + moe(norm(x)), [T,1,D], by the C kernel."""
    stream = ResidualStream(hidden_T1D.contiguous(), norm.weight, norm.eps)
    scale = moe.router.config.moe_router_topk_scaling_factor or 1.0
    return decoding_kernels.moe_layer(stream, weights, top_k=moe.router.topk, scale=scale)
