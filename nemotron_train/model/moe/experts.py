"""Routed experts as a module: the weights, their sharding and storage, and the forward pass.

Owns: `GroupedExperts`, without quantization. Does not own: the arithmetic (`core`, and `decoding`
for a few tokens), Transformer Engine's grouped linears (`native`), quantized experts (`precision`).

Shapes: T tokens sorted by expert, E local experts, K choices a token, D width the experts see
(latent or hidden), F width of one expert.
"""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import nn

from nemotron_train.model.moe.core import grouped_mlp, routed_mlp
from nemotron_train.model.moe.decoding import are_few, few_experts
from nemotron_train.model.sharding import mark_sharded
from nemotron_train.platform.device import parameter_device


class ExpertWeights(nn.Module):
    """One weight matrix of every local expert, stacked: [E, out, in]."""

    def __init__(self, shape: tuple[int, int, int], sharded_dim: int, config: TransformerConfig):
        super().__init__()
        device = parameter_device(config.use_cpu_initialization)
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        mark_sharded(self.weight, dim=sharded_dim)
        self.weight.is_expert = True  # type: ignore[attr-defined]
        # False: Megatron reduces the gradient over the expert-data-parallel group.
        self.weight.allreduce = (  # type: ignore[attr-defined]
            config.expert_model_parallel_size == 1
            and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        )


class GroupedExperts(MegatronModule):
    """All local experts as grouped products: y = W2 (p * relu(W1 x)^2), p the routing weight."""

    only_products = True  # inputs and weights are not quantized: the C kernels may compute them

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
        """tokens_TD sorted by expert -> [T,D], and no bias. Under expert tensor parallelism these
        are partial sums. The dispatcher of Megatron calls this."""
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
        """Sum over each token's experts, [T,D]; all experts must be on this rank. Tokens are not
        sorted."""
        weights = self.linear_fc1.weight, self.linear_fc2.weight
        if are_few(tokens_TD, experts_TK):
            return few_experts(tokens_TD, experts_TK, probabilities_TK, *weights)
        output_TD, _ = routed_mlp(tokens_TD, experts_TK, probabilities_TK, *weights)
        return output_TD

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """One [all experts, out, in] tensor for W1 and one for W2, so that the checkpoint loads
        under any expert-parallel size."""
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
