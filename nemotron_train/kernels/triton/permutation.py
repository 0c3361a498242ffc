"""Triton kernels of the permutation by expert: gather rows, and add each token's rows back.

Owns: the kernels and their launches. Does not own: the plan of the rows and the autograd functions
(model/moe/permutation.py). No host waits: sizes come from the shapes of the index tensors, and
padding rows are marked by an index that is no token.

Floor, BF16, D elements a row: `gather_rows` reads S rows (at least once; each is used K times) and
writes T, 2 D (S + T) bytes; `sum_rows` reads T and writes S, the same. Divide by the bandwidth.
Each is the other's gradient.

Shape legend: S tokens, K choices a token, T rows sorted by expert (padding included), D width.
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

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
    num_tokens,
    width,
    rows_row,
    K: tl.constexpr,
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
        total += loaded(tl.load(rows + row[:, None] * rows_row + d[None, :], mask=inside, other=0))
    to = out + s[:, None] * width + d[None, :]
    tl.store(to, stored(total, to), mask=inside)


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


def sum_rows(rows_TD: Tensor, row_of_choice_SK: Tensor) -> Tensor:
    """Sum over each token's choices, in their order. FP32 sums, rounded once. rows: BF16 or FP32;
    indices contiguous. → [S, D]."""
    rows_TD = _contiguous_rows(rows_TD)
    num_tokens, num_choices = row_of_choice_SK.shape
    out_SD = rows_TD.new_empty(num_tokens, rows_TD.shape[1])
    if out_SD.numel():
        _sum_rows[_grid(*out_SD.shape)](
            as_bits(rows_TD),
            as_bits(out_SD),
            row_of_choice_SK,
            *out_SD.shape,
            rows_TD.stride(0),
            K=num_choices,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return out_SD
