"""The model: Megatron's `HybridModel` with our forward pass.

It differs from upstream's only in what pretraining needs: documents packed in a row, separate
losses for the main head and each multi-token-prediction depth, and FP32 accumulation of the output
layer's weight gradient over all its uses.

Shapes: B rows, S tokens a row, V vocabulary of this tensor-parallel rank. Under context
parallelism the inputs [B,S] are whole rows on every rank; hidden states and losses cover this
rank's piece (`model.context`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from nemotron_train.model.context import piece
from nemotron_train.model.cross_entropy import vocab_parallel_cross_entropy
from nemotron_train.model.decode_state import DecodeBatch
from nemotron_train.model.documents import PackedDocuments
from nemotron_train.model.linears import linear
from nemotron_train.model.mtp import depth_mask, shift_left

TokenLoss = Callable[[torch.Tensor], torch.Tensor]  # [S,B] -> [S,B]


class NemotronStack(HybridStack):
    """`HybridStack` whose final norm is the spec's.

    UPSTREAM(megatron-core 0.19.2): the stack always builds its final norm from Transformer Engine,
    which fails if it is not installed.
    """

    def __init__(self, *args: Any, final_norm: type, **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = final_norm(
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )


class _AccumulateInMainGrad(torch.autograd.Function):
    """Identity on a weight. Each use adds its gradient to `weight.main_grad` (FP32).

    Autograd would first sum the gradients of all uses in the weight's dtype. In BF16 the small
    contribution of a multi-token-prediction depth is then lost next to the main head's. Nemotron 3
    Ultra diverged because of that (arXiv 2606.15007, section 2.7).
    """

    @staticmethod
    def forward(ctx: object, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight  # type: ignore[attr-defined]
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor | None:
        weight = ctx.weight  # type: ignore[attr-defined]
        weight.main_grad.add_(grads[0])
        weight.grad_added_to_main_grad = True  # Megatron's DDP then does not add it again
        # Megatron's overlapped reduction needs some gradient to trigger its hook, and ignores it.
        return weight.new_zeros(()).expand_as(weight) if weight.shows_gradient else None


# Transformer Engine's pickled extra state of a module, or of one expert of a grouped linear.
_ENGINE_STATE = re.compile(r"\._extra_state\d*$")


class NemotronModel(HybridModel):
    """Hybrid Mamba-2 / attention / LatentMoE language model with multi-token prediction.

    detaches_mtp: the losses of multi-token prediction train its block alone, not the decoder,
    embedding and output layer.

    Checkpoints contain parameters and buffers only. The extra state that Transformer Engine would
    add is a pickled recipe: the precision plan has the same content, and block scales have no
    history to save.
    """

    detaches_mtp = False

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded state dict without Transformer Engine's extra states."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in sharded.items() if not _ENGINE_STATE.search(key)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's `load_state_dict`, but Transformer Engine's extra states may be missing. Raises
        RuntimeError if `strict` and other keys are missing or unexpected."""
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in missing if not _ENGINE_STATE.search(key)]
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing {missing}, unexpected {unexpected} in the model's state")
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _output_logits(
        self, hidden_SBD: torch.Tensor, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [S,B,V]. weight: of the output layer, in place of its own."""
        if weight is not None:
            return self.output_layer(hidden_SBD, weight=weight)[0]
        weight = self.output_layer.weight
        assert weight is not None
        # With apex the layer adds to `main_grad` itself, at the end of the product.
        adds_gradients = self.output_layer.gradient_accumulation_fusion
        is_summed = weight.dtype != torch.float32 and hasattr(weight, "main_grad")
        if is_summed and not adds_gradients:
            weight = _AccumulateInMainGrad.apply(weight)
        logits_SBV, _ = self.output_layer(hidden_SBD, weight=weight)
        return logits_SBV

    def forward(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor | None = None,
        loss_mask_BS: torch.Tensor | None = None,
        document_ids_BS: torch.Tensor | PackedDocuments | None = None,
        token_loss: TokenLoss | None = None,
        with_mtp: bool = True,
        unknown_V: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Losses of one micro-batch, or logits.

        document_ids_BS: the ids, or the documents with the ids in host memory too, which spares a
        GPU's host a wait. token_loss: from the main head's negative log-likelihoods [S,B] of this
        rank's piece to the losses to be summed, in place of the product with the loss mask; the
        mask then only says what the depths of multi-token prediction are trained on. with_mtp:
        compute the losses of the depths, too. unknown_V: ids that get no probability from the main
        head, bool [V]; for a sampler that never draws them.

        On the last pipeline stage it returns, with labels, the loss sums over the targets that
        count, FP32 [1 + depths] (main head first); without labels, logits [B,S,V]. On other stages
        it returns the hidden states [S,B,hidden] for the next stage. Under context parallelism the
        results cover this rank's piece of the sequence.
        """
        cp_group = self.pg_collection.cp
        documents = document_ids_BS
        if isinstance(document_ids_BS, torch.Tensor):
            documents = PackedDocuments.of(document_ids_BS)
        assert documents is None or isinstance(documents, PackedDocuments)
        hidden = self.embedding(piece(tokens_BS, cp_group), None) if self.pre_process else None
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=documents)
        if not self.post_process:
            return hidden
        if labels_BS is None:
            return self._output_logits(hidden).transpose(0, 1)
        assert loss_mask_BS is not None and documents is not None
        weigh = token_loss or _masked(piece(loss_mask_BS, cp_group))
        sums = [self._loss_sum(hidden, labels_BS, weigh, unknown_V=unknown_V)]
        if self.mtp_process and with_mtp:
            sums += self._mtp_loss_sums(hidden, tokens_BS, labels_BS, loss_mask_BS, documents)
        return torch.stack(sums)

    def decode(self, tokens_T: torch.Tensor, new: DecodeBatch) -> torch.Tensor:
        """Hidden states [T,1,hidden] of new tokens, after the final norm; updates the states of the
        decode batch `new`. COLLECTIVE under tensor and expert parallelism; one pipeline stage."""
        if self._goes_straight(tokens_T):
            hidden = _through_layers(self.decoder, self._embed(tokens_T), new)
            return self.decoder.final_norm(hidden)
        hidden = self.embedding(tokens_T.unsqueeze(0), None)
        return self.decoder(hidden, attention_mask=None, packed_seq_params=new)

    def decode_depth(
        self, hidden_T1D: torch.Tensor, tokens_T: torch.Tensor, new: DecodeBatch
    ) -> torch.Tensor:
        """The multi-token-prediction block at depth k: hidden states of depth k-1 at positions i,
        [T,1,hidden], and tokens i+k -> hidden states of depth k, [T,1,hidden]. `new` belongs to the
        states of that depth."""
        block: Any = self.mtp.layers[0]
        if self._goes_straight(tokens_T):
            both = block.enorm(self._embed(tokens_T)), block.hnorm(hidden_T1D)
            joined, _ = block.eh_proj(torch.cat(both, dim=-1))
            return block.final_layernorm(_through_layers(block.mtp_model_layer, joined, new))
        return block.forward_single_position(
            hidden_states=hidden_T1D,
            next_token_ids=tokens_T.unsqueeze(0),
            position_ids=None,
            embedding=self.embedding,
            packed_seq_params=new,
        )

    def logits(self, hidden_T1D: torch.Tensor) -> torch.Tensor:
        """FP32 logits [T, whole vocabulary] from the hidden states of any head. The product has the
        precision that training uses. COLLECTIVE."""
        if self._goes_straight(hidden_T1D):
            weight = self.output_layer.weight
            assert weight is not None
            return linear(hidden_T1D, weight)[:, 0].float()
        logits_T1V, _ = self.output_layer(hidden_T1D, runtime_gather_output=True)
        return logits_T1V[:, 0].float()

    def _goes_straight(self, tokens: torch.Tensor) -> bool:
        """Whether decoding may call the layers directly, without Megatron's code between them: one
        tensor-parallel rank (the vocabulary is whole) and a CPU (no Transformer Engine context)."""
        return self.pg_collection.tp.size() == 1 and not tokens.is_cuda

    def _embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_T, self.embedding.word_embeddings.weight).unsqueeze(1)

    def _loss_sum(
        self,
        hidden_SBD: torch.Tensor,
        labels_BS: torch.Tensor,
        token_loss: TokenLoss,
        weight: torch.Tensor | None = None,
        unknown_V: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The sum of the losses over this rank's piece. Labels are whole rows."""
        labels_BS = piece(labels_BS, self.pg_collection.cp)
        logits_SBV = self._output_logits(hidden_SBD, weight)
        if unknown_V is not None:
            logits_SBV = logits_SBV.masked_fill(unknown_V, float("-inf"))
        loss_SB = vocab_parallel_cross_entropy(logits_SBV, labels_BS.t(), self.pg_collection.tp)
        return token_loss(loss_SB).sum()

    def _mtp_loss_sums(
        self,
        hidden_SBD: torch.Tensor,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        loss_mask_BS: torch.Tensor,
        documents: PackedDocuments,
    ) -> list[torch.Tensor]:
        """One loss sum a depth. Each depth starts from the hidden states of the previous one."""
        block, depths = self.mtp.layers[0], self.config.mtp_num_layers or 0
        embedding, weight = self.embedding, None
        if self.detaches_mtp:
            assert self.output_layer.weight is not None
            hidden_SBD, weight = hidden_SBD.detach(), self.output_layer.weight.detach()
            embedding = _detached(self.embedding)
        sums = []
        for depth in range(1, depths + 1):
            hidden_SBD, tokens_BS, _, _ = block(
                input_ids=tokens_BS,
                position_ids=None,
                hidden_states=hidden_SBD,
                attention_mask=None,
                packed_seq_params=documents,
                embedding=embedding,
            )
            labels_BS = shift_left(labels_BS)
            mask_BS = depth_mask(loss_mask_BS, documents.ids_BS, depth)
            weigh = _masked(piece(mask_BS, self.pg_collection.cp))
            sums.append(self._loss_sum(hidden_SBD, labels_BS, weigh, weight))
        return sums


def _masked(mask_BS: torch.Tensor) -> TokenLoss:
    return lambda nll_SB: nll_SB * mask_BS.t()


def _detached(embedding: Any) -> Callable[..., torch.Tensor]:
    return lambda **arguments: embedding(**arguments).detach()


def _through_layers(stack: Any, hidden_T1D: torch.Tensor, new: DecodeBatch) -> torch.Tensor:
    """Call the layers of a stack one after the other. Attention and MoE layers return a tuple."""
    for layer in stack.layers:
        output = layer(hidden_states=hidden_T1D, attention_mask=None, packed_seq_params=new)
        hidden_T1D = output[0] if isinstance(output, tuple) else output
    return hidden_T1D


def stack_spec(submodules: object, final_norm: type) -> ModuleSpec:
    """The decoder's spec: `NemotronStack` with these submodules and final norm."""
    return ModuleSpec(
        module=NemotronStack, params={"final_norm": final_norm}, submodules=submodules
    )


__all__ = ["NemotronModel", "NemotronStack", "ProcessGroupCollection", "stack_spec"]
