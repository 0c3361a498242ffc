"""The router: sigmoid scores, top-k with a balancing bias, and the routing measurements.

Megatron's `TopKRouter` provides the scores and the bias update. Ours adds the measurements, and a
compact form of the choices for ranks that hold every expert.

Shapes: S tokens of a row, B rows, T = S*B tokens, E experts, K choices a token, D hidden width.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from nemotron_train.model.moe.permutation import count_values
from nemotron_train.platform.device import parameter_device


class SigmoidRouter(TopKRouter):
    """Megatron's router with its measurements stored on the module.

    UPSTREAM(megatron-core 0.19.2): the global metrics tracker indexes the layers of multi-token
    prediction past its end for a pattern like "*E" (Megatron-LM issue 7172). Here each router adds
    its own loss to `load_balance_loss_sum`, and `train.metrics` reads the layers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = parameter_device(self.config.use_cpu_initialization)
        self.load_balance_loss_sum = torch.zeros((), device=device)

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        needs_dp_avg: bool = True,
        valid_token_count: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add the loss's gradient to `activation` and its value to this layer's sum.

        The loss is multiplied by this micro-batch's tokens, since gradients are later divided by
        the tokens of the global batch. A repeated multi-token-prediction block counts the loss
        once, not once a depth.
        """
        if self.is_mtp_layer and self.config.mtp_num_layers:
            aux_loss = aux_loss / self.config.mtp_num_layers
        num_tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        weighted = aux_loss * (num_tokens * self.tp_cp_group.size())
        self.load_balance_loss_sum = (
            self.load_balance_loss_sum.to(weighted.device) + weighted.detach() / aux_loss_coeff
        )
        return MoEAuxLossAutoScaler.apply(activation, weighted)

    def route_here(self, hidden_SBD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route all tokens on a rank that holds every expert: (experts [T,K] int64, probabilities
        [T,K] FP32).

        The same scores, choices, counts for the bias and sequence-wise loss as `forward`, without
        its [tokens, experts] maps.
        """
        num_tokens, num_rows = hidden_SBD.shape[:2]
        self._maintain_float32_expert_bias()
        assert self.expert_bias is not None and self.local_tokens_per_expert is not None
        logits_TE = self.gating(hidden_SBD).view(num_tokens * num_rows, -1).float()
        scores_TE = torch.sigmoid(logits_TE)
        with torch.no_grad():
            # The bias affects the choice only; the probabilities below use the scores without it.
            experts_TK = torch.topk(scores_TE + self.expert_bias, self.topk, dim=1).indices
        chosen_TK = torch.gather(scores_TE, 1, experts_TK)
        scale = self.config.moe_router_topk_scaling_factor or 1.0
        probabilities_TK = chosen_TK * (scale / (chosen_TK.sum(-1, keepdim=True) + 1e-20))
        if self.training and torch.is_grad_enabled():
            counts_E = count_values(experts_TK, scores_TE.shape[1])
            self.local_tokens_per_expert += counts_E
            probabilities_TK = self._with_sequence_loss(probabilities_TK, scores_TE, num_rows)
        return experts_TK, probabilities_TK

    def _with_sequence_loss(
        self, probabilities_TK: torch.Tensor, scores_TE: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """Attach the load-balance loss to the probabilities: E/(K S^2) sum_e count_e sum_t share_te
        for each row (the Switch loss, arXiv 2101.03961, eq. 4), averaged over rows. Shares are
        scores normalized over the experts."""
        coefficient = self.config.moe_aux_loss_coeff
        assert isinstance(coefficient, float)
        if not coefficient:
            return probabilities_TK
        num_experts = scores_TE.shape[1]
        shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        shares_BE = shares_TE.view(-1, num_rows, num_experts).sum(0)
        with torch.no_grad():
            # The loss counts the choices without the bias, as upstream does.
            top_TK = torch.topk(scores_TE, self.topk, dim=1, sorted=False).indices
            rows_T1 = torch.arange(num_rows, device=top_TK.device).repeat(len(top_TK) // num_rows)
            # One histogram over (row, expert) pairs.
            cells = (rows_T1.unsqueeze(1) * num_experts + top_TK).flatten()
            counts_BE = count_values(cells, shares_BE.numel()).view_as(shares_BE)
        length = scores_TE.shape[0] // num_rows
        scale = coefficient * num_experts / (self.topk * length * length * num_rows)
        return self.attach_and_log_load_balancing_loss(
            probabilities_TK,
            coefficient,
            (shares_BE * counts_BE).sum() * scale,
            "seq_load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=scores_TE.shape[0],
        )
