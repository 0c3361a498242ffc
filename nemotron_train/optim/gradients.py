"""Looks into the gradients that Megatron's DDP has gathered. Changes none of them."""

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
    """Elements of the parameter's gradient that are exactly zero, and its elements: FP64 [2], of
    this rank's `own_part`."""
    gradient = own_part(chunks, parameter)
    zeros = gradient.numel() - torch.count_nonzero(gradient)
    return torch.stack([zeros, torch.full_like(zeros, gradient.numel())]).double()


def own_squared_norm(
    chunks: Sequence[DistributedDataParallel],
    parameter: torch.nn.Parameter,
    groups: ProcessGroupCollection,
) -> torch.Tensor:
    """This rank's share of the squared norm of the parameter's gradient: FP64. The shares of all
    ranks add up to the whole, with what several ranks hold alike counted once."""
    is_expert = not getattr(parameter, "allreduce", True)
    replicas = groups.expt_dp if is_expert else groups.dp_cp
    is_counted = (
        chunks[0].ddp_config.use_distributed_optimizer or replicas.rank() == 0
    ) and param_is_not_shared(parameter)
    if not is_counted or not param_is_not_tensor_parallel_duplicate(
        parameter, tp_group=groups.tp, expert_tp_group=groups.expt_tp
    ):
        return torch.zeros((), dtype=torch.float64, device=parameter.device)
    return torch.linalg.vector_norm(own_part(chunks, parameter), dtype=torch.float64).square()


def own_part(
    chunks: Sequence[DistributedDataParallel], parameter: torch.nn.Parameter
) -> torch.Tensor:
    """The part of the parameter's gradient that this rank answers for: 1-D, a view.

    Call it after the gradients were reduced. With the distributed optimizer it is the part of the
    bucket that was reduced to this rank, so that all data-parallel ranks' parts make up the whole;
    without, every rank has the whole.
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
    """The reduced FP32 gradient of every parameter on this rank, in the parameter's shape.

    COLLECTIVE with the distributed optimizer, where a rank holds the reduced gradients of its part
    of each bucket only. Call it between the reduction and the optimizer's step, which clips.
    """
    buffers: list[Any] = [*model.buffers, *model.expert_parallel_buffers]  # pyright: ignore
    found = {}
    for buffer in buffers:
        gathered = [_gathered(bucket, buffer, model) for bucket in buffer.buckets]
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            offset = buffer.buckets[bucket_id].offset
            part = gathered[bucket_id][start - offset : end - offset]
            found[parameter] = part.view(parameter.shape)
    return found


def _gathered(bucket: Any, buffer: Any, model: DistributedDataParallel) -> torch.Tensor:
    group = buffer.data_parallel_group
    if not model.ddp_config.use_distributed_optimizer or group.size() == 1:
        return bucket.grad_data.clone()
    own = bucket.grad_data.chunk(group.size())[group.rank()].contiguous()
    whole = torch.empty_like(bucket.grad_data)
    torch.distributed.all_gather_into_tensor(whole, own, group=group)
    return whole
