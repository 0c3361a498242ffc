"""Grouped products of emulated experts, and the rows of each expert in a stacked operand.

Owns: the padded layout of the rows (`padded_rows`) and the products over it. Does not own: the
operands (`experts`), the Triton kernels (`kernels.triton.grouped`).

On a GPU with Triton the number of rows of each expert stays on the device: nobody waits. The
stacked tensor then has as many rows as the padding could need at most, and those that are left over
are rows of zeros of the last expert. Otherwise the host knows the rows, and on a GPU waits for them
once for each call of the experts.

Shapes: T tokens sorted by expert, P the same with padding, E experts, I and J the widths of a
product.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron_train.kernels.triton import available
from nemotron_train.platform.device import to_device
from nemotron_train.precision.gemm import Operand, product_factor

ROW_MULTIPLE = 32  # rows of an expert are padded to a multiple of this


@dataclass(frozen=True)
class Rows:
    """The rows of each expert in a stacked tensor: int64 [E] on its device; `total` is their sum.
    `lengths`: the same in host memory; None where only the device knows them."""

    per_expert_E: Tensor
    total: int
    lengths: list[int] | None

    def on_host(self) -> list[int]:
        """SYNC on a GPU."""
        return self.per_expert_E.tolist() if self.lengths is None else self.lengths

    def repeat(self, numbers_E: Tensor) -> Tensor:
        """One number per expert -> one per row, [P]."""
        return numbers_E.repeat_interleave(self.per_expert_E, output_size=self.total)


def padded_rows(counts_E: Tensor, tokens_TD: Tensor) -> tuple[Rows, Tensor]:
    """The rows of experts that have `counts_E` of the T tokens, each padded to a multiple of
    ROW_MULTIPLE; and the row of each token, int64 [T]."""
    device, num_tokens = tokens_TD.device, len(tokens_TD)
    if available.can_use(tokens_TD):
        counts_E = (
            counts_E if counts_E.is_cuda == tokens_TD.is_cuda else to_device(counts_E, device)
        )
        counts_E = counts_E.long()
        padded_E = _padded(counts_E)
        most = num_tokens + len(counts_E) * (ROW_MULTIPLE - 1)
        total = -(-most // ROW_MULTIPLE) * ROW_MULTIPLE
        shift_E = padded_E.cumsum(0) - padded_E - (counts_E.cumsum(0) - counts_E)
        per_expert_E = padded_E.clone()
        per_expert_E[-1] += total - padded_E.sum()
        rows = Rows(per_expert_E, total, None)
        shift_T = shift_E.repeat_interleave(counts_E, output_size=num_tokens)
        return rows, torch.arange(num_tokens, device=device) + shift_T
    counts_E = torch.tensor(counts_E.tolist())
    padded_E = _padded(counts_E)
    lengths = padded_E.tolist()
    shift_E = padded_E.cumsum(0) - padded_E - (counts_E.cumsum(0) - counts_E)
    rows_T = torch.arange(num_tokens) + shift_E.repeat_interleave(counts_E)
    return Rows(to_device(padded_E, device), sum(lengths), lengths), to_device(rows_T, device)


def _padded(counts_E: Tensor) -> Tensor:
    return (counts_E + (ROW_MULTIPLE - 1)) // ROW_MULTIPLE * ROW_MULTIPLE


def grouped_product(a: Operand, b: Operand, b_EIJ: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """factor_e a_e b_e of every expert -> [P, J] in like's dtype.

    The rows of all a_e are stacked. b_EIJ: b's values, transposed or not.

    Without Triton it is one product per expert. A batched BF16 product would round before the
    factor and again after it. A batched FP32 product, with padding to equal sizes, measured no
    faster.
    """
    factors_E = product_factor(a, b)
    if rows.lengths is None:
        return _on_device(a.values, b_EIJ, rows.repeat(factors_E), rows, like)
    out = like.new_empty(rows.total, b_EIJ.shape[2])
    parts = zip(out.split(rows.lengths), a.values.split(rows.lengths), b_EIJ, strict=True)
    for (part, a_PI, b_IJ), factor in zip(parts, _numbers(factors_E), strict=True):
        _scaled_product(part, a_PI, b_IJ, factor)
    return out


def grouped_product_per_token(x: Operand, w: Operand, rows: Rows, like: Tensor) -> Tensor:
    """x_e w_e^T of every expert -> [P, N] in like's dtype, for x with one scale per row.

    Each FP32 sum is multiplied by its row's factor and rounded once.
    """
    factors_P = product_factor(x, replace(w, scale=rows.repeat(w.scale)))
    if rows.lengths is None:
        return _on_device(x.values, w.values.transpose(1, 2), factors_P, rows, like)
    sums = torch.empty(rows.total, w.values.shape[1], device=like.device)
    parts = zip(sums.split(rows.lengths), x.values.split(rows.lengths), w.values, strict=True)
    for part, x_PK, w_NK in parts:
        if len(x_PK):
            torch.mm(x_PK.float(), w_NK.float().t(), out=part)
    return sums.mul_(factors_P[:, None]).to(like.dtype)


def grouped_outer_product(a: Operand, b: Operand, rows: Rows, like: Tensor) -> Tensor:
    """factor_e a_e^T b_e of every expert -> [E, I, J] in like's dtype; zero for an expert without
    rows."""
    factors_E = product_factor(a, b)
    if rows.lengths is None:
        from nemotron_train.kernels.triton import grouped

        b_values = b.values.to(a.values.dtype)
        return grouped.grouped_outer_product(
            a.values, b_values, factors_E.contiguous(), rows.per_expert_E, like.dtype
        )
    out = torch.zeros_like(like)
    parts = zip(out, a.values.split(rows.lengths), b.values.split(rows.lengths), strict=True)
    for (part, a_PI, b_PJ), factor in zip(parts, _numbers(factors_E), strict=True):
        _scaled_product(part, a_PI.t(), b_PJ, factor)
    return out


def _on_device(a_PI: Tensor, b_EIJ: Tensor, factors_P: Tensor, rows: Rows, like: Tensor) -> Tensor:
    from nemotron_train.kernels.triton import grouped

    b_EIJ = b_EIJ.to(a_PI.dtype)
    return grouped.grouped_product(
        a_PI, b_EIJ, factors_P.contiguous(), rows.per_expert_E, like.dtype
    )


def _numbers(factors_E: Tensor) -> list[float] | list[Tensor]:
    """Each factor: a number on a CPU, for one call of a product; on a GPU one that stays there."""
    return list(factors_E) if factors_E.is_cuda else factors_E.tolist()


def _scaled_product(out: Tensor, a: Tensor, b: Tensor, factor: float | Tensor) -> None:
    """out = factor * a @ b. One rounding only, if the kernel scales its FP32 accumulator."""
    if not a.numel():
        return
    b = b.to(a.dtype)
    if isinstance(factor, Tensor):  # on a GPU
        is_narrow = a.dtype == torch.bfloat16
        sums = torch.mm(a, b, out_dtype=torch.float32) if is_narrow else torch.mm(a, b)
        out.copy_(sums.mul_(factor))
        return
    if a.dtype == torch.bfloat16 and out.dtype == torch.float32:
        a, b = a.float(), b.float()
    torch.addmm(out, a, b, beta=0, alpha=factor, out=out)
