"""The C kernels of training against the equivalent torch operators.

The modules' own tests compare the implementation that this machine uses with definitions in
float64. Here both implementations run on the same numbers, over sizes on both sides of a block and
a tile and any memory order. Any number of threads must give the same bits. Tolerances: both compute
in FP32 and differ by the order of sums and the last digits of exp (eight units in the last place of
the largest number, or of one). BF16 results may round to neighbours. Not covered: code for another
processor or from another compiler.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_train.assemble.transformer_config import squared_relu
from nemotron_train.kernels import library
from nemotron_train.kernels import training as training_kernels
from nemotron_train.model.cross_entropy import vocab_parallel_cross_entropy
from nemotron_train.model.mamba.convolution import causal_conv
from nemotron_train.model.mamba.core import ssd
from nemotron_train.model.mamba.gated_norm import gated_rms_norm
from nemotron_train.model.moe.core import grouped_mlp
from nemotron_train.model.norm import rms_norm

DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.skipif(not library.supports(torch.zeros(1)), reason="no C compiler here")


def _results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input for an output gradient of fixed noise."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, noise)]


def _in_torch(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "layer_library", lambda: None)
        return _results(function, *inputs)


def _assert_same(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    float32: float = 2e-6,
    added: Callable[[list[Tensor]], dict[int, float]] = lambda results: {},
) -> None:
    """Checks the kernel against torch. `added` maps the torch results to the magnitude of the terms
    in sums that may cancel, by the result's position."""
    truth = _in_torch(function, *inputs)
    sizes = added(truth)
    for place, (ours, theirs) in enumerate(zip(_results(function, *inputs), truth, strict=True)):
        assert ours.dtype == theirs.dtype
        relative = float32 if inputs[0].dtype == torch.float32 else 2.0**-7
        # Gradients of norms are differences of terms of magnitude one.
        scale = max(1.0, float(theirs.abs().max()), sizes.get(place, 0.0))
        error = float((ours.double() - theirs.double()).abs().max())
        assert error <= relative * scale, (error, scale)


def _activations(seed: int, shape: Sequence[int], dtype: torch.dtype, order: str) -> Tensor:
    """[B, S, C] noise, in one of the memory orders that occur."""
    generator = torch.Generator().manual_seed(seed)
    batch, length, channels = shape
    if order == "sequence first":
        return torch.randn(length, batch, channels, generator=generator).to(dtype).transpose(0, 1)
    if order == "part of a wider row":
        wide = torch.randn(length, batch, channels + 9, generator=generator).to(dtype)
        return wide.transpose(0, 1)[..., 5 : 5 + channels]
    return torch.randn(batch, length, channels, generator=generator).to(dtype)


def _inputs(channels: list[int]) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "shape": st.tuples(st.integers(1, 3), st.integers(1, 140), st.sampled_from(channels)),
            "dtype": st.sampled_from(DTYPES),
            "order": st.sampled_from(["rows", "sequence first", "part of a wider row"]),
        }
    )


@settings(max_examples=25, deadline=None)
@given(_inputs([8, 128, 200]), st.integers(1, 4), st.booleans())
def test_convolution(inputs: dict, taps: int, with_documents: bool) -> None:
    x = _activations(**inputs)
    generator = torch.Generator().manual_seed(inputs["seed"])
    weight = torch.randn(x.shape[2], taps, generator=generator).to(x.dtype)
    bias = torch.randn(x.shape[2], generator=generator).to(x.dtype)
    ids = None
    if with_documents:
        ids = (torch.rand(x.shape[:2], generator=generator) < 0.2).cumsum(1)
    _assert_same(partial(causal_conv, document_ids_BS=ids), x, weight, bias)


