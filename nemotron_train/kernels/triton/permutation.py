"""Triton kernels of the permutation by expert: gather rows, and add each token's rows back.

Owns: the kernels and their launches. Does not own: the plan of the rows and the autograd functions
(model/moe/permutation.py). No host waits: sizes come from the shapes of the index tensors, and
padding rows are marked by an index that is no token.

Floor, BF16, D elements a row: `gather_rows` reads S rows (at least once; each is used K times) and
writes T, 2 D (S + T) bytes; `sum_rows` reads T and writes S, the same; `sum_rows_backward` reads S
gradients and T rows and writes T, 2 D (S + 2 T) bytes. Divide by the bandwidth. Torch's gather of a
padded permutation copies the tokens once more, and its weighted sum writes the weighted rows.

Shape legend: S tokens, K choices a token, T rows sorted by expert (padding included), D width.
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_train.kernels.triton.elements import as_bits, loaded, stored, tiles

_ROWS, _COLUMNS = 8, 512  # of a tile


@triton.jit
def _gather_rows(
    x,
    out,
    token_of_row,
    num_rows,
    num_tokens,
    width,
    x_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.cdiv(width, COLUMNS)
    t = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (tl.program_id(0) % columns) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(token_of_row + t, mask=t < num_rows, other=num_tokens).to(tl.int64)
    is_token = (token >= 0) & (token < num_tokens)
    inside = (d < width)[None, :]
    at = token[:, None] * x_row + d[None, :]
    value = tl.load(x + at, mask=is_token[:, None] & inside, other=0)
    tl.store(out + t[:, None] * width + d[None, :], value, mask=(t < num_rows)[:, None] & inside)


@triton.jit
def _sum_rows(
    rows,
    out,
    row_of_choice,
    weights,
    num_tokens,
    width,
    rows_row,
    K: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.cdiv(width, COLUMNS)
    s = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (tl.program_id(0) % columns) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (s < num_tokens)[:, None] & (d < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(K):
        row = tl.load(row_of_choice + s * K + k, mask=s < num_tokens, other=0).to(tl.int64)
        value = loaded(tl.load(rows + row[:, None] * rows_row + d[None, :], mask=inside, other=0))
        if HAS_WEIGHTS:
            weight = tl.load(weights + s * K + k, mask=s < num_tokens, other=0.0)
            value = value * weight[:, None]
        total += value
    to = out + s[:, None] * width + d[None, :]
    tl.store(to, stored(total, to), mask=inside)


@triton.jit
def _sum_rows_backward(
    dout,
    rows,
    drows,
    dweights,
    row_of_choice,
    weights,
    num_tokens,
    width,
    dout_row,
    rows_row,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One (token, choice) a line of the tile, in the order of the choices: a token's gradient is
    read from memory once and K - 1 times from the cache."""
    choice = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_choice = choice < num_tokens * K
    row = tl.load(row_of_choice + choice, mask=is_choice, other=0).to(tl.int64)
    weight = tl.load(weights + choice, mask=is_choice, other=0.0)
    token = choice // K
    dweight = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = is_choice[:, None] & (d < width)[None, :]
        gradient = tl.load(dout + token[:, None] * dout_row + d[None, :], mask=inside, other=0)
        gradient = loaded(gradient)
        value = loaded(tl.load(rows + row[:, None] * rows_row + d[None, :], mask=inside, other=0))
        dweight += tl.sum(gradient * value, axis=1)
        to = drows + row[:, None] * width + d[None, :]
        tl.store(to, stored(gradient * weight[:, None], to), mask=inside)
    tl.store(dweights + choice, dweight, mask=is_choice)


def _contiguous_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _grid(num_rows: int, width: int) -> tuple[int]:
    return (tiles(num_rows, _ROWS) * tiles(width, _COLUMNS),)


def gather_rows(x_SD: Tensor, token_of_row_T: Tensor) -> Tensor:
    """Row t is x[token_of_row[t]], or zero if that is no token (negative, or S or more): padding.
    x: BF16 or FP32; indices: any integer dtype, contiguous. → [T, D]."""
    x_SD = _contiguous_rows(x_SD)
    num_rows, (num_tokens, width) = len(token_of_row_T), x_SD.shape
    out_TD = x_SD.new_empty(num_rows, width)
    if out_TD.numel():
        sizes = {"ROWS": _ROWS, "COLUMNS": _COLUMNS}
        _gather_rows[_grid(num_rows, width)](
            as_bits(x_SD),
            as_bits(out_TD),
            token_of_row_T,
            num_rows,
            num_tokens,
            width,
            x_SD.stride(0),
            **sizes,
        )
    return out_TD


def sum_rows(rows_TD: Tensor, row_of_choice_SK: Tensor, weights_SK: Tensor | None = None) -> Tensor:
    """Sum over each token's choices, in their order, of weight x row (None: weight 1). FP32 sums,
    rounded once. rows: BF16 or FP32; weights: FP32; indices and weights contiguous. → [S, D]."""
    rows_TD = _contiguous_rows(rows_TD)
    num_tokens, num_choices = row_of_choice_SK.shape
    out_SD = rows_TD.new_empty(num_tokens, rows_TD.shape[1])
    if out_SD.numel():
        _sum_rows[_grid(*out_SD.shape)](
            as_bits(rows_TD),
            as_bits(out_SD),
            row_of_choice_SK,
            row_of_choice_SK if weights_SK is None else weights_SK,  # unused without weights
            *out_SD.shape,
            rows_TD.stride(0),
            K=num_choices,
            HAS_WEIGHTS=weights_SK is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return out_SD


def sum_rows_backward(
    dout_SD: Tensor, rows_TD: Tensor, row_of_choice_SK: Tensor, weights_SK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `sum_rows` with weights: of the rows [T, D] in their dtype, zero for padding
    rows, and of the weights, FP32 [S, K]. Without weights it is `gather_rows`."""
    dout_SD, rows_TD = _contiguous_rows(dout_SD), _contiguous_rows(rows_TD)
    num_tokens, num_choices = row_of_choice_SK.shape
    has_padding = len(rows_TD) > num_tokens * num_choices
    new = torch.zeros if has_padding else torch.empty
    drows_TD = new(rows_TD.shape, dtype=rows_TD.dtype, device=rows_TD.device)
    dweights_SK = torch.zeros_like(weights_SK)
    if rows_TD.numel() and dout_SD.numel():
        _sum_rows_backward[(tiles(num_tokens * num_choices, _ROWS),)](
            *(as_bits(t) for t in (dout_SD, rows_TD, drows_TD)),
            dweights_SK,
            row_of_choice_SK,
            weights_SK,
            num_tokens,
            rows_TD.shape[1],
            dout_SD.stride(0),
            rows_TD.stride(0),
            K=num_choices,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return drows_TD, dweights_SK
