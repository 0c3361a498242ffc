"""The kernel of AdamW: one fused kernel on a CPU, and on a GPU where torch computes it.

The GPU is pretended: CPU tensors, and the platform's name. Not covered: CUDA's kernel, Transformer
Engine's FusedAdam.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemotron_train.assemble.build import build_model, wrap_data_parallel
from nemotron_train.compose.compose import compose_config
from nemotron_train.optim.build import build_optimizer
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.plan.switches import ALL_OFF
from nemotron_train.platform import device

SMALL = ["model.pattern=M", "model.mtp.depths=0", "model.hidden_size=32", "model.vocab_size=64"]
SMALL += ["model.mamba.heads=4", "model.mamba.head_dim=16", "model.mamba.state_size=16"]


def updated(groups: Any, name: str, fused: bool) -> tuple[list[torch.Tensor], set[Any]]:
    """The weights after two steps of the optimizer for a device of this name, and the values of
    `fused` in torch's parameter groups."""
    config, platform = compose_config(SMALL), device.prepare()
    model = wrap_data_parallel(
        build_model(config, resolve_plan(config), platform, groups), config, groups
    )
    switches = replace(ALL_OFF, fused_adamw=fused)
    pretended = replace(platform, device=name, switches=switches)
    optimizer = build_optimizer(config, [model], groups, pretended)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        model.zero_grad_buffer()
        for parameter in model.module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        assert optimizer.step()[0]
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    choices = {group.get("fused") for part in parts for group in part.optimizer.param_groups}
    return [parameter.detach().clone() for parameter in model.module.parameters()], choices


@pytest.mark.parametrize(("name", "fused"), [("cpu", False), ("cuda", True)])
def test_the_fused_kernel_is_requested(groups: Any, name: str, fused: bool) -> None:
    _, choices = updated(groups, name, fused)
    assert choices == {True}


def test_without_the_switch_torch_decides(groups: Any) -> None:
    _, choices = updated(groups, "cuda", fused=False)
    assert choices == {None}


def test_the_kernels_compute_the_same_update(groups: Any) -> None:
    fused, _ = updated(groups, "cuda", fused=True)
    plain, _ = updated(groups, "cuda", fused=False)
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
