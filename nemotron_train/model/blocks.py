"""Megatron's attention and MoE layers, with a short way for the new tokens of generation.

Owns: that way, norm -> mixer -> residual. Does not own: anything else about them; in training they
are Megatron's own.

Megatron's layer looks at a dozen switches around each of these steps: nothing beside a training
pass, and more than the experts themselves beside one token.
"""

from typing import Any, cast

from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import Tensor

from nemotron_train.model.decode_state import NewTokens


class AttentionBlock(TransformerLayer):
    """The layer behind a `*`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] -> the same, and no context."""
        new = kwargs.get("packed_seq_params")
        if not isinstance(new, NewTokens):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportReturnType]
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        normed = layer.input_layernorm(hidden)
        out, _ = layer.self_attention(normed, attention_mask=None, packed_seq_params=new)
        return hidden + out, None


class MoEBlock(MoETransformerLayer):
    """The layer behind an `E`."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [S,B,hidden] -> the same, and no context."""
        if not isinstance(kwargs.get("packed_seq_params"), NewTokens):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportReturnType]
        layer, hidden = cast(Any, self), kwargs["hidden_states"]
        out, _ = layer.mlp(layer.pre_mlp_layernorm(hidden))
        return hidden + out, None
