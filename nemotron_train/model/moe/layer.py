"""LatentMoE (arXiv 2601.18089, eq. 1-2): router and shared expert use the full width; only
dispatch, routed experts and combine use the latent width. Without a latent size it is the standard
MoE of Nemotron 3 Nano.

Megatron's `MoELayer` provides the order of the steps, its router the scores and the expert bias,
its dispatchers the exchange between expert-parallel ranks. Ours are the two latent projections
(taken from the spec, so that a precision plan can keep them in BF16), the grouped experts and the
routing measurements.

Shapes: S tokens of a row, B rows, T = S*B tokens, E local experts, D width the experts see
(latent or hidden), F width of one expert.
"""

import copy
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemotron_train.model.linears import ReplicatedLinear
from nemotron_train.model.moe.experts import GroupedExperts
from nemotron_train.model.moe.router import SigmoidRouter


@dataclass
class LatentMoESubmodules(MoESubmodules):
    """Megatron's MoE submodules, and the class of the two latent projections."""

    latent_projection: ModuleSpec | type = ReplicatedLinear


class LatentMoELayer(MoELayer):
    """Megatron's MoE layer with the latent projections of the spec.

    UPSTREAM(megatron-core 0.19.2): `MoELayer` builds the projections itself, and only from
    Transformer Engine. Its constructor therefore gets a configuration without a latent size.
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
        groups = (pg_collection.ep, pg_collection.expt_tp, pg_collection.tp_cp)
        is_plain = isinstance(self.experts, GroupedExperts) and not self.moe_layer_recompute
        # Every expert is on this rank: no dispatcher is needed.
        self.all_here = is_plain and all(group.size() == 1 for group in groups)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S,B,hidden] -> the same shape, and no bias. If every expert is on this rank, without a
        dispatcher; otherwise Megatron's forward. tests/distributed compares the two."""
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
    """The submodules of the shared expert: two linears at full width."""
    return MLPSubmodules(linear_fc1=column_parallel, linear_fc2=row_parallel)
