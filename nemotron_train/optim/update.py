"""Megatron-Core's optimizer step in two halves, so that the caller can check the gradient norm
before any weight changes.

Megatron's `step()` computes the norm, clips and updates in one call. It clips even if the norm is
not finite, before the caller can react. The two halves do the same in the same order, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Pass the reduced gradients to the optimizer. Returns the global gradient norm, over all
    ranks, before clipping. COLLECTIVE. SYNC."""
    optimizer.prepare_grads()  # its result only matters with a loss scale, which is not used
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_update(optimizer: MegatronOptimizer, grad_norm: float) -> int:
    """Clip by `grad_norm` (from `gradient_norm`) and update the weights. Returns the number of
    gradient elements that are exactly zero. COLLECTIVE."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)
    num_zeros = optimizer.count_zeros()
    optimizer.step_with_ready_grads()
    return int(num_zeros)


@torch.no_grad()
def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather the updated weights on every rank now. With `parallel.overlap_parameter_gather` the
    next forward pass would do it; call this before reading weights in between. COLLECTIVE."""
    models: Any = chunks
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)
