"""Short depthwise causal convolution followed by SiLU, as in Mamba-2, with document resets.

Owns the function, its hand-derived backward and the choice between `causal_conv1d` on CUDA, one
compiled pass on a CPU and PyTorch. Does not own the weights, nor the window of past inputs that
generation carries along.

Shape suffixes: B batch, S tokens, C channels, K kernel taps, R «young» tokens (see below).
"""

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import limit, supports


def causal_conv(
    x_BSC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    *,
    document_ids_BS: Tensor | None = None,
    initial_BKC: Tensor | None = None,
    force_torch: bool = False,
) -> Tensor:
    """y_t = SiLU(bias + sum_j weight[:, K-1-j] x_{t-j}), j = 0 ... K-1, channel by channel.

    Taps before the first token read `initial_BKC` (the K-1 inputs before it, oldest first; they
    belong to each row's first document) or zero; taps that reach into another document read
    zero. `document_ids_BS` is non-decreasing along S. Sums in FP32 (FP64 with FP64 inputs);
    returns y_BSC in x's dtype and memory order (batch- or sequence-first). x, weight, bias and
    the initial inputs receive gradients.

    On CUDA the `causal_conv1d` package computes it where it is installed, unless `force_torch`.
    """
    if initial_BKC is not None:
        history = initial_BKC.shape[1]
        assert history == weight_CK.shape[1] - 1, "initial_BKC must hold K - 1 inputs"
        x_BSC = torch.cat([initial_BKC.to(x_BSC.dtype), x_BSC], dim=1)
        if document_ids_BS is not None:
            first = document_ids_BS[:, :1].expand(-1, history)
            document_ids_BS = torch.cat([first, document_ids_BS], dim=1)
        y_BSC = causal_conv(
            x_BSC,
            weight_CK,
            bias_C,
            document_ids_BS=document_ids_BS,
            force_torch=force_torch,
        )
        return y_BSC[:, history:]
    fits = x_BSC.dtype != torch.float64 and 2 <= weight_CK.shape[1] <= 4
    if x_BSC.is_cuda and not force_torch and fits and _has_causal_conv1d():
        return _causal_conv1d(x_BSC, weight_CK, bias_C, document_ids_BS)
    if weight_CK.shape[1] <= limit("convolution_max_taps") and supports(x_BSC):
        return _CompiledCausalConv.apply(x_BSC, weight_CK, bias_C, document_ids_BS)  # pyright: ignore
    return _CausalConv.apply(x_BSC, weight_CK, bias_C, document_ids_BS)


@lru_cache(maxsize=1)
def _has_causal_conv1d() -> bool:
    return importlib.util.find_spec("causal_conv1d") is not None


def _causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, document_ids_BS: Tensor | None
) -> Tensor:
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    seq_idx = None
    if document_ids_BS is not None:  # the kernel wants channels last and small indices
        seq_idx = (document_ids_BS - document_ids_BS[:, :1]).to(torch.int32).contiguous()
        x_BSC = x_BSC.contiguous()
    weight_CK, bias_C = weight_CK.to(x_BSC.dtype), bias_C.to(x_BSC.dtype)
    y = causal_conv1d_fn(x_BSC.mT, weight_CK, bias_C, seq_idx=seq_idx, activation="silu")
    return y.mT


