"""The optimizer step in two halves against Megatron's own `step()`, bit for bit, and several steps
against AdamW's definition.

One rank, with and without the distributed optimizer, FP32 and BF16, clipped and not. Not covered:
several ranks (tests/distributed trains with the halves), Transformer Engine's fused clipping.
"""

from typing import Any

import pytest
import torch

from nemotron_train.assemble.build import build_model, wrap_data_parallel
from nemotron_train.compose.compose import compose_config
from nemotron_train.optim.build import build_optimizer, set_learning_rate
from nemotron_train.optim.update import apply_update, gradient_norm
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device

SMALL = (
    "model.hidden_size=32",
    "model.vocab_size=64",
    "model.attention.heads=2",
    "model.attention.head_dim=16",
    "model.mamba.heads=4",
    "model.mamba.head_dim=16",
    "model.mamba.state_size=16",
    "model.moe.experts=4",
    "model.moe.expert_hidden_size=32",
    "model.moe.shared_expert_hidden_size=32",
    "model.moe.latent_size=16",
)


def build(groups: Any, overrides: tuple[str, ...]) -> tuple[Any, Any]:
    config, platform = compose_config([*SMALL, *overrides]), device.prepare()
    model = wrap_data_parallel(
        build_model(config, resolve_plan(config), platform, groups), config, groups
    )
    return model, build_optimizer(config, [model], groups, platform)


def fill_gradients(model: Any, seed: int, size: float) -> None:
    model.zero_grad_buffer()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * size
        parameter.main_grad.copy_(drawn.where(drawn > -size, 0.0))


@pytest.mark.parametrize("overrides", [
    (), ("precision=bf16",), ("parallel.distributed_optimizer=false",)
])  # fmt: skip
def test_two_halves_equal_the_whole(groups: Any, overrides: tuple[str, ...]) -> None:
    whole, whole_optimizer = build(groups, overrides)
    halves, halves_optimizer = build(groups, overrides)
    for step, size in enumerate((1.0, 1e-6, 10.0)):  # clipped, not clipped, clipped strongly
        fill_gradients(whole, step, size)
        fill_gradients(halves, step, size)
        _, norm, zeros = whole_optimizer.step()
        ours = gradient_norm(halves_optimizer)
        assert ours == norm and (ours < 1.0) == (size == 1e-6)
        assert apply_update(halves_optimizer, ours) == zeros > 0
        for a, b in zip(whole.module.parameters(), halves.module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_first_half_changes_no_weight_and_keeps_what_is_not_finite(groups: Any) -> None:
    """The norm reveals a single infinity, and the gradients still show where it is. Megatron's
    step() would have turned all of them into NaN by clipping."""
    model, optimizer = build(groups, ())
    before = [parameter.clone() for parameter in model.module.parameters()]
    fill_gradients(model, 0, 1.0)
    parameters = list(model.module.parameters())
    parameters[5].main_grad.view(-1)[0] = float("inf")
    assert gradient_norm(optimizer) == float("inf")
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter, old)
        assert bool(parameter.main_grad.isfinite().all()) == (parameter is not parameters[5])


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_steps_are_adamw_by_its_definition(groups: Any, sharded: str) -> None:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) in float64,
    from the knobs: rate, betas, epsilon, decay. Matrices decay; vectors (norms, biases, Mamba-2's
    own) do not. The rate changes with every step."""
    knobs = ("optim.beta1=0.7", "optim.beta2=0.9", "optim.epsilon=0.01", "optim.weight_decay=0.5")
    model, optimizer = build(
        groups, (*knobs, "optim.clip_grad_norm=1e9", f"parallel.distributed_optimizer={sharded}")
    )
    names, parameters = zip(*model.module.named_parameters(), strict=True)
    values = [parameter.detach().double() for parameter in parameters]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    for step, rate in enumerate((0.1, 0.02, 0.05), start=1):
        fill_gradients(model, step, 1.0)
        gradients = [parameter.main_grad.double().clone() for parameter in parameters]
        set_learning_rate(optimizer, rate, 0.5)
        apply_update(optimizer, gradient_norm(optimizer))
        for i, gradient in enumerate(gradients):
            first = 0.7 * moments[i][0] + 0.3 * gradient
            second = 0.9 * moments[i][1] + 0.1 * gradient.square()
            moments[i] = first, second
            root = (second / (1 - 0.9**step)).sqrt()
            decay = 0.5 * values[i] if values[i].dim() > 1 else 0.0
            values[i] = values[i] - rate * (first / (1 - 0.7**step) / (root + 0.01) + decay)
    for name, parameter, expected in zip(names, parameters, values, strict=True):
        difference = (parameter.detach().double() - expected).abs().max()
        assert float(difference) < 2e-6 * max(1.0, float(expected.abs().max())), name
