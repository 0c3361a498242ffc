"""NVFP4 on tensors without a golden vector: against a scalar transcription of the definition in
NumPy, and by its algebraic properties.

Not covered: a GPU; agreement with native kernels on NaN and infinity, which is undefined.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_train.precision.hadamard import hadamard
from nemotron_train.precision.nvfp4 import (
    E2M1_VALUES,
    nvfp4_operand,
    quantize_nvfp4,
    round_e2m1,
)

FLOAT = np.float32
FLOAT_MAX = np.finfo(FLOAT).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIDPOINTS = [(low + high) / 2 for low, high in itertools.pairwise(E2M1_VALUES)]


def _scalar_code(z: float) -> int:
    """Nearest by comparison with the midpoints. A tie goes to the even code."""
    magnitude = abs(z)
    code = sum(magnitude > middle for middle in MIDPOINTS)
    if magnitude in MIDPOINTS and code % 2 == 1:
        code += 1
    return code | (8 if z < 0 else 0)


def _scalar_e4m3(value: np.floating) -> float:
    """Nearest number of E4M3, ties to even, computed with integers. The value is in 0 ... 448."""
    exponent = max(math.frexp(float(value))[1] - 1, -6) if value else -6
    return round(math.ldexp(float(value), 3 - exponent)) * math.ldexp(1.0, exponent - 3)


def _scalar_quantize(x: Tensor, height: int) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and block scales of a matrix by the definition, one number at a time."""
    numbers = x.float().numpy()
    with np.errstate(all="ignore"):
        encode_all = min(FLOAT(2688) / np.abs(numbers).max(), FLOAT_MAX) or FLOAT(1)
        decode_all = FLOAT(1) / encode_all
        codes = [[0] * x.shape[1] for _ in range(x.shape[0])]
        scales = [[0.0] * -(-x.shape[1] // 16) for _ in range(x.shape[0])]
        for row in range(x.shape[0]):
            top = row - row % height
            for column in range(x.shape[1]):
                left = column - column % 16
                amax = np.abs(numbers[top : top + height, left : left + 16]).max()
                scale = amax * (encode_all * (FLOAT(1) / FLOAT(6)))
                scale = _scalar_e4m3(min(scale, FLOAT(448)))
                encode = min(FLOAT(1) / (FLOAT(scale) * decode_all), FLOAT_MAX)
                codes[row][column] = _scalar_code(float(numbers[row, column] * encode))
                scales[row][column // 16] = scale
    return codes, scales


@st.composite
def _matrices(draw: st.DrawFn) -> Tensor:
    """Tiny matrices of every dtype: ordinary, heavy-tailed, on ties, subnormal, with zero blocks,
    near the largest number."""
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    x = torch.randn(rows, columns, generator=generator)
    kind = draw(st.sampled_from(["plain", "tailed", "ties", "subnormal", "zeros", "largest"]))
    if kind == "tailed":
        x = x * (4 * torch.randn(rows, columns, generator=generator)).exp()
    elif kind == "ties":
        x = (x * 8).round() / 2
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).smallest_normal
    elif kind == "zeros":
        x[:, :16] = 0
        x[::3] = 0
    elif kind == "largest":
        x = (x * torch.finfo(dtype).max).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def _words(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)


@settings(max_examples=80, deadline=None)
@given(x=_matrices(), block=st.sampled_from(["1d", "2d"]))
def test_agrees_with_the_scalar_definition(x: Tensor, block) -> None:
    quantized = quantize_nvfp4(x, block=block)
    codes, scales = _scalar_quantize(x, 16 if block == "2d" else 1)
    assert quantized.unpacked_codes().tolist() == codes
    ours = quantized.scales.view(torch.float8_e4m3fn).float()
    assert ours[: x.shape[0]].tolist() == scales
    # Codes of 6 decode to amax up to an ulp. The result may be infinite only at the very end of
    # FP32's range.
    assert quantized.amax > 3.4e38 or quantized.operand().dequantize().isfinite().all()


@settings(max_examples=80, deadline=None)
@given(x=_matrices(), block=st.sampled_from(["1d", "2d"]), stochastic=st.booleans())
def test_operand_equals_packed_tensor_in_both_layouts(x: Tensor, block, stochastic: bool) -> None:
    words = _words(x, 1) if stochastic else None
    packed = quantize_nvfp4(x, block=block, random_words=words).operand()
    fused = nvfp4_operand(x, block=block, random_words=words)
    transposed_words = None if words is None else words.t().contiguous()
    other = nvfp4_operand(x.t(), block=block, dim=0, random_words=transposed_words).t()
    for operand in (fused, other):
        assert torch.equal(operand.values.view(torch.int16), packed.values.view(torch.int16))
        assert torch.equal(operand.scale, packed.scale)


@settings(max_examples=60, deadline=None)
@given(x=_matrices())
def test_two_dimensional_blocks_are_the_same_in_both_orientations(x: Tensor) -> None:
    rows, columns = quantize_nvfp4(x, block="2d"), quantize_nvfp4(x.t(), block="2d")
    # The values are compared, not the raw codes: where the product underflows, padding differs only
    # in zeros.
    assert torch.equal(rows.unpacked_codes(), columns.unpacked_codes().t())


@settings(max_examples=60, deadline=None)
@given(x=_matrices())
def test_sign_symmetry(x: Tensor) -> None:
    plus, minus = quantize_nvfp4(x), quantize_nvfp4(-x)
    assert torch.equal(plus.scales, minus.scales)
    assert torch.equal(plus.operand().values, -minus.operand().values)
    words = _words(x, 2)
    plus, minus = nvfp4_operand(x, random_words=words), nvfp4_operand(-x, random_words=words)
    assert torch.equal(plus.values, -minus.values)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-60, 60), stochastic=st.booleans())
