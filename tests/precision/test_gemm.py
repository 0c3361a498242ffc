"""Products of block-scaled operands against float64 sums of the dequantized numbers.

Not covered: CUDA's product with FP32 output, and a CPU without BF16 instructions (it uses the FP32
product that the tests compare with).
"""

import pytest
import torch

from nemotron_train.precision.gemm import Operand, block_scaled_matmul, product_factor
from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.nvfp4 import nvfp4_operand


def _exact(a: Operand, b: Operand) -> torch.Tensor:
    return (a.values.double() @ b.values.double().t()) * product_factor(a, b).double()


@pytest.mark.parametrize("quantize", [nvfp4_operand, mxfp8_operand])
@pytest.mark.parametrize(
    "size", [(1, 16, 1), (7, 48, 5), (16, 32, 16), (33, 80, 64), (64, 512, 96), (300, 256, 130)]
)
def test_one_rounding_to_the_output_type(quantize, size: tuple[int, int, int]) -> None:
    """FP32: a few units in the last place of the sum's magnitude. BF16: the FP32 result rounded
    once, except where FP32's own error falls on a tie."""
    m, k, n = size
    generator = torch.Generator().manual_seed(m * k + n)
    a = quantize(torch.randn(m, k, generator=generator).bfloat16())
    b = quantize(torch.randn(n, k, generator=generator).bfloat16())
    exact = _exact(a, b)
    single = block_scaled_matmul(a, b, out_dtype=torch.float32)
    magnitude = (a.values.abs().double() @ b.values.abs().double().t()) * product_factor(a, b)
    assert ((single - exact).abs() <= 2.0**-21 * magnitude).all()
    half = block_scaled_matmul(a, b, out_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    once = exact.float().bfloat16()
    assert (half != once).float().mean() < 2e-3
    strict = block_scaled_matmul(a, b, out_dtype=torch.float32, strict=True)
    assert ((strict - exact).abs() <= 2.0**-21 * magnitude).all()


def test_transposed_operands_and_accumulation() -> None:
    x, dy = torch.randn(96, 64).bfloat16(), torch.randn(96, 80).bfloat16()
    a, b = nvfp4_operand(dy, dim=0).t(), nvfp4_operand(x, dim=0).t()
    start = torch.randn(80, 64)
    total = block_scaled_matmul(a, b, out_dtype=torch.float32, accumulate_MN=start)
    torch.testing.assert_close(total.double(), _exact(a, b) + start, rtol=1e-5, atol=1e-4)


def test_factor_of_huge_tensors_is_infinite_only_if_it_must_be() -> None:
    def operand(amax: float) -> Operand:
        return Operand(torch.zeros(1, 16).bfloat16(), torch.tensor(amax), 2688.0)

    huge = product_factor(operand(3e19), operand(3e19))
    torch.testing.assert_close(huge, torch.tensor(9e38 / 2688**2))
    assert product_factor(operand(3e38), operand(3e38)).isinf()
    assert product_factor(operand(0.0), operand(3e38)) == 0


def test_products_agree_with_the_bfloat16_product_they_replace() -> None:
    """A sanity bound: NVFP4's relative error on normal data is near 13%, MXFP8's near 4%."""
    x, w = torch.randn(128, 512).bfloat16(), torch.randn(256, 512).bfloat16()
    truth = x.double() @ w.double().t()
    for quantize, bound in ((nvfp4_operand, 0.16), (mxfp8_operand, 0.05)):
        y = block_scaled_matmul(quantize(x), quantize(w))
        error = (y.double() - truth).norm() / truth.norm()
        assert bound / 2 < error < bound
