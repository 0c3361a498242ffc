"""The SSD core against its token-by-token recurrence in float64.

Not covered: `mamba_ssm` itself, unless a GPU and the package are present (the last test), and speed
(benchmarks/ssd.py).
"""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_train.model.mamba import core as ssd_module
from nemotron_train.model.mamba import scan_operands
from nemotron_train.model.mamba.core import mamba_ssm_takes, offsets_overflow, ssd
from nemotron_train.plan.switches import MAMBA_SSM
from nemotron_train.platform.packages import is_usable
from tests.model.mamba.recurrence import NAMES, Shape, documents, make_inputs, recurrence


def both(
    inputs: list[Tensor], ids: Tensor | None, chunk: int, with_initial: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, final states and all gradients of our kernel, and of the recurrence in float64 over
    the same (already rounded) inputs."""
    results = []
    weights = torch.Generator().manual_seed(9)
    dy = torch.randn(inputs[0].shape, generator=weights, dtype=torch.float64)
    dfinal = torch.randn(inputs[6].shape, generator=weights, dtype=torch.float64)
    for ours in (True, False):
        leaves = [(t.clone() if ours else t.double()).requires_grad_() for t in inputs]
        used = leaves if with_initial else leaves[:6]
        initial = leaves[6] if with_initial else None
        if ours:
            y, final = ssd(
                *leaves[:6],
                chunk_size=chunk,
                document_ids_BS=ids,
                initial_state_BHPN=initial,
                return_final_state=True,
            )
        else:
            y, final = recurrence(*leaves[:6], initial, ids)
        cotangents = [dy.to(y.dtype), dfinal.to(final.dtype)]
        gradients = torch.autograd.grad([y, final], used, cotangents)
        results.append([y.detach(), final.detach(), *gradients])
    return results[0], results[1]


def assert_same(ours: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("y", "final", *NAMES), ours, truth, strict=False):
        assert torch.isfinite(a).all(), name
        # A's gradient sums terms over all tokens. They cancel when nothing survives a step.
        scale = max(float(b.abs().max()), 1.0)
        assert float((a - b).abs().max()) < tolerance * scale, name


# Lengths: odd, shorter than a chunk, a multiple of a chunk. Boundaries: inside chunks, on their
# edges, adjacent, at the last token. Rows differ.
CASES = [
    (1, 4, None),
    (7, 16, [[2, 3], []]),
    (37, 8, [[8, 16, 17, 18, 36], [5]]),
    (64, 16, None),
    (64, 16, [[16, 32, 48], [1, 63]]),
    (65, 32, [[32], [10, 33, 64]]),
    (70, 128, [[64, 65], [3, 40]]),
    (130, 64, [[], [64, 100]]),
]


@pytest.mark.parametrize("split_range", [79.0, 3.0, -1.0], ids=["split", "mixed", "explicit"])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize(("length", "chunk", "starts"), CASES)
def test_equals_recurrence(monkeypatch, length, chunk, starts, with_initial, split_range) -> None:
    """Forward and every gradient in float64, for both algorithms within a chunk and for a mixture
    of them in one call."""
    monkeypatch.setattr(scan_operands, "SPLIT_RANGE", split_range)
    ids = None if starts is None else documents(starts, length)
    ours, truth = both(make_inputs(Shape(length=length)), ids, chunk, with_initial)
    assert_same(ours, truth, 1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.builds(
        lambda b, s, g, j, p, n: Shape(b, s, g * j, p, g, n),
        st.integers(1, 3),
        st.integers(1, 50),
        st.sampled_from([1, 2, 3]),
        st.integers(1, 4),
        st.integers(1, 6),
        st.integers(1, 6),
    ),
    chunk=st.integers(1, 20),
    dt_scale=st.sampled_from([1e-3, 0.3, 30.0]),
    change=st.floats(0.0, 0.5),
    seed=st.integers(0, 1000),
)
def test_equals_recurrence_anywhere(shape, chunk, dt_scale, change, seed) -> None:
    inputs = make_inputs(shape, dt_scale, seed)
    generator = torch.Generator().manual_seed(seed)
    new = torch.rand(shape.batch, shape.length, generator=generator) < change
    ours, truth = both(inputs, new.long().cumsum(1), chunk, with_initial=True)
    assert_same(ours, truth, 1e-10)


def test_gradcheck() -> None:
    """The hand-derived backward pass against finite differences of our own forward pass."""
    ids = documents([[3], [4, 5]], 6)
    leaves = [t.requires_grad_() for t in make_inputs(Shape(2, 6, 2, 2, 2, 2))]

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(
            *t[:6],
            chunk_size=4,
            document_ids_BS=ids,
            initial_state_BHPN=t[6],
            return_final_state=True,
        )

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("split_range", [79.0, -1.0])
def test_float32(monkeypatch, split_range) -> None:
    """FP32 stays within a few units of its own rounding error (6e-8), grown by sums over 150
    tokens."""
    monkeypatch.setattr(scan_operands, "SPLIT_RANGE", split_range)
    inputs = [t.float() for t in make_inputs(Shape(length=150, head_dim=16, state=16), 0.05)]
    ids = documents([[50], [64, 99]], 150)
    ours, truth = both(inputs, ids, 64, True)
    for name, a, b in zip(("y", "final", *NAMES), ours, truth, strict=True):
        error = float((a - b).norm() / b.norm())
        assert error < 2e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("split_range", [79.0, -1.0])
def test_bfloat16(monkeypatch, split_range) -> None:
    """BF16 inputs, FP32 sums. One rounding is 2^-8 at most and 2^-8 / 2.4 in quadratic mean. An
    operand, a result or a gradient goes through up to nine independent roundings: three times that,
    so 2^-7 in norm leaves a margin of 1.6. dt and A depend on differences of such terms: twice
    that."""
    monkeypatch.setattr(scan_operands, "SPLIT_RANGE", split_range)
    exact = make_inputs(Shape(length=150, head_dim=16, state=16), 0.05)
    narrow = [t.to(torch.bfloat16 if name in "xBC" else torch.float32)
              for name, t in zip(NAMES, exact, strict=True)]  # fmt: skip
    ids = documents([[50], [64, 99]], 150)
    ours, truth = both(narrow, ids, 64, True)
    assert ours[0].dtype == torch.bfloat16
    assert ours[1].dtype == torch.float32
    for name, a, b in zip(("y", "final", *NAMES), ours, truth, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error < 2**-7 * (2 if name in ("dt", "A") else 1), f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_violent_decay(dtype) -> None:
    """One token in five forgets everything (dt A to -1e5), others nothing. There is no overflow and
    no NaN, and small decays right after a huge one keep their precision. Running sums reach 1e6,
    which in FP64 leaves a precision of 1e-10 in an exponent; hence the tolerance."""
    inputs = make_inputs(Shape(length=100))
    inputs[1][:, ::5] *= 1e5
    inputs[1][:, 1::5] = 0
    inputs = [t.to(dtype) for t in inputs]
    ours, truth = both(inputs, None, 64, True)
    for name, a, b in zip(("y", "final", *NAMES), ours, truth, strict=True):
        assert torch.isfinite(a).all(), name
        if name in ("dt", "A"):  # scaled by dt and A of 1e5: only finiteness is checked
            continue
        tolerance = 1e-9 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max())
        )


@pytest.mark.parametrize("cut", [1, 32, 41, 63])
def test_state_carries_over(cut) -> None:
    """A sequence in two calls that pass on the state equals one call: outputs and gradients. The
    cut is inside a document, on a chunk edge and off it."""
    inputs = make_inputs(Shape(length=64))
    ids = documents([[20, 50], [7]], 64)
    whole, _ = both(inputs, ids, 32, True)
    leaves = [t.clone().requires_grad_() for t in inputs]
    x, dt, A, B, C, D, state = leaves
    outputs = []
    for part in (slice(0, cut), slice(cut, 64)):
        part_ids = ids[:, part]
        if part.start:  # the cut may or may not be inside a document
            continues = (ids[:, cut] == ids[:, cut - 1])[:, None, None, None]
            state = state * continues
        y, state = ssd(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], D,
            chunk_size=32, document_ids_BS=part_ids, initial_state_BHPN=state,
            return_final_state=True,
        )  # fmt: skip
        outputs.append(y)
    weights = torch.Generator().manual_seed(9)
    dy = torch.randn(inputs[0].shape, generator=weights, dtype=torch.float64)
    dfinal = torch.randn(inputs[6].shape, generator=weights, dtype=torch.float64)
    y = torch.cat(outputs, 1)
    gradients = torch.autograd.grad([y, state], leaves, [dy, dfinal])
    assert_same([y, state, *gradients], whole, 1e-12)


# Where documents start, with chunks of 16 tokens: only inside chunks; only on their edges; one
# token before and after an edge; documents of one token, also at both ends of the row; several that
# end in one chunk; one that covers several chunks.
PLACES = [
    [5, 23, 41],
    [16, 32, 48],
    [15, 17, 33, 47],
    [1, 2, 16, 17, 18, 63],
    [3, 6, 9, 12, 50],
    [4, 60],
]


@pytest.mark.parametrize("split_range", [79.0, -1.0], ids=["split", "explicit"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["torch", "kernel"]
)
@pytest.mark.parametrize("starts", PLACES, ids=str)
def test_each_document_is_a_recurrence_of_its_own(
    monkeypatch, starts, dtype, tolerance, split_range
) -> None:
    """A state that a chunk carries over must stop where a document ends, also inside the chunk.

    Second truth: the recurrence in float64, run on each document alone from zero, so no document
    id takes part in it. Outputs, final state and gradients; a gradient that leaks into another
    document shows as well. In FP32 the C kernels compute the carry, in FP64 torch's operators. Not
    seen here: decays summed on over a document's end, which differ by rounding only
    (`test_documents_do_not_leak`).
    """
    monkeypatch.setattr(scan_operands, "SPLIT_RANGE", split_range)
    length, weights = 64, torch.Generator().manual_seed(7)
    inputs = [t.to(dtype) for t in make_inputs(Shape(batch=1, length=length), 0.05)[:6]]
    dy = torch.randn(inputs[0].shape, generator=weights, dtype=torch.float64)
    ours = [t.clone().requires_grad_() for t in inputs]
    y, final = ssd(
        *ours,
        chunk_size=16,
        document_ids_BS=documents([starts], length),
        return_final_state=True,
    )
    gradients = torch.autograd.grad(y, ours, dy.to(y.dtype))
    truth = [t.double().requires_grad_() for t in inputs]
    x, dt, A, B, C, D = truth
    parts = []
    for begin, end in pairwise([0, *starts, length]):
        part = slice(begin, end)
        alone, last = recurrence(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, None, None)
        parts.append(alone)
    expected = torch.cat(parts, 1)
    names = ("y", "final", *NAMES)
    pairs = zip(
        (y, final, *gradients),
        (expected, last, *torch.autograd.grad(expected, truth, dy)),
        strict=True,
    )
    for name, (a, b) in zip(names, pairs, strict=False):
        scale = max(float(b.detach().abs().max()), 1.0)
        assert float((a.double() - b).detach().abs().max()) < tolerance * scale, name


def test_packed_equals_separate() -> None:
    inputs = make_inputs(Shape(batch=1, length=90))
    starts = [0, 13, 32, 64, 65, 90]
    x, dt, A, B, C, D, _ = inputs
    packed = ssd(*inputs[:6], chunk_size=32, document_ids_BS=documents([starts[1:-1]], 90))
    for begin, end in pairwise(starts):
        part = slice(begin, end)
        alone = ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, chunk_size=32)
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split_range", [79.0, -1.0])
@pytest.mark.parametrize("boundary", [32, 45])
def test_documents_do_not_leak(monkeypatch, boundary, split_range, dtype) -> None:
    """Changing document 0 leaves the output and gradient of document 1 bit-identical, and vice
    versa. Not covered: decays so steep that a head's chunk is computed by the other algorithm,
    which may change rounding."""
    monkeypatch.setattr(scan_operands, "SPLIT_RANGE", split_range)
    ids = documents([[boundary], [boundary]], 96)

    def run(seeds: tuple[int, int]) -> list[Tensor]:
        first, second = (make_inputs(Shape(length=96), 0.05, seed) for seed in seeds)
        x, dt, A, B, C, D, _ = second
        leaves = []
        for name, a, b in zip("xtBC", (first[i] for i in (0, 1, 3, 4)), (x, dt, B, C), strict=True):
            mixed = torch.cat([a[:, :boundary], b[:, boundary:]], 1)
            mixed = mixed.to(torch.float32 if name == "t" else dtype)
            leaves.append(mixed.requires_grad_())
        x, dt, B, C = leaves
        y = ssd(x, dt, A.float() * 0 - 1.0, B, C, D.float() * 0 + 1.0,
                chunk_size=32, document_ids_BS=ids)  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    base, other_first, other_second = run((1, 2)), run((3, 2)), run((1, 4))
    for a, b, c in zip(base, other_first, other_second, strict=True):
        assert torch.equal(a[:, boundary:], b[:, boundary:])
        assert torch.equal(a[:, :boundary], c[:, :boundary])
        assert not torch.equal(a[:, :boundary], b[:, :boundary])


def test_equals_transformers() -> None:
    """Hugging Face's own chunked form, in FP32."""
    peer = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    inputs = [t.float() for t in make_inputs(Shape(length=70, head_dim=8, state=8), 0.05)]
    x, dt, A, B, C, D, _ = inputs
    theirs = peer.mamba2_chunk_scan(x, dt, A, B, C, 32, D=D)
    torch.testing.assert_close(ssd(*inputs[:6], chunk_size=32), theirs, rtol=1e-5, atol=1e-5)


def test_cpu_chunk_follows_decay() -> None:
    """Heads with mild decay get the long chunk, steep ones the short one, whatever the padding."""
    dt = torch.full((1, 100, 16), 0.1)
    assert ssd_module._cpu_chunk(dt, torch.full((16,), -1.0)) == 64
    assert ssd_module._cpu_chunk(dt, torch.full((16,), -16.0)) == 32


def test_offsets_that_mamba_ssm_cannot_compute(monkeypatch) -> None:
    """Shapes whose element offsets exceed 2^31 in mamba_ssm's kernels, which then do not compute
    them. Nothing is allocated."""

    def views(length: int) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.empty(1, length, 16384 + 2 * 1024, device="meta")
        x, B, C = wide.split([16384, 1024, 1024], dim=-1)
        return x.unflatten(2, (256, 64)), B.unflatten(2, (8, 128)), C.unflatten(2, (8, 128))

    assert not offsets_overflow(*views(32768), 128)
    assert offsets_overflow(*views(131072), 128)

    def on_cuda(t: Tensor) -> Any:
        return SimpleNamespace(is_cuda=True, dtype=t.dtype, shape=t.shape, stride=t.stride)

    for usable in (True, False):
        monkeypatch.setattr(ssd_module, "is_usable", lambda package, usable=usable: usable)
        for length, fits in ((32768, True), (131072, False)):
            tensors = [on_cuda(t) for t in views(length)]
            assert mamba_ssm_takes(*tensors, 128) == (usable and fits)
    monkeypatch.setattr(ssd_module, "is_usable", lambda package: True)
    assert not mamba_ssm_takes(*views(32768), 128), "not on CUDA"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equals_mamba_ssm() -> None:
    """The two kernels against each other in BF16, documents included."""
    if not is_usable(MAMBA_SSM):
        pytest.skip("needs mamba_ssm")
    inputs = make_inputs(Shape(length=300, heads=8, head_dim=64, groups=2, state=64), 0.05)
    narrow = [t.to("cuda", torch.bfloat16 if name in "xBC" else torch.float32)
              for name, t in zip(NAMES, inputs, strict=True)]  # fmt: skip
    ids = documents([[50, 128], [7, 299]], 300).cuda()
    results = []
    for force_torch in (False, True):
        leaves = [t.clone().requires_grad_() for t in narrow[:6]]
        y = ssd(*leaves, chunk_size=128, document_ids_BS=ids, force_torch=force_torch)
        results.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
    for name, a, b in zip(("y", *NAMES), *results, strict=False):
        error = float((a.float() - b.float()).norm() / b.float().norm())
        assert error < 2**-6, f"{name}: {error:.1e}"
