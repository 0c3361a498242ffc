"""Products of block-scaled operands, emulated with ordinary matrix products.

Owns: the operand that quantizers hand over, the product of two and where its scale is applied.
Does not own: quantization (nvfp4.py, mxfp8.py), autograd or parallelism (precision/linear.py).

A 4-bit or 8-bit code times its block's scale has few enough significant bits to be exactly a
BF16 number, so a BF16 product with an FP32 accumulator is the block-scaled product up to the
order of its FP32 sums. The scale of the whole tensor would not fit: it multiplies the result.

Shape legend: M rows of the result, N columns of the result, K summed dimension.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Below this many multiplications torch may leave oneDNN for a loop that rounds elsewhere.
_SMALLEST_ONEDNN_PRODUCT = 1 << 16


@dataclass(frozen=True)
class Operand:
    """A quantized matrix as a product takes it: the number is `values · scale / divisor`.

    values: BF16, codes times block scales, exactly. scale: FP32 scalar tensor of the whole
    matrix; or of each row, or of each expert (where one of either is spoken of). divisor: 2688 for
    NVFP4, whose scale is the largest magnitude; 1 for MXFP8, whose scale is a power of two.
    """

    values: Tensor
    scale: Tensor
    divisor: float

    def t(self) -> "Operand":
        """The transposed matrix; no data moves."""
        return replace(self, values=self.values.t())

    def dequantize(self) -> Tensor:
        """FP32: values · (scale / divisor), finite wherever the numbers are. NVFP4Tensor has the
        dequantization whose roundings are Transformer Engine's; they differ by an ulp or two."""
        return self.values.float() * (self.scale / _scalar(self.divisor, self.scale))


def product_factor(a: Operand, b: Operand) -> Tensor:
    """FP32 scalar tensor that turns values_a @ values_b into the product of the numbers.

    (scale_a · scale_b) / (divisor_a · divisor_b), rounded to FP32 in that order as Transformer
    Engine's reference does on a CPU; a true division on every device, so it may differ by one ulp
    from native kernels, which multiply by a rounded reciprocal. Where scale_a · scale_b leaves
    FP32's range each scale is divided first; a factor is infinite only if it must be.
    """
    together = a.scale * b.scale / _scalar(a.divisor * b.divisor, a.scale)
    apart = (a.scale / _scalar(a.divisor, a.scale)) * (b.scale / _scalar(b.divisor, b.scale))
    overflowed = together.isinf() & a.scale.isfinite() & b.scale.isfinite()
    return torch.where(overflowed, apart, together)


def _scalar(value: float, like: Tensor) -> Tensor:
    """As a tensor: CUDA divides by a Python number as a multiplication by its reciprocal."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def block_scaled_matmul(
    a_MK: Operand,
    b_NK: Operand,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_MN: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """a b^T → [M, N] of out_dtype; both operands' blocks run along K.

    The FP32 sum is multiplied by `product_factor`, `accumulate_MN` is added in FP32, and the
    result is rounded once. fprop takes (x, w), dgrad (dy, w.t()), wgrad (dy.t(), x.t()) with
    operands quantized along the summed dimension.

    strict: sum 16-wide blocks of K in order, as Transformer Engine's reference does (qgemm in
    its NVFP4 reference quantizer): equal to it bit for bit for NVFP4, and slow. Otherwise only
    the order of the FP32 sums differs.
    """
    assert a_MK.values.shape[1] == b_NK.values.shape[1], (a_MK.values.shape, b_NK.values.shape)
    factor = product_factor(a_MK, b_NK)
    factor = factor[:, None] if factor.ndim else factor  # of each row of a
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
    """A 16-wide NVFP4 block's product is exact in FP32 in any order (20 significant bits), so
    only the order of the additions between blocks matters."""
    sums_MN = torch.zeros(a_MK.shape[0], b_NK.shape[0], device=a_MK.device)
    for start in range(0, a_MK.shape[1], block):
        part = slice(start, start + block)
        sums_MN += a_MK[:, part].float() @ b_NK[:, part].float().t()
    return sums_MN
