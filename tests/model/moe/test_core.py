"""Grouped experts and the token permutation against one dense expert at a time in float64, and
against Megatron-Core's permutation and sequential experts.

Not covered: the GPU's grouped product, the expert-parallel exchange, speed.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_train.model.moe import permutation as module
from nemotron_train.model.moe.core import grouped_mlp, routed_mlp
from nemotron_train.model.moe.permutation import (
    permute,
    permute_probabilities,
    plan_permutation,
    unpermute,
)
from nemotron_train.platform import device

device.prepare(2)


def _choices(num_tokens: int, num_experts: int, num_choices: int, generator) -> Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores[:, 0] += 0.7  # one popular expert, and often an empty one
    return scores.topk(num_choices, dim=-1).indices


def _problem(num_tokens: int, num_experts: int, num_choices: int, width: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(num_tokens + 31 * num_experts)
    hidden = 2 * width + 1
    x = torch.randn(num_tokens, width, generator=generator)
    weight1 = torch.randn(num_experts, hidden, width, generator=generator) * width**-0.5
    weight2 = torch.randn(num_experts, width, hidden, generator=generator) * hidden**-0.5
    experts = _choices(num_tokens, num_experts, num_choices, generator)
    probabilities = torch.rand(num_tokens, num_choices, generator=generator)
    grad = torch.randn(num_tokens, width, generator=generator)
    x, weight1, weight2, grad = (tensor.to(dtype) for tensor in (x, weight1, weight2, grad))
    return experts, grad, (x, probabilities, weight1, weight2)


def _one_expert_at_a_time(x, experts, probabilities, weight1, weight2) -> Tensor:
    y = torch.zeros_like(x)
    for expert in range(weight1.shape[0]):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        hidden = torch.relu(x[token] @ weight1[expert].T) ** 2
        weighted = probabilities[token, choice, None] * hidden
        y = y.index_add(0, token, weighted @ weight2[expert].T)
    return y


def _value_and_gradients(function, inputs: tuple[Tensor, ...], grad: Tensor):
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def _assert_agrees(function, experts, grad, inputs, tolerance: float) -> None:
    results = _value_and_gradients(function, inputs, grad)
    truths = _value_and_gradients(
        lambda x, p, w1, w2: _one_expert_at_a_time(x, experts, p, w1, w2),
        tuple(tensor.double() for tensor in inputs),
        grad.double(),
    )
    # A sum may cancel to nothing (one token, width 1). Errors are therefore relative to the size of
    # the added terms: the same function of absolute values.
    added = _value_and_gradients(
        lambda x, p, w1, w2: _one_expert_at_a_time(x, experts, p, w1, w2),
        tuple(tensor.double().abs() for tensor in inputs),
        grad.double().abs(),
    )
    names = ("y", "x", "probabilities", "weight1", "weight2")
    for name, result, truth, size in zip(names, results, truths, added, strict=True):
        assert result.dtype == (grad.dtype if name == "y" else inputs[names.index(name) - 1].dtype)
        error = (result.double() - truth).norm() / size.norm().clamp_min(1e-12)
        assert error < tolerance, (name, error)


def _through_grouped_mlp(experts: Tensor, num_experts: int):
    """The path with several expert-parallel ranks: sorted rows and their counts come from
    outside."""
    packed = plan_permutation(experts, num_experts, max_padding=0)

    def function(x, probabilities, weight1, weight2):
        rows_y = grouped_mlp(
            permute(x, packed),
            packed.tokens_per_expert_E,
            weight1,
            weight2,
            permute_probabilities(probabilities, packed),
        )
        return unpermute(rows_y, packed)

    return function


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    num_experts=st.integers(1, 9),
    num_choices=st.integers(1, 4),
    width=st.integers(1, 24),
    padding_flops=st.sampled_from([0, 10_000, 10**12]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
# The only routing weight's gradient cancels to a thousandth of the added terms.
@example(num_tokens=1, num_experts=7, num_choices=1, width=7, padding_flops=0, dtype=torch.float32)
def test_any_shape_agrees_with_one_expert_at_a_time(
    num_tokens: int,
    num_experts: int,
    num_choices: int,
    width: int,
    padding_flops: int,
    dtype: torch.dtype,
) -> None:
    """Packed, sometimes padded and always padded blocks, on one rank and from sorted rows."""
    num_choices = min(num_choices, num_experts)
    experts, grad, inputs = _problem(num_tokens, num_experts, num_choices, width, dtype)
    # A few consecutive roundings of 2^-24 or 2^-9 with random signs.
    tolerance = 5e-7 if dtype == torch.float32 else 1e-2
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module._PADDING_FLOPS, dtype, padding_flops)

        def routed(x, probabilities, weight1, weight2):
            y, counts = routed_mlp(x, experts, probabilities, weight1, weight2)
            assert torch.equal(counts, torch.bincount(experts.flatten(), minlength=num_experts))
            return y

        _assert_agrees(routed, experts, grad, inputs, tolerance)
        _assert_agrees(_through_grouped_mlp(experts, num_experts), experts, grad, inputs, tolerance)


@pytest.mark.parametrize("padding_flops", [0, 10**12])
def test_gradients_agree_with_finite_differences(padding_flops: int, monkeypatch) -> None:
    monkeypatch.setitem(module._PADDING_FLOPS, torch.float64, padding_flops)
    experts, _, inputs = _problem(6, 4, 2, 3, torch.float64)
    inputs = tuple(tensor.double().requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(
        lambda x, p, w1, w2: routed_mlp(x, experts, p, w1, w2)[0], inputs, atol=1e-6
    )


@pytest.mark.parametrize("padding_flops", [0, 10**12])
def test_without_probabilities_and_with_empty_experts(padding_flops: int, monkeypatch) -> None:
    monkeypatch.setitem(module._PADDING_FLOPS, torch.float32, padding_flops)
    _, grad, (x, _, weight1, weight2) = _problem(12, 5, 1, 8, torch.float32)
    counts = [0, 7, 0, 5, 0]
    experts = torch.arange(5).repeat_interleave(torch.tensor(counts)).unsqueeze(1)
    results = _value_and_gradients(
        lambda x, w1, w2: grouped_mlp(x, counts, w1, w2), (x, weight1, weight2), grad
    )
    truths = _value_and_gradients(
        lambda x, w1, w2: _one_expert_at_a_time(x, experts, torch.ones(12, 1), w1, w2),
        (x, weight1, weight2),
        grad,
    )
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)
    for gradient in results[2:]:
        assert not gradient[[0, 2, 4]].any()


def test_no_tokens_at_all_give_no_rows_and_zero_gradients() -> None:
    _, _, (_, _, weight1, weight2) = _problem(1, 3, 1, 4, torch.float32)
    y, grad_x, grad1, grad2 = _value_and_gradients(
        lambda x, w1, w2: grouped_mlp(x, [0, 0, 0], w1, w2),
        (torch.zeros(0, 4), weight1, weight2),
        torch.zeros(0, 4),
    )
    assert (y.shape, grad_x.shape) == ((0, 4), (0, 4))
    assert not grad1.any() and not grad2.any()


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 50),
    num_experts=st.integers(1, 300),
    num_choices=st.integers(1, 5),
    max_padding=st.sampled_from([0, 3, 10**6]),
)
def test_permutation_is_stable_complete_and_padded_within_its_limit(
    num_tokens: int, num_experts: int, num_choices: int, max_padding: int
) -> None:
    num_choices = min(num_choices, num_experts)
    generator = torch.Generator().manual_seed(num_tokens)
    experts = _choices(num_tokens, num_experts, num_choices, generator)
    plan = plan_permutation(experts, num_experts, max_padding)
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    assert torch.equal(plan.tokens_per_expert_E, counts)
    num_rows = sum(plan.rows_per_expert)
    assert num_rows == plan.token_of_row_T.numel()
    assert num_rows - experts.numel() <= max_padding * num_experts
    blocks = plan.token_of_row_T.split(plan.rows_per_expert)
    for expert, (block, count) in enumerate(zip(blocks, counts.tolist(), strict=True)):
        tokens = (experts == expert).any(dim=1).nonzero().flatten()
        assert torch.equal(block[:count], tokens)
        assert (block[count:] == num_tokens).all()
    own_token = torch.arange(num_tokens).unsqueeze(1).expand(-1, num_choices)
    assert torch.equal(plan.token_of_row_T[plan.row_of_choice_SK.long()], own_token)


def test_permutation_agrees_with_megatron() -> None:
    from megatron.core.transformer.moe import moe_utils

    experts, _, (x, probabilities, _, _) = _problem(37, 6, 3, 5, torch.float32)
    dense = torch.zeros(37, 6).scatter(1, experts, probabilities)
    routing_map = torch.zeros(37, 6, dtype=torch.bool).scatter(1, experts, True)
    rows, row_probabilities, order, _, _ = moe_utils.permute(
        x, routing_map, probs=dense, num_out_tokens=experts.numel()
    )
    plan = plan_permutation(experts, 6)
    assert row_probabilities is not None
    assert torch.equal(permute(x, plan), rows)
    assert torch.equal(permute_probabilities(probabilities, plan), row_probabilities)
    torch.testing.assert_close(
        unpermute(rows * 2, plan), moe_utils.unpermute(rows * 2, order, x.shape)
    )


def test_bfloat16_agrees_with_megatrons_weighted_squared_relu() -> None:
    from megatron.core.fusions.fused_weighted_squared_relu import weighted_squared_relu_impl

    _, grad, (x, _, weight1, weight2) = _problem(64, 1, 1, 32, torch.bfloat16)
    probabilities = torch.rand(64, generator=torch.Generator().manual_seed(2))

    def megatron(x, p, w1, w2):
        return weighted_squared_relu_impl(x @ w1[0].T, p.unsqueeze(1)) @ w2[0].T

    inputs = (x, probabilities, weight1, weight2)
    ours = _value_and_gradients(lambda x, p, w1, w2: grouped_mlp(x, [64], w1, w2, p), inputs, grad)
    theirs = _value_and_gradients(megatron, inputs, grad)
    for result, other in zip(ours, theirs, strict=True):
        assert result.dtype == other.dtype
        assert (result - other).norm() < 1e-2 * other.norm()


def test_routing_weight_multiplies_before_the_second_product() -> None:
    """If the weight were applied after the product, the product would overflow FP32."""
    x = torch.tensor([[1e18]])
    y = grouped_mlp(x, [1], torch.ones(1, 1, 1), torch.full((1, 1, 1), 1e6), torch.tensor([1e-9]))
    torch.testing.assert_close(y, torch.tensor([[1e33]]))
