"""LatentMoE (arXiv 2601.18089, eq. 1-2): router and shared expert see the full width, only
dispatch, routed experts and combine live in the latent width. Without a latent size it is
Nano's standard MoE.

Megatron's `MoELayer` supplies the order of the steps, its router the scores and the expert bias,
its dispatchers the exchange between expert-parallel ranks. Ours are the two latent projections
(they come from the spec, so a precision plan can keep them in BF16), the grouped experts and
what is measured about routing.

Shapes: S tokens of a row, B rows, T = S*B tokens, E local experts, D width the experts see
(latent or hidden), F width of one expert.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import nn

from nemotron_train.model.few_experts import are_few, few_experts
from nemotron_train.model.grouped_mlp import grouped_mlp, routed_mlp
from nemotron_train.model.linears import linear
from nemotron_train.model.sharding import mark_sharded
from nemotron_train.platform.device import parameter_device


class SigmoidRouter(TopKRouter):
    """Megatron's router with its measurements kept on the layer.

    UPSTREAM(megatron-core 0.19.2): the global metrics tracker indexes multi-token prediction's
    layers past its end for a pattern like "*E" (Megatron-LM issue 7172). Here each router adds
    its own loss to `load_balance_loss_sum`, and `train.metrics` reads the layers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.load_balance_loss_sum = torch.zeros(())

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

        The loss is weighted by this micro-batch's tokens, since gradients are divided by the
        tokens of the whole global batch in the end; a repeated multi-token-prediction block
        counts it once, not once a depth.
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
        """The choices of all tokens in compact form, where no other rank has a say.

        The same scores, choices, bias counts and sequence-wise loss as `forward`, without its
        [tokens, experts] maps: (experts [T,K] int64, probabilities [T,K] FP32).
        """
        num_tokens, num_rows = hidden_SBD.shape[:2]
        self._maintain_float32_expert_bias()
        assert self.expert_bias is not None and self.local_tokens_per_expert is not None
        logits_TE = self.gating(hidden_SBD).view(num_tokens * num_rows, -1).float()
        scores_TE = torch.sigmoid(logits_TE)
        with torch.no_grad():
            experts_TK = torch.topk(scores_TE + self.expert_bias, self.topk, dim=1).indices
        chosen_TK = torch.gather(scores_TE, 1, experts_TK)
        scale = self.config.moe_router_topk_scaling_factor or 1.0
        probabilities_TK = chosen_TK * (scale / (chosen_TK.sum(-1, keepdim=True) + 1e-20))
        if self.training and torch.is_grad_enabled():
            counts_E = torch.bincount(experts_TK.flatten(), minlength=scores_TE.shape[1])
            self.local_tokens_per_expert += counts_E
            probabilities_TK = self._with_sequence_loss(probabilities_TK, scores_TE, num_rows)
        return experts_TK, probabilities_TK

    def _with_sequence_loss(
        self, probabilities_TK: torch.Tensor, scores_TE: torch.Tensor, num_rows: int
    ) -> torch.Tensor:
        """Attach E/(K S^2) sum_e count_e sum_t share_te, the mean over rows of the Switch loss of
        each row (arXiv 2101.03961, eq. 4); shares are scores normalized over the experts."""
        coefficient = self.config.moe_aux_loss_coeff
        assert isinstance(coefficient, float)
        if not coefficient:
            return probabilities_TK
        num_experts = scores_TE.shape[1]
        shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
        shares_BE = shares_TE.view(-1, num_rows, num_experts).sum(0)
        with torch.no_grad():
            # The loss counts choices before the bias, as upstream.
            top_TK = torch.topk(scores_TE, self.topk, dim=1, sorted=False).indices
            rows_T1 = torch.arange(num_rows, device=top_TK.device).repeat(len(top_TK) // num_rows)
            cells = (rows_T1.unsqueeze(1) * num_experts + top_TK).flatten()
            counts_BE = torch.bincount(cells, minlength=shares_BE.numel()).view_as(shares_BE)
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


class ReplicatedLinear(nn.Module):
    """A linear whose weight every tensor-parallel rank holds whole: the latent projections.

    Under sequence parallelism each rank multiplies its own tokens and Megatron sums the weight
    gradient over the tensor-parallel group.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **unused: Any
    ) -> None:
        super().__init__()
        device = parameter_device(config.use_cpu_initialization)
        self.weight = nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., input_size] -> [..., output_size]; no bias, as Megatron's linears answer."""
        return linear(x, self.weight), None


class ExpertWeights(nn.Module):
    """One weight matrix of every local expert, stacked: [E, out, in]."""

    def __init__(self, shape: tuple[int, int, int], sharded_dim: int, config: TransformerConfig):
        super().__init__()
        device = parameter_device(config.use_cpu_initialization)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        mark_sharded(self.weight, dim=sharded_dim)
        self.weight.is_expert = True  # type: ignore[attr-defined]
        # False sends the gradient to the expert-data-parallel group.
        self.weight.allreduce = (  # type: ignore[attr-defined]
            config.expert_model_parallel_size == 1
            and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        )


class GroupedExperts(MegatronModule):
    """All local experts as grouped products: y = W2 (p * relu(W1 x)^2), p the routing weight."""

    only_products = True  # their inputs and weights go into the products as they are

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        input_size: int,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        assert config.moe_ffn_hidden_size is not None
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        self.linear_fc1 = ExpertWeights((num_local_experts, width, input_size), 1, config)
        self.linear_fc2 = ExpertWeights((num_local_experts, input_size, width), 2, config)

    def forward(
        self,
        tokens_TD: torch.Tensor,
        tokens_per_expert_E: torch.Tensor,
        probabilities_T: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """tokens_TD sorted by expert -> [T,D]; partial sums under expert tensor parallelism."""
        output_TD = grouped_mlp(
            tokens_TD,
            tokens_per_expert_E,
            self.linear_fc1.weight,
            self.linear_fc2.weight,
            probabilities_T,
        )
        return output_TD, None

    def routed(
        self, tokens_TD: torch.Tensor, experts_TK: torch.Tensor, probabilities_TK: torch.Tensor
    ) -> torch.Tensor:
        """Sum over each token's experts, all of them here: [T,D], without an exchange."""
        weights = self.linear_fc1.weight, self.linear_fc2.weight
        if are_few(tokens_TD, experts_TK):
            return few_experts(tokens_TD, experts_TK, probabilities_TK, *weights)
        output_TD, _ = routed_mlp(tokens_TD, experts_TK, probabilities_TK, *weights)
        return output_TD

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Stored as one [all experts, out, in] tensor a matrix: any expert-parallel size loads."""
        ensure_metadata_has_dp_cp_group(metadata)
        sharded: ShardedStateDict = {}
        offset_axis = len(sharded_offsets)
        for name, module in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            weight = module.weight
            key = f"{prefix}{name}.weight"
            dim: int = weight.partition_dim  # type: ignore[attr-defined]
            sharded[key] = ShardedTensor.from_rank_offsets(
                key,
                weight,
                *sharded_offsets,
                (offset_axis, self.ep_group.rank(), self.ep_group.size()),
                (offset_axis + dim, self.tp_group.rank(), self.tp_group.size()),
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=offset_axis,
            )
        return sharded


@dataclass
class LatentMoESubmodules(MoESubmodules):
    """Megatron's MoE submodules and the two latent projections."""

    latent_projection: ModuleSpec | type = ReplicatedLinear


class LatentMoELayer(MoELayer):
    """Megatron's MoE layer with the latent projections of the spec.

    UPSTREAM(megatron-core 0.19.2): `MoELayer` builds the projections itself and only from
    Transformer Engine; it is shown a configuration without a latent size while it builds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentMoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        without_latent = copy.copy(config)
        without_latent.moe_latent_size = None
        super().__init__(
            without_latent, submodules, layer_number, pg_collection, is_mtp_layer, name
        )
        self.config = config
        if config.moe_latent_size:
            for projection_name, sizes, init_method in (
                (
                    "fc1_latent_proj",
                    (config.hidden_size, config.moe_latent_size),
                    config.init_method,
                ),
                (
                    "fc2_latent_proj",
                    (config.moe_latent_size, config.hidden_size),
                    config.output_layer_init_method,
                ),
            ):
                projection = build_module(
                    submodules.latent_projection,
                    *sizes,
                    parallel_mode="duplicated",
                    config=config,
                    init_method=init_method,
                    bias=False,
                    skip_bias_add=False,
                    skip_weight_param_allocation=False,
                    is_expert=False,
                    name=f"{name}.{projection_name}" if name else None,
                )
                assert isinstance(projection, nn.Module)
                self.add_module(projection_name, projection)
        assert pg_collection is not None
        alone = (pg_collection.ep, pg_collection.expt_tp, pg_collection.tp_cp)
        straight = isinstance(self.experts, GroupedExperts) and not self.moe_layer_recompute
        self.all_here = straight and all(group.size() == 1 for group in alone)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S,B,hidden] -> the same. With every expert on this rank, straight through; otherwise
        through Megatron's dispatcher. tests/distributed holds the two against each other."""
        if not self.all_here or intermediate_tensors is not None or padding_mask is not None:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        assert isinstance(self.router, SigmoidRouter)
        assert isinstance(self.experts, GroupedExperts)
        shared_SBD = self.shared_experts_compute(hidden_states)
        experts_TK, probabilities_TK = self.router.route_here(hidden_states)
        latent = hidden_states
        if self.config.moe_latent_size:
            latent, _ = self.fc1_latent_proj(hidden_states)
        routed = self.experts.routed(latent.flatten(0, 1), experts_TK, probabilities_TK)
        output_SBD = routed.view(*hidden_states.shape[:2], -1)
        if self.config.moe_latent_size:
            output_SBD, _ = self.fc2_latent_proj(output_SBD)
        return (output_SBD if shared_SBD is None else output_SBD + shared_SBD), None


def shared_expert_submodules(column_parallel: type, row_parallel: type) -> MLPSubmodules:
    """The shared expert's two linears, at full width."""
    return MLPSubmodules(linear_fc1=column_parallel, linear_fc2=row_parallel)
