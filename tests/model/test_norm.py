"""RMSNorm against torch's own in float64, and against the interface that Megatron-Core expects of a
norm.

Not covered: the GPU branch (torch's kernel), a run with sequence parallelism.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.model.norm import RMSNorm, rms_norm
from nemotron_train.platform import device

device.prepare(2)

EPSILON = 1e-5


def _results(function, x, weight, grad):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = function(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad)


def _compare(shape: tuple[int, ...], dtype: torch.dtype, offset: float, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    # An offset makes the mean large. The borrowed gradient of layer norm would then differ most.
    x = (torch.randn(shape, generator=generator) + offset).to(dtype)
    weight = (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    ours = _results(lambda x, w: rms_norm(x, w, EPSILON), x, weight, grad)
    truths = _results(
        lambda x, w: F.rms_norm(x, (shape[-1],), w, EPSILON),
        x.double(),
        weight.double(),
        grad.double(),
    )
    for result, truth in zip(ours, truths, strict=True):
        assert result.dtype == dtype
        error = (result.double() - truth).norm() / truth.norm()
        assert error < tolerance, (shape, dtype, error)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), width=st.integers(2, 130), offset=st.sampled_from([0.0, 0.5, 10.0]))
def test_float32_agrees_with_torch_in_float64(rows: int, width: int, offset: float) -> None:
    # A narrow row of equal values has a tiny gradient: the difference of nearly equal terms.
    _compare((rows, width), torch.float32, offset, 1e-6 * (1 + offset**2))


@pytest.mark.parametrize("shape", [(8, 3, 64), (2048, 256), (4, 1024)])
def test_bfloat16_rounds_once(shape: tuple[int, ...]) -> None:
    """One rounding to BF16 has a relative error of at most 2^-9, 1.7e-3 on average."""
    _compare(shape, torch.bfloat16, 0.0, 1.8e-3)


def test_gradient_agrees_with_finite_differences() -> None:
    x = (torch.randn(5, 9, dtype=torch.float64) + 1).requires_grad_()
    weight = torch.rand(9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPSILON), (x, weight))


def test_a_row_of_zeros_stays_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), EPSILON)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(2, 8))
    torch.testing.assert_close(gradient, torch.full((2, 8), EPSILON**-0.5))


def test_module_follows_the_megatron_norm_interface() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    norm = RMSNorm(config=config, hidden_size=16, eps=1e-3)
    assert norm.weight.dtype == torch.bfloat16
    assert norm.weight.sequence_parallel is True
    assert set(norm.state_dict()) == {"weight"}
    x = torch.randn(4, 2, 16).bfloat16()
    assert torch.equal(norm(x), rms_norm(x, torch.ones(16).bfloat16(), 1e-3))
