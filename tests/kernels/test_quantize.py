"""The compiled quantizers against the equivalent torch operators, bit for bit.

Not covered: code for another processor or from another compiler; only a run there tests it.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_train.kernels import compilation
from nemotron_train.kernels import quantize as quantize_kernels
from nemotron_train.precision import mxfp8, nvfp4
from nemotron_train.precision.gemm import Operand
from nemotron_train.precision.rounding import RandomWords

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (("1d", -1), ("1d", 0), ("2d", -1))
KINDS = ("plain", "tailed", "ties", "subnormal", "zeros", "largest", "infinite", "nan")

needs_compiler = pytest.mark.skipif(
    not quantize_kernels.can_quantize(), reason="no C compiler here"
)


@st.composite
def _matrices(draw: st.DrawFn) -> Tensor:
    """Sizes on both sides of a block, a strip and a tile; every dtype and kind of number."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS))
    x = torch.randn(rows, columns, generator=generator)
    if kind == "tailed":
        x = x * (6 * torch.randn(rows, columns, generator=generator)).exp()
    elif kind == "ties":
        x = (x * 8).round() / 2
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).smallest_normal
    elif kind == "zeros":
        x[:, ::2] = -0.0
        x[: rows // 2] = 0
    elif kind == "largest":
        x = (x * torch.finfo(dtype).max).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    elif kind in ("infinite", "nan"):
        x[rows // 2, columns // 2] = math.inf if kind == "infinite" else math.nan
    return x.to(dtype)


def _in_torch(quantize, *arguments, **options):
    """The result of `quantize` with torch operators, also on a machine that has a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_kernels, "quantize_library", lambda: None)
        return quantize(*arguments, **options)


def _assert_same(ours: Operand, theirs: Operand) -> None:
    """Equal bits, except for the payload of a NaN."""
    assert ours.divisor == theirs.divisor
    for one, other in ((ours.values, theirs.values), (ours.scale, theirs.scale)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))
        assert torch.equal(one.signbit()[~one.isnan()], other.signbit()[~other.isnan()])


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(x=_matrices(), layout=st.sampled_from(LAYOUTS), seed=st.none() | st.integers(0, 2**64 - 1))
def test_nvfp4(x: Tensor, layout, seed: int | None) -> None:
    block, dim = layout
    words = None
    if seed is not None:
        row, column = seed % 1000003, seed % 10007  # any position in the whole matrix
        words = RandomWords(seed, seed % (2**32 - 5), seed % 65537, row, column)
    options = {"block": block, "dim": dim, "random_words": words}
    _assert_same(nvfp4.nvfp4_operand(x, **options), _in_torch(nvfp4.nvfp4_operand, x, **options))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(x=_matrices(), block=st.sampled_from(["1d", "2d"]))
def test_nvfp4_codes(x: Tensor, block) -> None:
    ours = nvfp4.quantize_nvfp4(x, block=block)
    theirs = _in_torch(nvfp4.quantize_nvfp4, x, block=block)
    assert torch.equal(ours.amax, theirs.amax) or (ours.amax.isnan() and theirs.amax.isnan())
    for one, other in ((ours.codes, theirs.codes), (ours.scales, theirs.scales)):
        assert one.dtype == other.dtype and torch.equal(one, other)


@needs_compiler
@settings(max_examples=100, deadline=None)
@given(x=_matrices(), dim=st.sampled_from([-1, 0]))
def test_mxfp8(x: Tensor, dim) -> None:
    _assert_same(mxfp8.mxfp8_operand(x, dim=dim), _in_torch(mxfp8.mxfp8_operand, x, dim=dim))


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_stacked_tensors(layout, stochastic: bool) -> None:
    """Experts of several sizes, one without tokens, each with another magnitude."""
    block, dim = layout
    rows = torch.tensor([32, 0, 96, 16] if (block, dim) != ("1d", -1) else [31, 0, 97, 16])
    x = torch.randn(144, 72).bfloat16()
    x *= torch.tensor([1e-3, 1.0, 50.0, 1e4]).repeat_interleave(rows)[:, None].bfloat16()
    options = {"block": block, "dim": dim, "rows_per_tensor": rows}
    options["random_words"] = RandomWords(3, 4) if stochastic else None
    ours = nvfp4.nvfp4_operand(x, **options)
    _assert_same(ours, _in_torch(nvfp4.nvfp4_operand, x, **options))
    assert ours.scale.shape == (4,)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_on_several_threads(threads: int) -> None:
    x, before = torch.randn(1000, 1296).bfloat16(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for block, dim in LAYOUTS:
            options = {"block": block, "dim": dim, "random_words": RandomWords(1, 2)}
            _assert_same(
                nvfp4.nvfp4_operand(x, **options), _in_torch(nvfp4.nvfp4_operand, x, **options)
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_it_says_so_once_and_the_numbers_stay(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(compilation, "library", compilation.library.__wrapped__)
    with pytest.warns(UserWarning, match="install a C compiler"):
        assert quantize_kernels.quantize_library.__wrapped__() is None
