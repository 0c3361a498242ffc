"""The kernels of scan_backward.py: gradients of the chunked state-space scan.

Owns: the kernels. Does not own: their launches and the formulas (scan_backward.py's docstring).

Shape suffixes: as in scan.py.
"""

import triton
import triton.language as tl

from nemotron_train.kernels.triton.elements import loaded, narrowed, product, stored, tile_of
from nemotron_train.kernels.triton.scan import decay, times_state


@triton.jit
def pass_gradients(
    gradients, states, carries, dfinal, dinitial, parts, heads, chunks, size, BLOCK: tl.constexpr
):
    """In place: entry k, on entry what the outputs of chunk k give the state that enters it,
    becomes the gradient of the state after chunk k. parts: [blocks, B, H, K], sums over a block of
    that gradient times the entering state."""
    blocks = tl.cdiv(size, BLOCK)
    block = tl.program_id(0) % blocks
    e = block * BLOCK + tl.arange(0, BLOCK)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = unit // heads, unit % heads
    units = tl.num_programs(0) // blocks
    parts += (block.to(tl.int64) * units + unit) * chunks
    gradient = tl.load(dfinal + unit * size + e, mask=e < size, other=0.0)
    for turn in range(chunks):
        chunk = chunks - 1 - turn
        at = ((row * chunks + chunk) * heads + head) * size + e
        own = tl.load(gradients + at, mask=e < size, other=0.0)
        tl.store(gradients + at, gradient, mask=e < size)
        state = tl.load(states + at, mask=e < size, other=0.0)
        tl.store(parts + chunk, tl.sum(gradient * state, axis=0))
        gradient = gradient * tl.load(carries + unit * chunks + chunk) + own
    tl.store(dinitial + unit * size + e, gradient, mask=e < size)


