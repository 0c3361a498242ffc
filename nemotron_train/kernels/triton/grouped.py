"""Triton kernels of grouped products for emulated experts: FP32 sums, one factor, one rounding.

Owns: the kernels and their launches. Does not own: the operands and factors
(precision/grouped.py). The sizes of the groups stay on the device, so the host does not wait.
torch's own grouped product rounds to BF16 before a factor could be applied, and for FP32 reads the
sizes on the host.

Floor, BF16, T rows of width I, E matrices [I, J]: 2 (T I + E I J + T J) bytes over the bandwidth or
2 T I J FLOPs over the peak, whichever is longer; the same for the outer product.

Shape legend: T rows sorted by group, E groups, I and J the widths of a product.
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_train.kernels.triton.elements import as_bits, product, stored, tile_of, tiles

_ROWS, _COLUMNS, _DEPTH = 64, 128, 32  # of a tile of the result, and of the sums of one turn


@triton.jit
def _grouped_product(
    a,
    b,
    out,
    factors,
    row_ends,
    tile_ends,
    groups,
    depth,
    width,
    a_row,
    a_column,
    b_group,
    b_row,
    b_column,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of the rows of one group. row_ends, tile_ends: running sums over the groups."""
    column_tiles = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    g = tl.arange(0, GROUPS)
    ended = tl.load(tile_ends + g, mask=g < groups, other=0x7FFFFFFF) <= tile
    group = tl.sum(ended.to(tl.int32), axis=0)
    if group < groups:  # the grid is an upper bound of the number of tiles
        before = tl.maximum(group - 1, 0)
        first_row = tl.where(group > 0, tl.load(row_ends + before), 0)
        first_tile = tl.where(group > 0, tl.load(tile_ends + before), 0)
        end = tl.load(row_ends + group)
        r = first_row + (tile - first_tile) * ROWS + tl.arange(0, ROWS)
        c = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        b += group.to(tl.int64) * b_group
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, depth, DEPTH):
            d = start + tl.arange(0, DEPTH)
            left = tile_of(a, r, d, a_row, a_column, end, depth)
            total += product(left, tile_of(b, d, c, b_row, b_column, depth, width))
        factor = tl.load(factors + r, mask=r < end, other=0.0)
        to = out + r.to(tl.int64)[:, None] * width + c[None, :]
        inside = (r < end)[:, None] & (c < width)[None, :]
        tl.store(to, stored(total * factor[:, None], to), mask=inside)


@triton.jit
def _grouped_outer_product(
    a,
    b,
    out,
    factors,
    row_ends,
    num_left,
    num_right,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile [ROWS, COLUMNS] of one group's matrix."""
    column_tiles = tl.cdiv(num_right, COLUMNS)
    row_tiles = tl.cdiv(num_left, ROWS)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    group = tl.program_id(0) // (row_tiles * column_tiles)
    start = tl.where(group > 0, tl.load(row_ends + tl.maximum(group - 1, 0)), 0)
    end = tl.load(row_ends + group)
    i = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    j = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, DEPTH):
        r = first + tl.arange(0, DEPTH)
        left = tile_of(a, i, r, 1, num_left, num_left, end)
        total += product(left, tile_of(b, r, j, num_right, 1, end, num_right))
    factor = tl.load(factors + group)
    to = out + (group.to(tl.int64) * num_left + i.to(tl.int64))[:, None] * num_right + j[None, :]
    inside = (i < num_left)[:, None] & (j < num_right)[None, :]
    tl.store(to, stored(total * factor, to), mask=inside)


def grouped_product(
    a_TI: Tensor, b_EIJ: Tensor, factors_T: Tensor, rows_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """factor_t a_t b_e for the rows t of each group e -> [T, J] in `dtype`, BF16 or FP32.

    a and b: both BF16 or both FP32, any strides. factors: FP32, contiguous. rows_E: integers, the
    rows of each group; their sum is T.
    """
    num_rows, depth = a_TI.shape
    groups, width = b_EIJ.shape[0], b_EIJ.shape[2]
    out_TJ = a_TI.new_empty(num_rows, width, dtype=dtype)
    row_ends_E = rows_E.cumsum(0, dtype=torch.int32)
    tile_ends_E = ((rows_E + (_ROWS - 1)) // _ROWS).cumsum(0, dtype=torch.int32)
    if out_TJ.numel():
        most_tiles = num_rows // _ROWS + groups
        _grouped_product[(most_tiles * tiles(width, _COLUMNS),)](
            *(as_bits(t) for t in (a_TI, b_EIJ, out_TJ)),
            factors_T,
            row_ends_E,
            tile_ends_E,
            groups,
            depth,
            width,
            *a_TI.stride(),
            *b_EIJ.stride(),
            GROUPS=triton.next_power_of_2(groups),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            DEPTH=_DEPTH,
        )
    return out_TJ


def grouped_outer_product(
    a_TI: Tensor, b_TJ: Tensor, factors_E: Tensor, rows_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """factor_e a_e^T b_e of each group -> [E, I, J] in `dtype`; zero for a group without rows.
    Arguments as in `grouped_product`; a and b contiguous."""
    a_TI, b_TJ = a_TI.contiguous(), b_TJ.contiguous()
    groups, num_left, num_right = len(rows_E), a_TI.shape[1], b_TJ.shape[1]
    out_EIJ = a_TI.new_empty(groups, num_left, num_right, dtype=dtype)
    if out_EIJ.numel():
        programs = groups * tiles(num_left, _ROWS) * tiles(num_right, _COLUMNS)
        _grouped_outer_product[(programs,)](
            *(as_bits(t) for t in (a_TI, b_TJ, out_EIJ)),
            factors_E,
            rows_E.cumsum(0, dtype=torch.int32),
            num_left,
            num_right,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            DEPTH=_DEPTH,
        )
    return out_EIJ
