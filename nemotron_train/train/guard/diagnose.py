"""Finds the modules whose gradients or weights are not finite. Read only."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from nemotron_train.precision.attach import modules_of

_STAGES = ("embedding", "decoder.layers", "decoder", "mtp", "output_layer")


def gradients_are_finite(chunks: Sequence[DistributedDataParallel]) -> torch.Tensor:
    """Whether all gradients in this rank's buffers are finite: a boolean scalar on the device.

    Call it before the reduction over data-parallel ranks to test the gradients of this rank alone.
    Reads the gradient buffers once.
    """
    models: Any = chunks
    norms = [
        torch.linalg.vector_norm(buffer.grad_data)
        for model in models
        for buffer in (*model.buffers, *model.expert_parallel_buffers)
    ]
    return torch.isfinite(torch.stack(norms)).all()


def place(path: str) -> tuple[int, int]:
    """Position of the module at `path` in the forward pass: (stage, layer)."""
    stage = next((n for n, name in enumerate(_STAGES) if path.startswith(name)), len(_STAGES))
    layer = re.match(r"decoder\.layers\.(\d+)", path)
    return stage, int(layer[1]) if layer else 0


def non_finite(
    chunks: Sequence[DistributedDataParallel],
) -> tuple[list[tuple[tuple[int, int, int], str]], list[str]]:
    """This rank's modules with a non-finite gradient, and those with a non-finite weight. SYNC.

    Returns ([(position in the forward pass, path)], [path]), both sorted. Call it before gradients
    are clipped.
    """
    gradients, weights = [], []
    cores = [chunk.module for chunk in chunks]
    for number, (path, module) in enumerate(modules_of(cores).items()):
        for parameter in module.parameters(recurse=False):
            gradient: Any = getattr(parameter, "main_grad", None)
            if gradient is not None and not torch.isfinite(gradient).all():
                gradients.append(((*place(path), number), path))
            if not torch.isfinite(parameter).all():
                weights.append(path)
    return sorted(set(gradients)), sorted(set(weights))
