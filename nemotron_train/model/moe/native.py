"""Routed experts on Transformer Engine's grouped linears, for precision plans it can compute.

Owns: the adapter to Megatron's `TEGroupedMLP`. Weights are initialized and stored in checkpoints
like those of `experts.GroupedExperts`, so either class loads what the other saved. Does not own:
the format of the products (Megatron's per-module file, `precision.native`), padding and dispatch
(Megatron's dispatcher).

The tests run it on a CPU with a stand-in for Transformer Engine. It has never run on a GPU.
"""

import copy

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group


class NativeExperts(TEGroupedMLP):
    """All local experts: y = W2 (p * relu(W1 x)^2), p the routing weight. Expert i has its own
    parameters `linear_fc1.weight<i>` and `linear_fc2.weight<i>`, each [out, in]."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        input_size: int,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelGroupedLinear,
            TERowParallelGroupedLinear,
        )

        # Upstream takes the experts' input width from `moe_latent_size`.
        config_with_width = copy.copy(config)
        config_with_width.moe_latent_size = input_size if input_size != config.hidden_size else None
        super().__init__(
            num_local_experts,
            config_with_width,
            GroupedMLPSubmodules(TEColumnParallelGroupedLinear, TERowParallelGroupedLinear),
            pg_collection,
            name,
        )
        self.dp_group = pg_collection.expt_dp
        for linear in (self.linear_fc1, self.linear_fc2):
            for index in range(num_local_experts):
                weight = getattr(linear, f"weight{index}")
                # `assemble.initialize` reads this: the global index of the expert.
                weight.expert_index = self.ep_group.rank() * num_local_experts + index

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Each expert's matrix as a slice of one [all experts, out, in] tensor, under the name that
        `GroupedExperts` uses."""
        ensure_metadata_has_dp_cp_group(metadata)
        sharded: ShardedStateDict = {}
        expert_axis = len(sharded_offsets)
        num_experts = self.ep_group.size() * self.num_local_experts
        for name, linear, sharded_dim in (
            ("linear_fc1", self.linear_fc1, 0),
            ("linear_fc2", self.linear_fc2, 1),
        ):
            for index in range(self.num_local_experts):
                weight: torch.Tensor = getattr(linear, f"weight{index}")
                sharded[f"{prefix}{name}.weight{index}"] = ShardedTensor.from_rank_offsets(
                    f"{prefix}{name}.weight",
                    weight,
                    *sharded_offsets,
                    (expert_axis, weight.expert_index, num_experts),  # type: ignore[attr-defined]
                    (expert_axis + 1 + sharded_dim, self.tp_group.rank(), self.tp_group.size()),
                    replica_id=(0, 0, self.dp_group.rank()),
                    prepend_axis_num=expert_axis + 1,
                )
        return sharded
