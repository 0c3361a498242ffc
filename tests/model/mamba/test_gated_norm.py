"""The gated RMSNorm against a float64 composition and Hugging Face's NemotronH norm.

Not covered: a GPU, where the function is the same.
"""

import pytest
import torch
from torch import Tensor

from nemotron_train.model.mamba.gated_norm import gated_rms_norm


def make_inputs(channels: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 7, channels), (2, 7, channels), (channels,))
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


def composition(y: Tensor, gate: Tensor, weight: Tensor, group_size: int) -> Tensor:
    u = y * gate / (1 + torch.exp(-gate))
    parts = []
    for group in u.split(group_size, dim=-1):
        parts.append(group / torch.sqrt(group.pow(2).mean(-1, keepdim=True) + 1e-5))
    return torch.cat(parts, -1) * weight


@pytest.mark.parametrize("group_size", [24, 12, 3, 1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)],
)
def test_equals_composition(dtype, tolerance, group_size) -> None:
    """Forward and gradients over the same rounded inputs. BF16 rounds only the results. With
    groups of one channel the true gradients nearly vanish (u / |u|), so the tolerance is
    absolute there."""
    inputs = [t.to(dtype) for t in make_inputs()]
    results = []
    for ours in (True, False):
        leaves = [t.to(dtype if ours else torch.float64).requires_grad_() for t in inputs]
        if ours:
            out = gated_rms_norm(*leaves, group_size=group_size, epsilon=1e-5)
        else:
            out = composition(*leaves, group_size)
        dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(dtype)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    for ours, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        error = float((ours.double() - truth).norm())
        assert error < tolerance * max(float(truth.norm()), 1.0)


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(12)]
    assert torch.autograd.gradcheck(
        lambda *t: gated_rms_norm(*t, group_size=4, epsilon=1e-5), leaves
    )


def test_equals_transformers() -> None:
    """The order of gate and norm, and the grouping, match the released models."""
    peer = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    y, gate, weight = (t.float() for t in make_inputs())
    theirs = peer.NemotronHRMSNormGated(24, group_size=12, eps=1e-5)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    ours = gated_rms_norm(y, gate, weight, group_size=12, epsilon=1e-5)
    torch.testing.assert_close(ours, theirs(y, gate), rtol=1e-6, atol=1e-6)


def test_zero_row() -> None:
    """A row of zeros (a padded token) stays zero and has finite gradients."""
    y, gate, weight = (t.float() for t in make_inputs())
    y[0, 0] = 0
    y.requires_grad_()
    out = gated_rms_norm(y, gate, weight, group_size=12, epsilon=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), y)
    assert torch.equal(out[0, 0], torch.zeros(24))
    assert torch.isfinite(gradient).all()
