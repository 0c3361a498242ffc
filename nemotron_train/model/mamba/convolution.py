"""Short depthwise causal convolution followed by SiLU, as in Mamba-2, with document resets.

Owns: the function, its hand-derived backward, and the choice between a Triton kernel or the
`causal_conv1d` package on CUDA, one C kernel on a CPU, and PyTorch. Does not own: the weights, the
window of past inputs that generation keeps (`decode_state`).

Shape suffixes: B batch, S tokens, C channels, K kernel taps, R young tokens (see `_CausalConv`).
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import limit, supports
from nemotron_train.kernels.triton import available

_VECTOR = 8  # channels that the kernel of `causal_conv1d` loads at once


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

    Taps before the first token read `initial_BKC` (the K-1 inputs before it, oldest first, of each
    row's first document) or zero. Taps that reach into another document read zero.
    `document_ids_BS` is non-decreasing along S. Sums in FP32 (FP64 with FP64 inputs). Returns
    y_BSC in x's dtype and memory order (batch- or sequence-first). x, weight, bias and the initial
    inputs receive gradients.

    On CUDA a Triton kernel computes it if K is 2 to 4 and x is not FP64, unless `force_torch`. If
    Triton cannot be used, the `causal_conv1d` package does, if it is installed and C is a multiple
    of 8.
    """
    if initial_BKC is not None:
        history = initial_BKC.shape[1]
        assert history == weight_CK.shape[1] - 1, "initial_BKC must hold K - 1 inputs"
        # Prepend the history, convolve, drop its outputs: one code path for every form.
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
    num_channels, num_taps = weight_CK.shape
    fits = not force_torch and x_BSC.dtype != torch.float64 and 2 <= num_taps <= 4
    if fits and available.can_use(x_BSC):
        from nemotron_train.kernels.triton import convolution as triton_kernels

        arguments = (triton_kernels, x_BSC, weight_CK, bias_C, document_ids_BS)
        return _CompiledCausalConv.apply(*arguments)  # pyright: ignore[reportReturnType]
    if x_BSC.is_cuda and fits and num_channels % _VECTOR == 0 and _has_causal_conv1d():
        return _causal_conv1d(x_BSC, weight_CK, bias_C, document_ids_BS)
    if weight_CK.shape[1] <= limit("convolution_max_taps") and supports(x_BSC):
        arguments = (training_kernels, x_BSC, weight_CK, bias_C, document_ids_BS)
        return _CompiledCausalConv.apply(*arguments)  # pyright: ignore[reportReturnType]
    return _CausalConv.apply(x_BSC, weight_CK, bias_C, document_ids_BS)


@lru_cache(maxsize=1)
def _has_causal_conv1d() -> bool:
    return importlib.util.find_spec("causal_conv1d") is not None


def _causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, document_ids_BS: Tensor | None
) -> Tensor:
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    seq_idx = None
    if document_ids_BS is not None:  # the kernel needs int32 indices
        seq_idx = (document_ids_BS - document_ids_BS[:, :1]).to(torch.int32).contiguous()
    x_BSC = _in_kernel_layout(x_BSC)
    weight_CK, bias_C = weight_CK.to(x_BSC.dtype), bias_C.to(x_BSC.dtype)
    y = causal_conv1d_fn(x_BSC.mT, weight_CK, bias_C, seq_idx=seq_idx, activation="silu")
    return _GradientInKernelLayout.apply(y.mT)  # pyright: ignore[reportReturnType]


def _in_kernel_layout(x_BSC: Tensor) -> Tensor:
    """x or a copy such that the kernel of `causal_conv1d` takes it with channels last: it loads
    eight channels at once, so both other strides and the offset are multiples of eight. x is often
    a view of an input projection whose width is no such multiple."""
    strides = x_BSC.stride()
    aligned = all(n % _VECTOR == 0 for n in (strides[0], strides[1], x_BSC.storage_offset()))
    return x_BSC if strides[2] == 1 and aligned else x_BSC.contiguous()


