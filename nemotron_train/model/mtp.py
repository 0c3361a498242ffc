"""Multi-token prediction: one physical block applied once a depth with shared weights
(arXiv 2604.12374, section 2.1.2), over Megatron's `MultiTokenPredictionLayer`.

Depth k at position i combines the previous depth's hidden state with the embedding of token i+k
and predicts token i+k+1. Owns: which targets count. Does not own: the weights of the losses
(`train.train_step`).

Shapes: B rows, S tokens a row, V vocabulary of this rank.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

from nemotron_train.model.context import piece


def shift_left(x_BS: torch.Tensor) -> torch.Tensor:
    """x[:, i] becomes x[:, i+1]; the last column becomes 0."""
    shifted = torch.zeros_like(x_BS)
    shifted[:, :-1] = x_BS[:, 1:]
    return shifted


def depth_mask[Array: (torch.Tensor, np.ndarray)](
    loss_mask_BS: Array, document_ids_BS: Array, depth: int
) -> Array:
    """Mask of the targets that count at `depth`: token i+depth+1 exists, counts in the loss mask,
    and lies in the document of position i.

    Depth 0 is the main head and returns `loss_mask_BS` itself. Accepts torch tensors and NumPy
    arrays, so that the data loader can count targets before the forward pass.
    """
    if depth == 0:
        return loss_mask_BS
    mask = loss_mask_BS * 0
    same_document = document_ids_BS[:, depth:] == document_ids_BS[:, :-depth]
    mask[:, :-depth] = loss_mask_BS[:, depth:] * same_document
    return mask


class MtpLayer(MultiTokenPredictionLayer):
    """Megatron's block; tokens are shifted within rows, also across document boundaries.

    A position whose next token lies in another document gets that token's embedding. This is
    harmless: it can only affect later positions of its own document, and none of their targets
    counts at this depth either.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        # UPSTREAM(megatron-core 0.19.2): HybridStack does not mark the MoE layers of this block as
        # MTP layers, and the load-balance loss of a repeated block then counts once a depth.
        for module in self.modules():
            if isinstance(module, Router):
                module.is_mtp_layer = True

    def _get_embeddings(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        embedding: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple:
        """Shift the tokens by one and embed them, as upstream, without positions. Every
        context-parallel rank has the ids of whole rows, so the shift needs no communication."""
        input_ids = shift_left(input_ids)
        return (
            input_ids,
            position_ids,
            padding_mask,
            embedding(input_ids=piece(input_ids, self.cp_group), position_ids=None),
            hidden_states,
        )
