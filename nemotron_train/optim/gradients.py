"""Looks into the gradients that Megatron's DDP has gathered. Changes none of them."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


def count_zeros(model: DistributedDataParallel, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Elements of the parameter's gradient that are exactly zero, and its elements: FP64 [2].

    Call it after the gradients were reduced. With the distributed optimizer a rank counts the part
    of the bucket that was reduced to it, so all data-parallel ranks' counts add up to the whole;
    without, every rank counts the whole.
    """
    buffers: list[Any] = [*model.buffers, *model.expert_parallel_buffers]  # pyright: ignore
    buffer = next(buffer for buffer in buffers if parameter in buffer.param_index_map)
    start, end, bucket_id = buffer.param_index_map[parameter]
    bucket = buffer.buckets[bucket_id]
    start, end = start - bucket.offset, end - bucket.offset
    if model.ddp_config.use_distributed_optimizer:
        group = buffer.data_parallel_group
        size = bucket.grad_data.numel() // group.size()
        start = max(start, group.rank() * size)
        end = min(end, (group.rank() + 1) * size)
    gradient = bucket.grad_data[start : max(start, end)]
    zeros = gradient.numel() - torch.count_nonzero(gradient)
    return torch.stack([zeros, torch.full_like(zeros, gradient.numel())]).double()