class _GradientInKernelLayout(torch.autograd.Function):
    """The identity. The gradient, whose layout its producer chooses, becomes one that the kernel
    takes."""

    @staticmethod
    def forward(ctx: Any, y_BSC: Tensor) -> Tensor:
        return y_BSC.view_as(y_BSC)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _in_kernel_layout(gradients[0])


class _CompiledCausalConv(torch.autograd.Function):
    """One kernel forward and one backward, of `kernels.training` (C) or `kernels.triton`. Saves
    only the inputs: the kernel recomputes the sums before the SiLU."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x_BSC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor,
        document_ids_BS: Tensor | None,
    ) -> Tensor:
        taps_KC = weight_CK.float().mT.flip(0).contiguous()  # tap j reads x_{t-j}
        if document_ids_BS is not None:
            document_ids_BS = document_ids_BS.long().contiguous()
        ctx.save_for_backward(x_BSC, taps_KC, bias_C.float().contiguous(), document_ids_BS)
        ctx.dtypes = weight_CK.dtype, bias_C.dtype
        ctx.kernels = kernels
        return kernels.causal_conv(*ctx.to_save)  # the four tensors of `save_for_backward`

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dx_BSC, dtaps_KC, dbias_C = ctx.kernels.causal_conv_backward(
            gradients[0], *ctx.saved_tensors
        )
        weight_dtype, bias_dtype = ctx.dtypes
        return None, dx_BSC, dtaps_KC.flip(0).mT.to(weight_dtype), dbias_C.to(bias_dtype), None


class _CausalConv(torch.autograd.Function):
    """K shifted multiply-adds over whole rows: three to four times faster on a CPU than conv1d,
    which needs channels first. One row at a time on a CPU, so that the FP32 temporaries of one row
    stay in the cache and are reused for the next.

    A token is young if one of its taps reaches into another document. There are few (at most K - 1
    per document). The full-width operations therefore ignore documents, and the young tokens are
    computed separately and overwrite the result: exact, and without a mask over all tokens. On a
    GPU the host would wait for the number of young tokens, so there every tap is masked.
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
        # sum_BSC: before the SiLU. Saved, since recomputing it would cost K operations.
        sum_BSC, y_BSC = torch.empty_like(x_BSC), torch.empty_like(x_BSC)
        blocks = _row_blocks(x_BSC)
        x_wide, total = (_scratch(x_BSC, blocks, wide) for _ in range(2))
        for rows in blocks:
            x = _widened(x_BSC[rows], x_wide)
            torch.addcmul(bias, x, taps_KC[0], out=total)
            inside = _inside(document_ids_BS, rows)
            for j in _shifts(x, taps_KC):
                total[:, j:].addcmul_(inside(x[:, :-j], j), taps_KC[j])  # before j: zero
            # Young tokens: the same sum, with taps outside the document set to zero.
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
        """With s_t the sum before the SiLU and tap j reading x_{t-j}:

            ds_t = dy_t SiLU'(s_t),  dbias = sum_t ds_t,
            dtaps_j = sum_t ds_t x_{t-j},  dx_u = sum_j taps_j ds_{u+j}.

        Taps of young tokens that reach into another document contribute nothing.
        """
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
                # Take the young tokens out, so that the full-width sums below need no mask.
                drows_RC = dsum[young[:2]]
                dsum[young[:2]] = 0
            # Tap 0 reads the token itself.
            torch.mul(dsum, taps_KC[0], out=dx)
            dtaps_KC[0] += torch.mul(dsum, x, out=product).sum((0, 1))
            inside = _inside(document_ids_BS, rows)
            for j in _shifts(x, taps_KC):
                # x_t reached the output at t + j through tap j.
                from_j = inside(dsum[:, j:], j)
                dx[:, :-j].addcmul_(from_j, taps_KC[j])
                torch.mul(from_j, x[:, :-j], out=product[:, j:])
                # Sum whole rows, zeros included: ten times faster than over a sliced view.
                product[:, :j] = 0
                dtaps_KC[j] += product.sum((0, 1))
            if young is not None and drows_RC is not None:
                b, t, *sources = young
                # The (b, t) pairs are distinct, also after the shift by j, so `+=` with indices
                # adds every contribution.
                dx[b, t] += drows_RC * taps_KC[0]
                dtaps_KC[0] += (drows_RC * x[b, t]).sum(0)
                for j, same in enumerate(sources, 1):
                    inside_RC = drows_RC * same[:, None]  # zero if tap j leaves the document
                    dx[b, t - j] += inside_RC * taps_KC[j]
                    dtaps_KC[j] += (inside_RC * x[b, t - j]).sum(0)
            dx_BSC[rows] = dx
        weight_dtype, bias_dtype = ctx.dtypes
        dweight_CK = dtaps_KC.flip(0).mT.to(weight_dtype)  # back to oldest tap first
        return dx_BSC, dweight_CK, dbias_C.to(bias_dtype), None


