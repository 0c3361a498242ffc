"""The causal convolution against its definition, tap by tap in float64, and against conv1d.

Not covered: the `causal_conv1d` package, unless a GPU and the package are present (last test). The
Triton form: tests/kernels/triton.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_train.kernels.triton import available
from nemotron_train.model.mamba.convolution import causal_conv


def make_inputs(length: int, taps: int = 4, channels: int = 5) -> list[Tensor]:
    """x, weight, bias and the inputs before x."""
    generator = torch.Generator().manual_seed(length)
    sizes = ((2, length, channels), (channels, taps), (channels,), (2, taps - 1, channels))
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


def definition(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, ids: Tensor | None):
    taps, history = weight.shape[1], weight.shape[1] - 1
    rows = []
    for b in range(x.shape[0]):
        tokens = []
        for t in range(x.shape[1]):
            total = bias
            for j in range(taps):
                own = ids is None or bool(ids[b, t] == ids[b, max(t - j, 0)])
                if t - j >= 0 and own:
                    total = total + weight[:, taps - 1 - j] * x[b, t - j]
                elif t - j < 0 and own and initial is not None:
                    total = total + weight[:, taps - 1 - j] * initial[b, history + t - j]
            tokens.append(total / (1 + torch.exp(-total)))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("changes", [(), (1,), (2, 3), (4, 8, 9, 10), (3, 11)])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (3, 4), (5, 2), (12, 4), (12, 3)])
def test_equals_definition(length, taps, changes, with_initial) -> None:
    """Forward and every gradient. Documents have one, two or more tokens; rows differ."""
    inputs = make_inputs(length, taps)
    ids = torch.zeros(2, length, dtype=torch.int64)
    for change in changes:
        ids[0, change:] += 1
        ids[1, change + 1 :] += 1
    results = []
    for function in (causal_conv, definition):
        leaves = [t.clone().requires_grad_() for t in inputs]
        x, weight, bias, initial = leaves
        if function is causal_conv:
            y = causal_conv(x, weight, bias, document_ids_BS=ids if changes else None,
                            initial_BKC=initial if with_initial else None)  # fmt: skip
        else:
            y = definition(x, weight, bias, initial if with_initial else None, ids)
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        used = leaves if with_initial else leaves[:3]
        results.append([y, *torch.autograd.grad(y, used, dy)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_equals_conv1d(dtype, tolerance) -> None:
    """PyTorch's conv1d in float64 over the same rounded inputs, which are a slice of a wider
    tensor, as in the projection's output. FP32: weight gradients are sums of 400 terms, whose
    rounding error grows to sqrt(400) x 6e-8. BF16: the result is rounded once, and so is the saved
    sum."""
    wide, weight, bias, _ = (t.to(dtype) for t in make_inputs(200, channels=64))
    leaves = [wide[..., 16:48], weight[16:48], bias[16:48]]
    results = []
    for ours in (True, False):
        x, w, b = (t.detach().to(dtype if ours else torch.float64).requires_grad_() for t in leaves)
        if ours:
            y = causal_conv(x, w, b)
        else:
            padded = F.pad(x.mT, (3, 0))
            y = F.silu(F.conv1d(padded, w[:, None], b, groups=32)).mT
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
        results.append([y, *torch.autograd.grad(y, [x, w, b], dy.to(y.dtype))])
    for ours, truth in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert float((ours.double() - truth).norm() / truth.norm()) < tolerance


def test_documents_do_not_leak() -> None:
    """Output and gradient of one document are bit-identical whatever the other document
    contains."""
    ids = torch.zeros(1, 20, dtype=torch.int64)
    ids[:, 9:] = 1
    base, weight, bias, _ = (t.float()[:20] for t in make_inputs(20))
    base = base[:1]
    changed = base.clone()
    changed[:, :9] *= 3
    results = []
    for x in (base, changed):
        x = x.clone().requires_grad_()
        y = causal_conv(x, weight, bias, document_ids_BS=ids)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:, 9:], b[:, 9:])
        assert not torch.equal(a[:, :9], b[:, :9])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equals_causal_conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two kernels against each other in BF16, documents included."""
    pytest.importorskip("causal_conv1d")
    monkeypatch.setattr(available, "can_use", lambda *tensors: False)  # else Triton computes
    inputs = [t.cuda().to(torch.bfloat16) for t in make_inputs(300, channels=64)[:3]]
    ids = (torch.arange(300, device="cuda") // 77).expand(2, -1)
    results = []
    for force_torch in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = causal_conv(*leaves, document_ids_BS=ids, force_torch=force_torch)
        results.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
    for a, b in zip(*results, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 2**-7