@settings(max_examples=25, deadline=None)
@given(_inputs([8, 128, 200]), st.sampled_from([1, 2, 4]))
def test_norms(inputs: dict, groups: int) -> None:
    y, gate = _activations(**inputs), _activations(**{**inputs, "seed": inputs["seed"] + 1})
    weight = torch.randn(y.shape[2], generator=torch.Generator().manual_seed(3)).to(y.dtype)
    options = {"group_size": y.shape[2] // groups, "epsilon": 1e-5}
    _assert_same(partial(gated_rms_norm, **options), y, gate, weight)
    _assert_same(partial(rms_norm, epsilon=1e-5), y, weight)


@settings(max_examples=25, deadline=None)
@given(
    _inputs([160]).map(lambda inputs: inputs | {"dtype": torch.float32}),
    st.sampled_from([16, 64]),
    st.booleans(),
    st.booleans(),
)
def test_scan(inputs: dict, chunk_size: int, with_documents: bool, with_steep: bool) -> None:
    """Two groups of two heads of 40 channels, state size 8. The tolerance is wider: the rounding of
    an operand propagates through three products. tests/model/mamba/test_core.py compares BF16 with
    FP32."""
    x = _activations(**inputs).unflatten(-1, (4, 40))
    generator = torch.Generator().manual_seed(inputs["seed"])
    dt = torch.rand(x.shape[:3], generator=generator)
    A, D = -torch.rand(4, generator=generator), torch.randn(4, generator=generator)
    if with_steep:
        A[1] = -30.0
    B, C = (torch.randn(2, *x.shape[:2], 2, 8, generator=generator) / 3).to(x.dtype).unbind()
    ids = None
    if with_documents:
        ids = (torch.rand(x.shape[:2], generator=generator) < 0.1).cumsum(1)
    options = {"chunk_size": chunk_size, "document_ids_BS": ids}

    def added(results: list[Tensor]) -> dict[int, float]:
        """A's gradient: the sum over all tokens of dt times the gradient of dt through dt A."""
        terms_BSH = dt * results[2] / A
        return {3: float(terms_BSH.abs().sum((0, 1)).max())}

    _assert_same(partial(ssd, **options), x, dt, A, B, C, D, float32=1e-5, added=added)


@settings(max_examples=25, deadline=None)
@given(_inputs([8, 200]), st.booleans())
def test_activation(inputs: dict, with_weight: bool) -> None:
    """The activation of the experts, one expert per row of the batch, and of the shared expert."""
    x = _activations(**inputs)
    first, second = torch.randn(2, x.shape[0], 24, x.shape[2]).to(x.dtype) / 5
    weight = torch.rand(x.shape[:2]).flatten()
    rows, counts = x.flatten(0, 1), [x.shape[1]] * x.shape[0]

    def experts(rows: Tensor, first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        routing = weight if with_weight else None
        return grouped_mlp(rows, counts, first, second.mT, routing) + 0 * weight.sum()

    if rows.dtype == torch.float32:
        _assert_same(experts, rows, first, second, weight, float32=1e-5)
    _assert_same(squared_relu, x)


@settings(max_examples=25, deadline=None)
@given(_inputs([8, 200, 2049]))
def test_cross_entropy(inputs: dict) -> None:
    """Includes labels outside the vocabulary, as with labels of other ranks."""
    logits = _activations(**inputs) * 5
    labels = torch.randint(-3, logits.shape[2] + 3, logits.shape[:2])
    # The gradient overwrites the logits, so each call gets its own copy.
    _assert_same(lambda t: vocab_parallel_cross_entropy(t.clone(), labels), logits)


def test_the_number_of_threads_changes_no_bit() -> None:
    x, gate = torch.randn(2, 3, 700, 200).unbind()
    weight, bias = torch.randn(200, 4), torch.randn(200)
    scan = (x.unflatten(-1, (4, 50)), torch.rand(3, 700, 4), -torch.rand(4))
    scan += (*torch.randn(2, 3, 700, 2, 8).unbind(), torch.randn(4))
    labels = torch.randint(0, 200, (3, 700))
    before, results = torch.get_num_threads(), []
    gated = partial(gated_rms_norm, group_size=50, epsilon=1e-5)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            passes = [
                (causal_conv, x, weight, bias),
                (gated, x, gate, bias),
                (partial(rms_norm, epsilon=1e-5), x, bias),
                (partial(ssd, chunk_size=64), *scan),
                (squared_relu, x),
                (lambda t: vocab_parallel_cross_entropy(t.clone(), labels), x),
            ]
            results.append([t for call in passes for t in _results(*call)])
    finally:
        torch.set_num_threads(before)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_extreme_numbers() -> None:
    """SiLU where e^x over- or underflows, and NaN, which must not be lost."""
    x = torch.tensor([-1e30, -200.0, -89.0, -1.0, 0.0, 1.0, 89.0, 200.0, 1e30, float("nan")])
    x = x.view(1, 10, 1)
    one, zero = torch.ones(1, 1), torch.zeros(1)
    ours, theirs = _results(causal_conv, x, one, zero), _in_torch(causal_conv, x, one, zero)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-6, atol=1e-6, equal_nan=True)


def test_results_are_rounded_to_bfloat16_as_torch_does() -> None:
    """Ties to even, in every binade, also next to a change of it; halves of the smallest numbers,
    infinity and NaN. The activation of 1 with weight w is w, so this is the rounding alone."""
    exact = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    halves = exact.float().view(torch.int32).add(1 << 15).view(torch.float32)
    weights = torch.cat([exact.float(), halves, torch.nextafter(halves, torch.zeros(()))])
    rounded = training_kernels.squared_relu(torch.ones(len(weights), 1).bfloat16(), weights)[:, 0]
    expected = weights.bfloat16()
    assert torch.equal(rounded.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(rounded[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_a_shared_cache_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled libraries are stored where only this user can write, and loaded from nowhere
    else."""
    from nemotron_train.kernels import compilation

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "source" / "one.c"
    source.parent.mkdir()
    source.write_text("int one(void) { return 1; }\n")

    def one() -> int:
        built = compilation.library.__wrapped__((source,), ("-O1",))
        assert built is not None
        return built.one()

    assert one() == 1
    (kept,) = (tmp_path / "nemotron-train").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert one() == 1 and kept.stat().st_mtime_ns == stamp, "kept for the next process"
    source.write_text("int one(void) { return 2; }\n")
    assert one() == 2, "another source is another library"
    source.write_text('#include "number.h"\nint one(void) { return NUMBER; }\n')
    for number in (3, 4):
        (source.parent / "number.h").write_text(f"#define NUMBER {number}\n")
        assert one() == number, "another header is another library"
    source.write_text("int one(void) { return 1; }\n")
    (source.parent / "number.h").unlink()
    kept.unlink()
    kept.write_bytes(b"not a library")
    kept.parent.chmod(0o777)
    assert one() == 1, "others can write there: not loaded"
    assert kept.read_bytes() == b"not a library"