def _row_blocks(x_BSC: Tensor) -> list[slice]:
    """The rows of one iteration: one at a time on a CPU, all at once on a GPU."""
    step = x_BSC.shape[0] if x_BSC.is_cuda else 1
    return [slice(start, start + step) for start in range(0, x_BSC.shape[0], step)]


def _scratch(x_BSC: Tensor, blocks: list[slice], dtype: torch.dtype) -> Tensor:
    """An uninitialized buffer for the rows of one iteration."""
    num_rows = x_BSC.shape[0] if len(blocks) == 1 else 1
    return torch.empty((num_rows, *x_BSC.shape[1:]), dtype=dtype, device=x_BSC.device)


def _widened(t: Tensor, scratch: Tensor) -> Tensor:
    """`t` in the scratch buffer's dtype: `t` itself, or a copy in the buffer."""
    return t if t.dtype == scratch.dtype else scratch.copy_(t)


def _shifts(x_BSC: Tensor, taps_KC: Tensor) -> range:
    """The taps that read an earlier token, up to the row's length."""
    return range(1, min(len(taps_KC), x_BSC.shape[1]))


def _inside(document_ids_BS: Tensor | None, rows: slice) -> Callable[[Tensor, int], Tensor]:
    """A function that sets to zero, in a tensor of all tokens but j, those pairs of tokens t and
    t - j that lie in two documents. The identity on a CPU, where `_young` takes care of them."""
    if document_ids_BS is None or not document_ids_BS.is_cuda:
        return lambda values, j: values
    ids = document_ids_BS[rows]
    return lambda values, j: values * (ids[:, j:] == ids[:, :-j]).unsqueeze(-1)


def _young(document_ids_BS: Tensor | None, rows: slice, num_taps: int) -> tuple[Tensor, ...] | None:
    """(b, t, inside_1, inside_2, ...) of the R young tokens, each [R]; None if there are none, and
    on a GPU (`_inside`).

    b counts from the first row of `rows`, t is the position, inside_j is True if tap j (j >= 1, up
    to the row's length) stays in the document. A tap before the row's start is outside.
    """
    if document_ids_BS is None or document_ids_BS.is_cuda:
        return None
    ids = document_ids_BS[rows]
    length = ids.shape[1]
    reach = min(num_taps - 1, length - 1)
    # Ids do not decrease, so a token is young if its oldest tap lies in another document.
    oldest = torch.cat([ids[:, :1].expand(-1, reach), ids[:, : length - reach]], dim=1)
    b, t = (ids != oldest).nonzero(as_tuple=True)
    if b.numel() == 0:
        return None
    # t - j may be negative and wrap around to the row's end. That value is masked here, and its
    # index differs from those of all other young tokens.
    same = [(t >= j) & (ids[b, t - j] == ids[b, t]) for j in range(1, reach + 1)]
    return b, t, *same