@triton.jit
def scores_backward(
    x,
    dy,
    scores,
    dscores,
    rows_out,
    columns_out,
    ids,
    dt,
    high,
    low,
    length,
    heads,
    per_group,
    chunks,
    channels,
    size,
    x_strides,
    dy_strides,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """ROWS reading tokens of a chunk and group. rows_out [B, H, T]: sum over s of M_ls dt_s (dy_l .
    x_s); columns_out [blocks, B, H, T]: sum over the block's l of M_ls (dy_l . x_s). size: B x H x
    T."""
    blocks: tl.constexpr = L // ROWS
    block = tl.program_id(0) % blocks
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    groups = heads // per_group
    group, place = unit % groups, unit // groups
    row, chunk = place // chunks, place % chunks
    i, j = block * ROWS + tl.arange(0, ROWS), tl.arange(0, L)
    p = tl.arange(0, CHANNELS)
    ids += place * L
    is_read = (j[None, :] <= i[:, None]) & (tl.load(ids + i)[:, None] == tl.load(ids + j)[None, :])
    score = loaded(tl.load(scores + unit * L * L + i[:, None] * L + j[None, :]))
    columns_out += block.to(tl.int64) * size
    total = tl.zeros([ROWS, L], tl.float32)
    for member in range(per_group):
        head = group * per_group + member
        first = (row * heads + head) * chunks * L + chunk * L
        left = tile_of(
            dy + row * dy_strides[0] + head * dy_strides[2],
            chunk * L + i,
            p,
            dy_strides[1],
            dy_strides[3],
            length,
            channels,
        )
        right = tile_of(
            x + row * x_strides[0] + head * x_strides[2],
            p,
            chunk * L + j,
            x_strides[3],
            x_strides[1],
            channels,
            length,
        )
        high_i, low_i = tl.load(high + first + i), tl.load(low + first + i)
        weight = decay(high_i, low_i, tl.load(high + first + j), tl.load(low + first + j))
        weight = tl.where(is_read, weight * product(left, right), 0.0)
        tl.store(columns_out + first + j, tl.sum(weight * score, axis=0))
        weight *= tl.load(dt + first + j)[None, :]
        tl.store(rows_out + first + i, tl.sum(weight * score, axis=1))
        total += weight
    to = dscores + unit * L * L + i[:, None] * L + j[None, :]
    tl.store(to, stored(total, to))


@triton.jit
def input_gradients(
    x,
    dy,
    B,
    C,
    dx,
    scores,
    states,
    gradients,
    D,
    ids,
    dt,
    high,
    low,
    read,
    write,
    through_D,
    read_sums,
    write_sums,
    length,
    heads,
    per_group,
    chunks,
    channels,
    width,
    x_strides,
    dy_strides,
    B_strides,
    C_strides,
    dx_strides,
    NARROW: tl.constexpr,
    L: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dx of one chunk and head, and for each token: dy . x, read dy . (C entering) and write x . (B
    dafter); [B, H, T]."""
    unit = tl.program_id(0).to(tl.int64)
    head, place = unit % heads, unit // heads
    row, chunk, group = place // chunks, place % chunks, head // per_group
    x += row * x_strides[0] + head * x_strides[2]
    dy += row * dy_strides[0] + head * dy_strides[2]
    dx += row * dx_strides[0] + head * dx_strides[2]
    B += row * B_strides[0] + group * B_strides[2]
    C += row * C_strides[0] + group * C_strides[2]
    scores += (place * (heads // per_group) + group) * L * L
    states += unit * channels * width
    gradients += unit * channels * width
    first = (row * heads + head) * chunks * L + chunk * L
    ids += place * L
    i, p = tl.arange(0, L), tl.arange(0, CHANNELS)
    t = chunk * L + i
    gradient = loaded(tile_of(dy, t, p, dy_strides[1], dy_strides[3], length, channels))
    value = loaded(tile_of(x, t, p, x_strides[1], x_strides[3], length, channels))
    tl.store(through_D + first + i, tl.sum(gradient * value, axis=1))

    part = times_state(
        C, states, t, p, C_strides, length, channels, width, NARROW, L, CHANNELS, DEPTH
    )
    tl.store(read_sums + first + i, tl.load(read + first + i) * tl.sum(gradient * part, axis=1))

    total = times_state(
        B, gradients, t, p, B_strides, length, channels, width, NARROW, L, CHANNELS, DEPTH
    )
    total = total * tl.load(write + first + i)[:, None]
    tl.store(write_sums + first + i, tl.sum(value * total, axis=1))

    own, high_i, low_i = tl.load(ids + i), tl.load(high + first + i), tl.load(low + first + i)
    for start in range(0, L, DEPTH):  # the reading tokens
        j = start + tl.arange(0, DEPTH)
        later = decay(tl.load(high + first + j), tl.load(low + first + j), high_i, low_i)
        weight = loaded(tl.load(scores + j[None, :] * L + i[:, None])) * tl.trans(later)
        is_read = (i[:, None] <= j[None, :]) & (own[:, None] == tl.load(ids + j)[None, :])
        weight = narrowed(tl.where(is_read, weight, 0.0), NARROW)
        right = tile_of(dy, chunk * L + j, p, dy_strides[1], dy_strides[3], length, channels)
        total += product(weight, right)
    total = total * tl.load(dt + first + i)[:, None] + tl.load(D + head) * gradient
    to = dx + t[:, None] * dx_strides[1] + p.to(tl.int64)[None, :] * dx_strides[3]
    tl.store(to, stored(total, to), mask=(t < length)[:, None] & (p < channels)[None, :])


@triton.jit
def group_gradients(
    u,
    weights,
    states,
    dscores,
    other,
    out,
    length,
    heads,
    per_group,
    chunks,
    channels,
    width,
    scores_row,
    scores_column,
    u_strides,
    v_strides,
    NARROW: tl.constexpr,
    L: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dscores other + sum over a group's heads of weight u state: [B, S, G, N] of one chunk.
    scores_row, scores_column: strides that transpose dscores or not."""
    column_tiles = tl.cdiv(width, COLUMNS)
    n = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    unit = (tl.program_id(0) // column_tiles).to(tl.int64)
    groups = heads // per_group
    group, place = unit % groups, unit // groups
    row, chunk = place // chunks, place % chunks
    other += row * v_strides[0] + group * v_strides[2]
    dscores += unit * L * L
    i, p = tl.arange(0, L), tl.arange(0, CHANNELS)
    t = chunk * L + i
    total = tl.zeros([L, COLUMNS], tl.float32)
    for member in range(per_group):
        head = group * per_group + member
        left = loaded(
            tile_of(
                u + row * u_strides[0] + head * u_strides[2],
                t,
                p,
                u_strides[1],
                u_strides[3],
                length,
                channels,
            )
        )
        left *= tl.load(weights + (row * heads + head) * chunks * L + t)[:, None]
        state = states + (place * heads + head) * channels * width
        right = narrowed(tile_of(state, p, n, width, 1, channels, width), NARROW)
        total += product(narrowed(left, NARROW), right)
    for start in range(0, L, DEPTH):
        j = start + tl.arange(0, DEPTH)
        left = tile_of(dscores, i, j, scores_row, scores_column, L, L)
        right = tile_of(other, chunk * L + j, n, v_strides[1], v_strides[3], length, width)
        total += product(left, right)
    to = out + ((row * length + t) * groups + group)[:, None] * width + n[None, :]
    tl.store(to, stored(total, to), mask=(t < length)[:, None] & (n < width)[None, :])
