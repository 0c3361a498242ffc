"""An estimate of what one rank holds before any activation: parameters, gradients, optimizer.

Owns this arithmetic only; `report.plan_table` prints it. Left out: activations, communication
buffers, allocator waste, and that a few small tensors (A_log, D, dt_bias) stay FP32 in a BF16
run. No torch.
"""

from dataclasses import dataclass
from math import ceil, prod

from nemotron_train.config.derive import Derived
from nemotron_train.config.schema import Config, Dtype
from nemotron_train.model.shape import (
    Sharding,
    Tensor,
    embedding_tensors,
    head_tensors,
    layers,
    mtp_tensors,
)

_GRADIENT_BYTES = 4  # accumulated in FP32 whatever the parameters are
_MOMENT_BYTES = 4 + 4  # AdamW's two moments
_MASTER_BYTES = 4  # the FP32 copy of BF16 parameters; FP32 parameters are their own master


@dataclass(frozen=True)
class RankMemory:
    """Bytes held by pipeline rank `stage` (from 0)."""

    stage: int
    parameters: int  # elements
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def heaviest_rank(config: Config, derived: Derived) -> RankMemory:
    """The memory of a rank of the pipeline rank that holds most, all of its stages together."""
    held: list[list[Tensor]] = [[] for _ in range(config.parallel.pipeline)]
    for stage, tensors in enumerate(stage_tensors(config, derived)):
        held[stage % len(held)] += tensors
    stages = [_stage_memory(config, derived, rank, tensors) for rank, tensors in enumerate(held)]
    return max(stages, key=lambda memory: memory.total_bytes)


def stage_tensors(config: Config, derived: Derived) -> list[list[Tensor]]:
    """The unsharded tensors of every pipeline stage. The first holds the embedding, the last
    what follows the decoder; with multi-token prediction a last stage of its own embeds too."""
    model = config.model
    shapes = layers(model)
    decoder = [layer for layer in shapes if not layer.in_mtp]
    stages, start = [], 0
    for count in derived.layers_per_stage:
        inside = decoder[start : start + count]
        stages.append([tensor for layer in inside for tensor in layer.tensors])
        start += count
    stages[0] += embedding_tensors(model)
    stages[-1] += head_tensors(model) + mtp_tensors(model)
    stages[-1] += [tensor for layer in shapes if layer.in_mtp for tensor in layer.tensors]
    if model.mtp.depths > 0 and len(stages) > 1:
        stages[-1] += embedding_tensors(model)
    return stages


def _stage_memory(
    config: Config, derived: Derived, stage: int, tensors: list[Tensor]
) -> RankMemory:
    parallel = config.parallel
    ranks_of = {
        Sharding.replicated: 1,
        Sharding.tensor: parallel.tensor,
        Sharding.expert: parallel.expert * parallel.expert_tensor,
    }
    held = dict.fromkeys(Sharding, 0)
    for tensor in tensors:
        held[tensor.sharding] += prod(tensor.shape) // ranks_of[tensor.sharding]
    experts = held[Sharding.expert]
    dense = held[Sharding.replicated] + held[Sharding.tensor]
    optimized = dense + experts
    if parallel.distributed_optimizer:
        dense_replicas = derived.data_parallel * parallel.context
        optimized = ceil(dense / dense_replicas) + ceil(experts / derived.expert_data_parallel)
    reduced = config.precision.parameter_dtype == Dtype.bfloat16
    return RankMemory(
        stage=stage,
        parameters=dense + experts,
        parameter_bytes=(dense + experts) * (2 if reduced else 4),
        gradient_bytes=(dense + experts) * _GRADIENT_BYTES,
        optimizer_bytes=optimized * (_MOMENT_BYTES + (_MASTER_BYTES if reduced else 0)),
    )
