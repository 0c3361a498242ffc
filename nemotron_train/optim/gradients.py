"""Read-only access to the gradients in the buffers of Megatron's DDP."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared


def count_zeros(
    chunks: Sequence[DistributedDataParallel], parameter: torch.nn.Parameter
) -> torch.Tensor:
    """Number of exact zeros and number of elements of this rank's `local_gradient`: FP64 [2]."""
    gradient = local_gradient(chunks, parameter)
    zeros = gradient.numel() - torch.count_nonzero(gradient)
    return torch.stack([zeros, torch.full_like(zeros, gradient.numel())]).double()


def local_squared_norm(
    chunks: Sequence[DistributedDataParallel],
    parameter: torch.nn.Parameter,
    groups: ProcessGroupCollection,
) -> torch.Tensor:
    """This rank's share of the squared norm of the parameter's gradient: FP64 scalar.

    The shares of all ranks add up to the squared norm of the whole gradient. A gradient that
    several ranks hold identically is counted once.
    """
    is_expert = not getattr(parameter, "allreduce", True)
    replicas = groups.expt_dp if is_expert else groups.dp_cp
    is_counted = (
        chunks[0].ddp_config.use_distributed_optimizer or replicas.rank() == 0
    ) and param_is_not_shared(parameter)
    if not is_counted or not param_is_not_tensor_parallel_duplicate(
        parameter, tp_group=groups.tp, expert_tp_group=groups.expt_tp
    ):
        return torch.zeros((), dtype=torch.float64, device=parameter.device)
    return torch.linalg.vector_norm(local_gradient(chunks, parameter), dtype=torch.float64).square()


def local_gradient(
    chunks: Sequence[DistributedDataParallel], parameter: torch.nn.Parameter
) -> torch.Tensor:
    """The part of the parameter's gradient that was reduced to this rank: 1-D, a view.

    Call it after the gradient reduction. With the distributed optimizer, it is this rank's part of
    the bucket; the parts of all data-parallel ranks make up the whole gradient. Without, every rank
    has the whole gradient.
    """
    buffers: list[Any] = [
        buffer
        for chunk in chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)  # pyright: ignore
    ]
    buffer = next(buffer for buffer in buffers if parameter in buffer.param_index_map)
    start, end, bucket_id = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_id]
    start, end = start - bucket.offset, end - bucket.offset
    if chunks[0].ddp_config.use_distributed_optimizer:
        group = buffer.data_parallel_group
        size = bucket.grad_data.numel() // group.size()
        start = max(start, group.rank() * size)
        end = min(end, (group.rank() + 1) * size)
    return bucket.grad_data[start : max(start, end)]


def whole_gradients(
    model: DistributedDataParallel,
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The reduced FP32 gradient of every parameter on this rank, in the parameter's shape. Copies.

    COLLECTIVE with the distributed optimizer: a rank then holds the reduced gradients of only its
    part of each bucket. Call it between the gradient reduction and the optimizer step, which clips.
    """
    buffers: list[Any] = [*model.buffers, *model.expert_parallel_buffers]  # pyright: ignore
    gradients = {}
    for buffer in buffers:
        gathered = [_gathered(bucket, buffer, model) for bucket in buffer.buckets]
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            offset = buffer.buckets[bucket_id].offset
            part = gathered[bucket_id][start - offset : end - offset]
            gradients[parameter] = part.view(parameter.shape)
    return gradients


def _gathered(bucket: Any, buffer: Any, model: DistributedDataParallel) -> torch.Tensor:
    """A copy of the bucket's whole reduced gradient, 1-D. COLLECTIVE if it is distributed."""
    group = buffer.data_parallel_group
    if not model.ddp_config.use_distributed_optimizer or group.size() == 1:
        return bucket.grad_data.clone()
    local_part = bucket.grad_data.chunk(group.size())[group.rank()].contiguous()
    whole = torch.empty_like(bucket.grad_data)
    torch.distributed.all_gather_into_tensor(whole, local_part, group=group)
    return whole
