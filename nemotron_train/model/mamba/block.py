"""Megatron's Mamba layer with a shorter path for decode batches.

Owns: norm -> mixer -> residual of a decode batch, through the modules or, for a few tokens, in one
C kernel. Does not own: the rest of the layer; training runs Megatron's own forward.

Megatron's layer checks a dozen switches around each of these steps. Their cost is nothing compared
to a training step, but more than the layer itself for one token.
"""

import functools
from typing import Any, cast

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor

from nemotron_train.kernels import decoding as decoding_kernels
from nemotron_train.kernels.decoding import MambaWeights, ResidualStream
from nemotron_train.model.decode_state import DecodeBatch, MambaState
from nemotron_train.model.linears import are_plain


class MambaBlock(MambaLayer):
    """The layer behind an `M`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [S,B,hidden] -> the layer's output, same shape."""
        batch = kwargs.get("packed_seq_params")
        if not isinstance(batch, DecodeBatch):
            return super().forward(*args, **kwargs)
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        weight = getattr(layer.norm, "weight", None)  # None: the norm is part of in_proj
        is_compiled = decoding_kernels.accepts_tokens(batch.num_tokens, hidden, weight)
        if is_compiled and self._compiles:
            return compiled_mamba(hidden, layer.norm, layer.mixer, self._kernel_weights(), batch)
        out, _ = layer.mixer(layer.norm(hidden), packed_seq_params=batch)
        return hidden + out

    @functools.cached_property
    def _compiles(self) -> bool:
        """Whether the C kernel can compute this layer."""
        layer = cast(Any, self)
        norm, mixer = layer.norm, layer.mixer
        is_plain = are_plain(norm, mixer.in_proj, mixer.out_proj)
        return is_plain and self._kernel_weights().are_accepted(norm.weight)

    def _kernel_weights(self) -> MambaWeights:
        """The weights the kernel reads. Collected at each call, since a tensor may be replaced."""
        mixer = cast(Any, self).mixer
        return MambaWeights(
            mixer.in_proj.weight,
            mixer.conv_weight,
            mixer.conv_bias,
            mixer.dt_bias,
            mixer.A_log,
            mixer.D,
            mixer.norm.weight,
            mixer.out_proj.weight,
        )


def compiled_mamba(
    hidden_T1D: Tensor, norm: Any, mixer: Any, weights: MambaWeights, batch: DecodeBatch
) -> Tensor:
    """x + mixer(norm(x)), [T,1,D], by the C kernel; updates the layer's state in `batch`."""
    hidden_T1D = hidden_T1D.contiguous()
    state: MambaState = mixer.state_of(batch, hidden_T1D)
    channels, taps = weights.conv_weight_CK.shape
    num_sequences = len(batch.counts)
    inputs_BWC = hidden_T1D.new_empty(num_sequences, taps - 1 + batch.max_new, channels)
    before_BHPN = state.ssm_BHPN.contiguous()
    after = before_BHPN  # updated in place: only the last state is needed
    if batch.speculative:  # keep the state after every token
        after = torch.empty((batch.max_new, *before_BHPN.shape), dtype=torch.float32)
    mamba = mixer.mamba
    out_T1D = decoding_kernels.mamba_layer(
        ResidualStream(hidden_T1D, norm.weight, norm.eps),
        weights,
        sizes=(mixer.num_heads, mamba.head_dim, mixer.num_groups, mamba.state_size),
        dt_limits=(mamba.dt_limit_min, mamba.dt_limit_max),
        longest=batch.max_new,
        starts=batch.starts,
        window_BKC=state.window_BKC.contiguous(),
        inputs_BWC=inputs_BWC,
        ssm_before_BHPN=before_BHPN,
        ssm_after=after,
    )
    state.update_window(inputs_BWC, batch)
    state.ssm_BHPN = before_BHPN
    if batch.speculative:
        state.record_states(list(after), batch)
    return out_T1D
