"""Causal attention on a CPU against torch's `scaled_dot_product_attention` in float64.

Not covered: speed. Rows longer than `LONGEST_ROW` use torch's own attention; one comparison covers
them.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_train.model.attention import core as module
from nemotron_train.model.attention.core import causal_attention


def _torch_attention(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _inputs(rows: int, tokens: int, groups: int, heads_a_group: int, width: int):
    generator = torch.Generator().manual_seed(tokens + 7 * width)
    heads = groups * heads_a_group
    shapes = [(rows, tokens, heads, width)] + [(rows, tokens, groups, width)] * 2
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return inputs, torch.randn(shapes[0], generator=generator)


def _value_and_gradients(function, inputs, grad):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, grad)


def _assert_agrees(inputs, grad, tolerance: float) -> None:
    results = _value_and_gradients(causal_attention, inputs, grad)
    truths = _value_and_gradients(_torch_attention, [x.double() for x in inputs], grad.double())
    # Gradients of query and key are differences (zero for a token that sees only itself). Their
    # error is therefore relative to the terms that are subtracted, which have the size of the
    # value's gradient.
    added = [truths[0].norm(), *[max(truth.norm() for truth in truths[1:])] * 3]
    for result, truth, size in zip(results, truths, added, strict=True):
        assert result.dtype == grad.dtype
        error = (result.double() - truth).norm() / size
        assert error < tolerance, error


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 200),
    groups=st.integers(1, 3),
    heads_a_group=st.integers(1, 4),
    width=st.integers(1, 33),
)
def test_float32_agrees_with_torch_in_float64(
    rows: int, tokens: int, groups: int, heads_a_group: int, width: int
) -> None:
    inputs, grad = _inputs(rows, tokens, groups, heads_a_group, width)
    _assert_agrees(inputs, grad, 2e-6)


def test_bfloat16_stays_within_a_few_roundings() -> None:
    inputs, grad = _inputs(2, 300, 2, 4, 32)
    _assert_agrees([x.bfloat16() for x in inputs], grad.bfloat16(), 1e-2)


def test_gradients_agree_with_finite_differences(monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 3)
    inputs, _ = _inputs(1, 7, 2, 2, 3)
    inputs = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(causal_attention, inputs)


@pytest.mark.parametrize("tokens", [65, 130])
def test_the_past_does_not_depend_on_the_future(tokens: int) -> None:
    (q, k, v), _ = _inputs(1, tokens, 1, 2, 8)
    before = causal_attention(q, k, v)
    for x in (q, k, v):
        x[:, tokens // 2 :] = 1e3
    assert torch.equal(causal_attention(q, k, v)[:, : tokens // 2], before[:, : tokens // 2])


def test_long_rows_give_the_same_through_torchs_kernel(monkeypatch) -> None:
    (q, k, v), _ = _inputs(2, 90, 2, 2, 16)
    short = causal_attention(q, k, v)
    monkeypatch.setattr(module, "LONGEST_ROW", 80)
    torch.testing.assert_close(causal_attention(q, k, v), short, rtol=1e-5, atol=1e-6)
