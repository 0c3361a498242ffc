"""Products of block-scaled operands, emulated with ordinary matrix products.

Owns: the operand that quantizers return, the product of two operands, and where their scales are
applied. Does not own: quantization (nvfp4.py, mxfp8.py), autograd, parallelism
(precision/linear.py).

A 4-bit or 8-bit code times its block scale is exactly a BF16 number: it has few significant bits.
So a BF16 product with an FP32 accumulator equals the block-scaled product, up to the order of the
FP32 sums. The scale of the whole tensor does not fit into BF16, so it multiplies the result.

Shape legend: M rows of the result, N columns of the result, K summed dimension.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Below this many multiplications torch may use, instead of oneDNN, a loop that rounds differently.
_SMALLEST_ONEDNN_PRODUCT = 1 << 16


@dataclass(frozen=True)
class Operand:
    """A quantized matrix as a product takes it. It stands for `values · scale / divisor`.

    values: BF16, exactly codes times block scales. scale: FP32, a scalar tensor for the whole
    matrix; or one per row, or one per expert, where a docstring says so. divisor: 2688 for NVFP4,
    whose scale is the amax; 1 for MXFP8, whose scale is a power of two.
    """

    values: Tensor
    scale: Tensor
    divisor: float

    def t(self) -> "Operand":
        """The transposed matrix; no data moves."""
        return replace(self, values=self.values.t())

    def dequantize(self) -> Tensor:
        """FP32: values · (scale / divisor), finite wherever the true result is. It may differ by an
        ulp or two from `NVFP4Tensor.dequantize`, which rounds as Transformer Engine does."""
        return self.values.float() * (self.scale / _scalar(self.divisor, self.scale))


def product_factor(a: Operand, b: Operand) -> Tensor:
    """FP32 factor, shaped like the scales, by which values_a @ values_b must be multiplied.

    (scale_a · scale_b) / (divisor_a · divisor_b), rounded to FP32 in that order, as Transformer
    Engine's reference does on a CPU. It is a true division on every device, so it may differ by one
    ulp from native kernels, which multiply by a rounded reciprocal. If scale_a · scale_b overflows
    FP32, each scale is divided first; the factor is infinite only if it exceeds FP32 itself.
    """
    factor = a.scale * b.scale / _scalar(a.divisor * b.divisor, a.scale)
    divided_first = (a.scale / _scalar(a.divisor, a.scale)) * (
        b.scale / _scalar(b.divisor, b.scale)
    )
    overflowed = factor.isinf() & a.scale.isfinite() & b.scale.isfinite()
    return torch.where(overflowed, divided_first, factor)


def _scalar(value: float, like: Tensor) -> Tensor:
    """`value` as a tensor: CUDA replaces division by a Python number with a reciprocal product."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def block_scaled_matmul(
    a_MK: Operand,
    b_NK: Operand,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_MN: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """a b^T → [M, N] in out_dtype. The blocks of both operands run along K.

    The FP32 sum is multiplied by `product_factor`, `accumulate_MN` is added in FP32, and the
    result is rounded once. fprop passes (x, w), dgrad (dy, w.t()), wgrad (dy.t(), x.t()), with
    operands quantized along the summed dimension.

    strict: sum the 16-wide blocks of K in order, as Transformer Engine's reference does (qgemm in
    its NVFP4 reference quantizer). For NVFP4 the result then equals the reference bit for bit, but
    is slow. Without strict, only the order of the FP32 sums differs.
    """
    assert a_MK.values.shape[1] == b_NK.values.shape[1], (a_MK.values.shape, b_NK.values.shape)
    factor = product_factor(a_MK, b_NK)
    factor = factor[:, None] if factor.ndim else factor  # one factor per row of a
    a, b = a_MK.values, b_NK.values
    if strict:
        sums_MN = _sum_blocks_in_order(a, b)
    elif a.is_cuda:
        sums_MN = torch.mm(a, b.t(), out_dtype=torch.float32)
    elif (
        out_dtype == torch.bfloat16
        and accumulate_MN is None
        and not factor.ndim
        and _onednn_takes(a, b)
    ):
        # 2.3 times as fast as an FP32 product on a CPU with BF16 instructions. oneDNN scales its
        # FP32 accumulator before it rounds to BF16: one rounding, as below.
        unused = torch.empty(1, dtype=torch.bfloat16)
        return torch.addmm(unused, a, b.t(), beta=0, alpha=factor.item())
    else:
        sums_MN = torch.mm(a.float(), b.float().t())
    result_MN = sums_MN.mul_(factor)
    if accumulate_MN is not None:
        result_MN.add_(accumulate_MN)
    return result_MN.to(out_dtype)


def _onednn_takes(a_MK: Tensor, b_NK: Tensor) -> bool:
    return (
        a_MK.dtype == torch.bfloat16
        and a_MK.shape[0] * b_NK.numel() >= _SMALLEST_ONEDNN_PRODUCT
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _sum_blocks_in_order(a_MK: Tensor, b_NK: Tensor, block: int = 16) -> Tensor:
    """a b^T, summing blocks of K in order: FP32 [M, N]. The product of a 16-wide NVFP4 block is
    exact in FP32 in any order (20 significant bits), so only the order of the blocks matters."""
    sums_MN = torch.zeros(a_MK.shape[0], b_NK.shape[0], device=a_MK.device)
    for start in range(0, a_MK.shape[1], block):
        part = slice(start, start + block)
        sums_MN += a_MK[:, part].float() @ b_NK[:, part].float().t()
    return sums_MN
