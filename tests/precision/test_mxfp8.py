"""MXFP8 against a scalar transcription of the definition, and at the ends of the exponent range.

Not covered: a GPU, and Transformer Engine itself (it has no Python reference of the format).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_train.precision.gemm import block_scaled_matmul
from nemotron_train.precision.mxfp8 import mxfp8_operand, quantize_mxfp8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _scalar_scale(amax: float) -> int:
    """The E8M0 byte: the smallest 2^e ≥ amax · fp32(1/448), e ≥ -127."""
    ratio = float(torch.tensor(amax) * torch.tensor(1 / 448))
    if ratio == 0:
        return 0
    fraction, exponent = math.frexp(ratio)
    return max((exponent - 1 if fraction == 0.5 else exponent) + 127, 0)


@st.composite
def _matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    width = draw(st.sampled_from([0.0, 4.0, 20.0]))
    x = torch.randn(rows, columns, generator=generator)
    x = x * (width * torch.randn(rows, columns, generator=generator)).exp()
    x = x * 2.0 ** draw(st.integers(-140, 100))
    x = x.where(torch.rand(rows, columns, generator=generator) > 0.1, torch.zeros(()).copysign(x))
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


@settings(max_examples=100, deadline=None)
@given(x=_matrices())
def test_agrees_with_the_scalar_definition(x: Tensor) -> None:
    quantized = quantize_mxfp8(x)
    for row in range(x.shape[0]):
        for block, part in enumerate(x[row].split(32)):
            scale = _scalar_scale(float(part.abs().max()))
            assert quantized.scales[row, block] == scale
            # Float64 holds the quotient exactly. torch's cast to E4M3 is the second truth for
            # rounding and for the sign of a zero.
            ratio = (part.double() * 2.0 ** (127 - scale)).clamp(-448, 448)
            expected = ratio.float().to(torch.float8_e4m3fn).view(torch.uint8)
            codes = quantized.codes[row, 32 * block : 32 * block + 32]
            assert torch.equal(codes, expected)


@settings(max_examples=60, deadline=None)
@given(x=_matrices())
def test_operand_equals_packed_tensor_in_both_layouts(x: Tensor) -> None:
    """In float64, where neither the largest nor the smallest block leaves the range."""
    quantized, operand = quantize_mxfp8(x), mxfp8_operand(x)
    wide = (2.0 ** (quantized.scales.double() - 127)).repeat_interleave(32, 1)[:, : x.shape[1]]
    exact = quantized.codes.view(torch.float8_e4m3fn).double() * wide
    ours = operand.values.double() * operand.scale.double()
    lost = wide < operand.scale.double() * 2.0**-117
    assert torch.equal(ours[~lost], exact[~lost]) and (ours[lost] == 0).all()
    assert torch.equal(mxfp8_operand(x.t(), dim=0).t().values, operand.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extreme", ["max", "smallest_normal", "tiny_subnormal"])
def test_extreme_blocks_give_finite_operands(dtype: torch.dtype, extreme: str) -> None:
    """At FP32's or BF16's largest number the dequantized block is infinite. The operand is finite,
    because it stores the power of two separately."""
    info = torch.finfo(dtype)
    number = info.smallest_normal / 4 if extreme == "tiny_subnormal" else getattr(info, extreme)
    x = torch.full((2, 32), number, dtype=dtype)
    operand = mxfp8_operand(x)
    assert operand.values.isfinite().all() and (operand.values != 0).all()
    ratio = operand.values.double() * operand.scale.double() / x.double()
    assert ((ratio - 1).abs() <= 1 / 16).all()


def test_error_is_within_half_a_step() -> None:
    x = torch.randn(16, 64)
    error = (quantize_mxfp8(x).dequantize() - x).abs()
    scales = (2.0 ** (quantize_mxfp8(x).scales.float() - 127)).repeat_interleave(32, 1)
    assert (error <= torch.maximum(x.abs() / 16, scales * 2.0**-10)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_its_product_not_finite(bad: float) -> None:
    x = torch.randn(16, 64)
    x[0, 3] = bad
    y = block_scaled_matmul(mxfp8_operand(x), mxfp8_operand(torch.randn(16, 64).abs() + 1))
    assert not y[0].isfinite().all()


def test_three_dimensions_zeros_empty_and_odd_sizes() -> None:
    for dim in (-1, 0):
        assert mxfp8_operand(torch.zeros(0, 64), dim=dim).values.shape == (0, 64)
    x = torch.randn(3, 5, 40).half()
    assert quantize_mxfp8(x).dequantize().shape == x.shape
    assert mxfp8_operand(x, dim=0).values.shape == x.shape
    assert torch.equal(mxfp8_operand(torch.zeros(3, 33)).values.float(), torch.zeros(3, 33))