def test_scaling_by_a_power_of_two_changes_only_the_amax(
    seed: int, exponent: int, stochastic: bool
) -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed))
    words = _words(x, seed) if stochastic else None
    small = quantize_nvfp4(x, random_words=words)
    large = quantize_nvfp4(x * 2.0**exponent, random_words=words)
    assert torch.equal(small.codes, large.codes) and torch.equal(small.scales, large.scales)
    assert torch.equal(small.amax * 2.0**exponent, large.amax)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), block=st.sampled_from(["1d", "2d"]))
def test_error_is_within_half_a_step_of_the_block(seed: int, block) -> None:
    """The step at a number is 0.5, 1 or 2 of its block's scale. Saturation adds the rounding of the
    scale to E4M3, 2^-4 of it where that is normal."""
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(seed))
    quantized = quantize_nvfp4(x, block=block)
    scales = quantized.scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
    scales = scales * quantized.amax / 2688
    magnitude = (x / scales).abs()
    half_step = torch.where(magnitude < 2, 0.25, torch.where(magnitude < 4, 0.5, 1.0))
    error = (quantized.dequantize() - x).abs() / scales
    assert (error <= half_step * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_quantizing_the_dequantized_changes_no_number(seed: int) -> None:
    """Idempotence for tensors whose own maximum is a number of the format: every block scale is
    then a product of FP32 numbers that rounds back to itself."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    once = quantize_nvfp4(x).dequantize()
    amax = quantize_nvfp4(x).amax
    twice = quantize_nvfp4(once, amax=amax).dequantize()
    # A block whose largest code is below 6 gets a smaller scale the second time. Only the blocks
    # that reach 6, nearly all, must not change.
    reached = quantize_nvfp4(x).unpacked_codes().bitwise_and(7).view(8, 4, 16).amax(-1) == 7
    assert reached.float().mean() > 0.5
    kept = reached.repeat_interleave(16, 1)
    assert torch.equal(once[kept], twice[kept])


@settings(max_examples=40, deadline=None)
@given(x=_matrices(), rows=st.integers(0, 20))
def test_rows_do_not_depend_on_their_neighbours(x: Tensor, rows: int) -> None:
    """With a given amax, quantizing a part gives the part of the whole: independent of batch and
    chunk."""
    amax = x.float().abs().amax()
    whole = nvfp4_operand(x, amax=amax).values
    if 0 < rows < x.shape[0]:
        parts = [nvfp4_operand(part, amax=amax).values for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), whole)


def test_every_step_of_the_grid_is_met_stochastically_without_bias_beyond_one_word() -> None:
    """All 256 words at once: only the two neighbours occur, and the mean is at most 1/256 step
    low."""
    x = torch.linspace(-6, 6, 1201)
    words = torch.arange(256).to(torch.uint8).expand(1201, 256)
    rounded = round_e2m1(x[:, None].expand(1201, 256).contiguous(), words)
    grid = torch.tensor(sorted({*E2M1_VALUES, *(-value for value in E2M1_VALUES)}))
    below = grid[torch.searchsorted(grid, x, right=True) - 1]
    above = grid[torch.searchsorted(grid, x)]
    assert ((rounded == below[:, None]) | (rounded == above[:, None])).all()
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    shortfall = (x.abs() - rounded.abs().mean(1)) / step
    assert shortfall.min() > -1e-6 and shortfall.max() <= 1 / 256 + 1e-6
    assert shortfall.max() > 0.5 / 256, "the known bias of a word that never reaches 1"


def test_three_dimensions_are_rows_of_the_last() -> None:
    x = torch.randn(4, 6, 48).bfloat16()
    flat = quantize_nvfp4(x.view(24, 48))
    assert torch.equal(quantize_nvfp4(x).codes, flat.codes)
    assert quantize_nvfp4(x).dequantize().shape == x.shape
    assert nvfp4_operand(x, dim=0).values.shape == x.shape
    columns = nvfp4_operand(x.view(24, 48), dim=0).values
    assert torch.equal(nvfp4_operand(x, dim=0).values.view(24, 48), columns)


def test_large_tensors_are_quantized_in_chunks_like_small_ones() -> None:
    x = torch.randn(2064, 272).bfloat16()
    words = _words(x, 3)
    for block, dim in (("1d", -1), ("1d", 0), ("2d", -1)):
        whole = nvfp4_operand(x, block=block, dim=dim, random_words=words)
        parts = [
            nvfp4_operand(x_part, block=block, dim=dim, random_words=words_part, amax=whole.scale)
            for x_part, words_part in zip(x.split(48), words.split(48), strict=True)
        ]
        assert torch.equal(torch.cat([part.values for part in parts]), whole.values)


def test_amax_over_ranks_gives_each_rank_its_rows_of_the_whole() -> None:
    x = torch.randn(32, 64).bfloat16()
    whole = quantize_nvfp4(x)
    for rank, part in enumerate(x.split(16)):
        mine = quantize_nvfp4(part, reduce_amax=lambda amax: torch.maximum(amax, whole.amax))
        assert torch.equal(mine.codes, whole.codes[16 * rank : 16 * rank + 16])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_its_product_not_finite(bad: float) -> None:
    x = torch.randn(2, 32).bfloat16()
    x[0, 3] = bad
    operand = nvfp4_operand(x)
    assert not (operand.values.float() * operand.scale).isfinite().all()
    assert not quantize_nvfp4(x).dequantize().isfinite().all()


def test_empty_and_all_zero_tensors() -> None:
    for block, dim in (("1d", -1), ("1d", 0), ("2d", -1)):
        assert nvfp4_operand(torch.zeros(0, 32), block=block, dim=dim).values.shape == (0, 32)
    assert quantize_nvfp4(torch.zeros(0, 32)).codes.shape == (0, 16)
    zero = quantize_nvfp4(torch.zeros(3, 20))
    assert zero.codes.count_nonzero() == 0 and torch.equal(zero.dequantize(), torch.zeros(3, 20))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.sampled_from([1, 8, 33, 64]))
def test_hadamard_is_orthogonal_and_the_same_along_either_dimension(
    seed: int, columns: int
) -> None:
    x = torch.randn(48, columns, generator=torch.Generator().manual_seed(seed))
    along_rows = hadamard(x, dim=0)
    torch.testing.assert_close(along_rows, hadamard(x.t().contiguous()).t())
    torch.testing.assert_close(along_rows.t() @ along_rows, x.t() @ x)
    with pytest.raises(AssertionError, match="multiple of 16"):
        hadamard(x[:40], dim=0)