class _CompiledCausalConv(torch.autograd.Function):
    """One pass forward and one backward (compiled_passes), which keep nothing but the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor,
        document_ids_BS: Tensor | None,
    ) -> Tensor:
        taps_KC = weight_CK.float().mT.flip(0).contiguous()
        if document_ids_BS is not None:
            document_ids_BS = document_ids_BS.long().contiguous()
        ctx.save_for_backward(x_BSC, taps_KC, bias_C.float().contiguous(), document_ids_BS)
        ctx.dtypes = weight_CK.dtype, bias_C.dtype
        return training_kernels.causal_conv(*ctx.to_save)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dx_BSC, dtaps_KC, dbias_C = training_kernels.causal_conv_backward(
            gradients[0], *ctx.saved_tensors
        )
        weight_dtype, bias_dtype = ctx.dtypes
        return dx_BSC, dtaps_KC.flip(0).mT.to(weight_dtype), dbias_C.to(bias_dtype), None


class _CausalConv(torch.autograd.Function):
    """K shifted multiply-adds over whole rows: three to four times faster on a CPU than conv1d,
    which wants channels first. Row by row, so that the wide temporaries of one row stay in the
    cache and serve the next.

    A token is young if one of its taps reaches into another document. They are few, so the
    full-width passes ignore documents and the young rows are computed apart and written over:
    exact, and no pass carries a mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BSC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor,
        document_ids_BS: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(x_BSC.dtype, torch.float32)
        taps_KC = weight_CK.to(wide).mT.flip(0).contiguous()  # tap j reads x_{t-j}
        bias = bias_C.to(wide)
        # Kept rather than recomputed: K passes against one saved tensor.
        sum_BSC, y_BSC = torch.empty_like(x_BSC), torch.empty_like(x_BSC)
        blocks = _row_blocks(x_BSC)
        x_wide, total = (_scratch(x_BSC, blocks, wide) for _ in range(2))
        for rows in blocks:
            x = _widened(x_BSC[rows], x_wide)
            torch.addcmul(bias, x, taps_KC[0], out=total)
            for j in _shifts(x, taps_KC):
                total[:, j:].addcmul_(x[:, :-j], taps_KC[j])
            young = _young(document_ids_BS, rows, len(taps_KC))
            if young is not None:
                b, t, *sources = young
                rows_RC = torch.addcmul(bias, x[b, t], taps_KC[0])
                for j, same in enumerate(sources, 1):
                    rows_RC.addcmul_(x[b, t - j] * same[:, None], taps_KC[j])
                total[b, t] = rows_RC
            sum_BSC[rows] = total
            y_BSC[rows] = F.silu(total, inplace=True)
        ctx.save_for_backward(x_BSC, taps_KC, sum_BSC, document_ids_BS)
        ctx.dtypes = weight_CK.dtype, bias_C.dtype
        return y_BSC

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x_BSC, taps_KC, sum_BSC, document_ids_BS = ctx.saved_tensors
        dx_BSC = torch.empty_like(x_BSC)
        dtaps_KC, dbias_C = torch.zeros_like(taps_KC), torch.zeros_like(taps_KC[0])
        blocks = _row_blocks(x_BSC)
        x_wide, dy_wide, sum_wide, dsum, dx, product = (
            _scratch(x_BSC, blocks, taps_KC.dtype) for _ in range(6)
        )
        for rows in blocks:
            x = _widened(x_BSC[rows], x_wide)
            dy, total = _widened(gradients[0][rows], dy_wide), _widened(sum_BSC[rows], sum_wide)
            torch.ops.aten.silu_backward(dy, total, grad_input=dsum)
            dbias_C += dsum.sum((0, 1))
            young = _young(document_ids_BS, rows, len(taps_KC))
            drows_RC = None
            if young is not None:
                drows_RC = dsum[young[:2]]
                dsum[young[:2]] = 0
            torch.mul(dsum, taps_KC[0], out=dx)
            dtaps_KC[0] += torch.mul(dsum, x, out=product).sum((0, 1))
            for j in _shifts(x, taps_KC):
                dx[:, :-j].addcmul_(dsum[:, j:], taps_KC[j])
                torch.mul(dsum[:, j:], x[:, :-j], out=product[:, j:])
                # Summing whole rows, zeros included: ten times faster than over a sliced view.
                product[:, :j] = 0
                dtaps_KC[j] += product.sum((0, 1))
            if young is not None and drows_RC is not None:
                b, t, *sources = young
                dx[b, t] += drows_RC * taps_KC[0]
                dtaps_KC[0] += (drows_RC * x[b, t]).sum(0)
                for j, same in enumerate(sources, 1):
                    kept = drows_RC * same[:, None]
                    dx[b, t - j] += kept * taps_KC[j]
                    dtaps_KC[j] += (kept * x[b, t - j]).sum(0)
            dx_BSC[rows] = dx
        weight_dtype, bias_dtype = ctx.dtypes
        dweight_CK = dtaps_KC.flip(0).mT.to(weight_dtype)
        return dx_BSC, dweight_CK, dbias_C.to(bias_dtype), None


def _row_blocks(x_BSC: Tensor) -> list[slice]:
    """Rows worked on at a time: one on a CPU, all on a GPU."""
    step = x_BSC.shape[0] if x_BSC.is_cuda else 1
    return [slice(start, start + step) for start in range(0, x_BSC.shape[0], step)]


def _scratch(x_BSC: Tensor, blocks: list[slice], dtype: torch.dtype) -> Tensor:
    num_rows = x_BSC.shape[0] if len(blocks) == 1 else 1
    return torch.empty((num_rows, *x_BSC.shape[1:]), dtype=dtype, device=x_BSC.device)


def _widened(t: Tensor, scratch: Tensor) -> Tensor:
    return t if t.dtype == scratch.dtype else scratch.copy_(t)


def _shifts(x_BSC: Tensor, taps_KC: Tensor) -> range:
    """The taps that look back and stay inside the row."""
    return range(1, min(len(taps_KC), x_BSC.shape[1]))


def _young(document_ids_BS: Tensor | None, rows: slice, num_taps: int) -> tuple[Tensor, ...] | None:
    """Row (counted from the block's first) and position of each young token, and for each tap
    j >= 1 no longer than the row whether it stays inside the document (outside, if before the
    row). None if there are none."""
    if document_ids_BS is None:
        return None
    ids = document_ids_BS[rows]
    length = ids.shape[1]
    reach = min(num_taps - 1, length - 1)
    oldest = torch.cat([ids[:, :1].expand(-1, reach), ids[:, : length - reach]], dim=1)
    b, t = (ids != oldest).nonzero(as_tuple=True)  # SYNC: few rows, their number is data
    if b.numel() == 0:
        return None
    # t - j may be negative and wrap: masked here, and it meets no other token's index.
    same = [(t >= j) & (ids[b, t - j] == ids[b, t]) for j in range(1, reach + 1)]
    return b, t, *same
