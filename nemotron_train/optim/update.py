"""Megatron-Core's optimizer step in two halves, so that somebody can look at the gradients' norm
before any weight changes.

Its own `step()` computes the norm, clips and updates in one call, and clips by a norm that is not
finite before it could be told of. The halves do the same in the same order, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Hand the reduced gradients to the optimizer and return the norm of all of them, over all
    ranks, before clipping. COLLECTIVE. SYNC."""
    optimizer.prepare_grads()  # without a loss scale there is nothing it could object to
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_update(optimizer: MegatronOptimizer, grad_norm: float) -> int:
    """Clip by `grad_norm`, as `gradient_norm` returned it, and update the weights. Returns how
    many elements of the gradients are exactly zero. COLLECTIVE."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, grad_norm)
    num_zeros = optimizer.count_zeros()
    optimizer.step_with_ready_grads()
    return int(num_zeros)


@torch.no_grad()
def gather_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Make every rank's weights those of the last update where `parallel.overlap_parameter_gather`
    leaves that to the next forward pass: for whoever reads weights in between. COLLECTIVE."""
    models: Any = chunks
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)
