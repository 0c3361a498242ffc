"""Triton kernels of the chunked state-space scan (SSD, arXiv 2405.21060, section 6): forward.

Owns: the forward kernels and their launches. Does not own: the definition (model/mamba/core.py),
the factors of a chunk (scan_factors.py), the gradients (scan_backward.py), the autograd function
(model/mamba/triton_scan.py).

All offsets have 64 bits, so a row may be longer than 2^31 elements; mamba_ssm's have 32
(state-spaces/mamba#1015). Nothing is known on the host but shapes. A chunk of L tokens is computed
in four steps:

    scores  = C B^T                                  [L, L] a chunk and group
    sums    = sum over s of write_s dt_s x_s B_s^T   [P, N] a chunk and head
    states: entering_{k+1} = carry_k entering_k + sums_k, one chunk after the other
    y_l     = sum over s <= l of scores_ls exp(cum_l - cum_s) dt_s x_s + read_l C_l entering + D x_l

cum is the running sum of dt A in a chunk. `read`, `write` and `carry` are exp(cum), exp(cum_end -
cum) and exp(cum_end), and zero where a document ends between the two tokens. cum is a sum of FP64,
kept as two FP32 numbers, so a difference of two does not cancel after one very fast decay.
Operands of products have x's dtype, sums and states FP32.

Floor, BF16, per token: x and y (4 H P bytes), B and C (4 G N), the states, written by one kernel,
rewritten by the next and read by the last (16 H P N / L), scores (4 G L), dt and factors (about
40 H). Nemotron 3 Nano (H P = 4096, N = 128, G = 8, L = 128): 16 + 4 + 64 + 4 + 3 KB = 91 KB, 19 us
for 1,024 tokens at 4.8 TB/s.

Shape suffixes: B batch, S tokens, H heads, P channels a head, G groups, N state size, K chunks of L
tokens, T = K x L (the padding included).
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_train.kernels.triton.elements import (
    as_bits,
    loaded,
    narrowed,
    product,
    stored,
    tile_of,
    tiles,
)
from nemotron_train.kernels.triton.scan_factors import Factors, chunk_length, factors, padded

DEPTH = 32  # of the sums of one turn
COLUMNS = 64  # state columns of a tile
_STATE_BLOCK = 1024  # elements of a state that one program carries over the chunks


@triton.jit
def decay(high_l, low_l, high_s, low_s):
    """exp(cum_l - cum_s); at most 1, also where l is before s and the caller masks it."""
    difference = (high_l[:, None] - high_s[None, :]) + (low_l[:, None] - low_s[None, :])
    return tl.exp(tl.minimum(difference, 0.0))


@triton.jit
def times_state(
    matrix,
    state,
    t,
    p,
    strides,
    length,
    channels,
    width,
    NARROW: tl.constexpr,
    L: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows t of B or C times a state [P, N] transposed: [L, P]."""
    total = tl.zeros([L, CHANNELS], tl.float32)
    for start in range(0, width, DEPTH):
        n = start + tl.arange(0, DEPTH)
        left = tile_of(matrix, t, n, strides[1], strides[3], length, width)
        right = tile_of(state, n, p, 1, width, width, channels)
        total += product(left, narrowed(right, NARROW))
    return total


@triton.jit
def _scores(
    C,
    B,
    out,
    length,
    groups,
    chunks,
    width,
    C_strides,
    B_strides,
    L: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """C_l . B_s of all pairs of a chunk: [B, K, G, L, L]."""
    group = (tl.program_id(0) % groups).to(tl.int64)
    place = (tl.program_id(0) // groups).to(tl.int64)
    i = tl.arange(0, L)
    t = (place % chunks) * L + i
    C += (place // chunks) * C_strides[0] + group * C_strides[2]
    B += (place // chunks) * B_strides[0] + group * B_strides[2]
    total = tl.zeros([L, L], tl.float32)
    for start in range(0, width, DEPTH):
        n = start + tl.arange(0, DEPTH)
        left = tile_of(C, t, n, C_strides[1], C_strides[3], length, width)
        total += product(left, tile_of(B, n, t, B_strides[3], B_strides[1], width, length))
    to = out + (place * groups + group) * L * L + i[:, None] * L + i[None, :]
    tl.store(to, stored(total, to))


@triton.jit
def _chunk_sums(
    u,
    v,
    weights,
    out,
    length,
    heads,
    per_group,
    chunks,
    channels,
    width,
    u_strides,
    v_strides,
    NARROW: tl.constexpr,
    L: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """sum over the chunk's tokens of weight u v^T: FP32 [B, K, H, P, N]."""
    column_tiles = tl.cdiv(width, COLUMNS)
    n = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    unit = (tl.program_id(0) // column_tiles).to(tl.int64)
    head, place = unit % heads, unit // heads
    row, chunk = place // chunks, place % chunks
    u += row * u_strides[0] + head * u_strides[2]
    v += row * v_strides[0] + (head // per_group) * v_strides[2]
    weights += (row * heads + head) * chunks * L
    p = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS, COLUMNS], tl.float32)
    for start in range(0, L, DEPTH):
        t = chunk * L + start + tl.arange(0, DEPTH)
        left = loaded(tile_of(u, p, t, u_strides[3], u_strides[1], channels, length))
        left = narrowed(left * tl.load(weights + t)[None, :], NARROW)
        total += product(left, tile_of(v, t, n, v_strides[1], v_strides[3], length, width))
    to = out + unit * channels * width + p.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(to, total, mask=(p < channels)[:, None] & (n < width)[None, :])


@triton.jit
def _pass_states(states, carries, initial, final, heads, chunks, size, BLOCK: tl.constexpr):
    """In place: entry k becomes the state that enters chunk k."""
    blocks = tl.cdiv(size, BLOCK)
    e = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = unit // heads, unit % heads
    state = tl.load(initial + unit * size + e, mask=e < size, other=0.0)
    for chunk in range(chunks):
        at = states + ((row * chunks + chunk) * heads + head) * size + e
        own = tl.load(at, mask=e < size, other=0.0)
        tl.store(at, state, mask=e < size)
        state = state * tl.load(carries + unit * chunks + chunk) + own
    tl.store(final + unit * size + e, state, mask=e < size)


@triton.jit
def _outputs(
    x,
    C,
    scores,
    states,
    y,
    D,
    ids,
    dt,
    high,
    low,
    read,
    length,
    heads,
    per_group,
    chunks,
    channels,
    width,
    x_strides,
    C_strides,
    y_strides,
    NARROW: tl.constexpr,
    L: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y of one chunk and head."""
    unit = tl.program_id(0).to(tl.int64)
    head, place = unit % heads, unit // heads
    row, chunk = place // chunks, place % chunks
    group = head // per_group
    x += row * x_strides[0] + head * x_strides[2]
    C += row * C_strides[0] + group * C_strides[2]
    y += row * y_strides[0] + head * y_strides[2]
    scores += (place * (heads // per_group) + group) * L * L
    states += unit * channels * width
    first = (row * heads + head) * chunks * L + chunk * L
    ids += (row * chunks + chunk) * L
    i, p = tl.arange(0, L), tl.arange(0, CHANNELS)
    t = chunk * L + i
    own, high_l, low_l = tl.load(ids + i), tl.load(high + first + i), tl.load(low + first + i)

    total = times_state(
        C, states, t, p, C_strides, length, channels, width, NARROW, L, CHANNELS, DEPTH
    )
    total = total * tl.load(read + first + i)[:, None]
    for start in range(0, L, DEPTH):
        j = start + tl.arange(0, DEPTH)
        s = first + j
        weight = loaded(tl.load(scores + i[:, None] * L + j[None, :]))
        weight *= decay(high_l, low_l, tl.load(high + s), tl.load(low + s))
        is_read = (j[None, :] <= i[:, None]) & (own[:, None] == tl.load(ids + j)[None, :])
        weight = tl.where(is_read, weight * tl.load(dt + s)[None, :], 0.0)
        right = tile_of(x, chunk * L + j, p, x_strides[1], x_strides[3], length, channels)
        total += product(narrowed(weight, NARROW), right)
    total += tl.load(D + head) * loaded(
        tile_of(x, t, p, x_strides[1], x_strides[3], length, channels)
    )
    to = y + t[:, None] * y_strides[1] + p.to(tl.int64)[None, :] * y_strides[3]
    tl.store(to, stored(total, to), mask=(t < length)[:, None] & (p < channels)[None, :])


def score_matrices(C_BSGN: Tensor, B_BSGN: Tensor, chunk: int) -> Tensor:
    """C_l . B_s for all pairs of tokens of a chunk, in B's dtype: [B, K, G, L, L]."""
    batch, length, groups, width = B_BSGN.shape
    num_chunks = tiles(length, chunk)
    out = B_BSGN.new_empty(batch, num_chunks, groups, chunk, chunk)
    _scores[(batch * num_chunks * groups,)](
        *(as_bits(t) for t in (C_BSGN, B_BSGN, out)),
        length,
        groups,
        num_chunks,
        width,
        C_BSGN.stride(),
        B_BSGN.stride(),
        L=chunk,
        DEPTH=DEPTH,
        num_warps=8,
    )
    return out


def chunk_sums(u_BSHP: Tensor, v_BSGN: Tensor, weights_BHT: Tensor, chunk: int) -> Tensor:
    """The sum over each chunk's tokens of weight u v^T: FP32 [B, K, H, P, N]."""
    batch, length, heads, channels = u_BSHP.shape
    groups, width = v_BSGN.shape[2:]
    num_chunks = weights_BHT.shape[2] // chunk
    shape = (batch, num_chunks, heads, channels, width)
    out = torch.empty(shape, dtype=torch.float32, device=u_BSHP.device)
    _chunk_sums[(batch * num_chunks * heads * tiles(width, COLUMNS),)](
        as_bits(u_BSHP),
        as_bits(v_BSGN),
        weights_BHT.contiguous(),
        out,
        length,
        heads,
        heads // groups,
        num_chunks,
        channels,
        width,
        u_BSHP.stride(),
        v_BSGN.stride(),
        NARROW=u_BSHP.dtype == torch.bfloat16,
        L=chunk,
        CHANNELS=padded(channels),
        COLUMNS=min(COLUMNS, padded(width)),
        DEPTH=min(DEPTH, chunk),
    )
    return out


def entering_states(
    x_BSHP: Tensor, B_BSGN: Tensor, f: Factors, initial_BHPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, [B, K, H, P, N], and the final one, [B, H, P, N]; FP32."""
    states = chunk_sums(x_BSHP, B_BSGN, f.write * f.dt, f.chunk)
    batch, num_chunks, heads, channels, width = states.shape
    if initial_BHPN is None:
        initial_BHPN = states.new_zeros(batch, heads, channels, width)
    final_BHPN = torch.empty_like(initial_BHPN, dtype=torch.float32)
    size = channels * width
    _pass_states[(batch * heads * tiles(size, _STATE_BLOCK),)](
        states,
        f.carry,
        initial_BHPN.float().contiguous(),
        final_BHPN,
        heads,
        num_chunks,
        size,
        BLOCK=_STATE_BLOCK,
    )
    return states, final_BHPN


def scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    initial_BHPN: Tensor | None,
    ids_BS: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y in x's dtype and memory order, and the final state, FP32 [B, H, P, N]; see `core.ssd`.

    x, B and C: all BF16 or all FP32, any strides; dt, A, D and the initial state: FP32. P at most
    `model.mamba.triton_scan.MAX_CHANNELS`.
    """
    batch, length, heads, channels = x_BSHP.shape
    groups, width = B_BSGN.shape[2:]
    f = factors(dt_BSH, A_H, ids_BS, chunk_length(chunk_size, length))
    scores = score_matrices(C_BSGN, B_BSGN, f.chunk)
    states, final_BHPN = entering_states(x_BSHP, B_BSGN, f, initial_BHPN)
    y_BSHP = torch.empty_like(x_BSHP)
    _outputs[(batch * f.num_chunks * heads,)](
        *(as_bits(t) for t in (x_BSHP, C_BSGN, scores, states, y_BSHP)),
        D_H.float().contiguous(),
        f.ids_BT,
        f.dt,
        f.high,
        f.low,
        f.read,
        length,
        heads,
        heads // groups,
        f.num_chunks,
        channels,
        width,
        x_BSHP.stride(),
        C_BSGN.stride(),
        y_BSHP.stride(),
        NARROW=x_BSHP.dtype == torch.bfloat16,
        L=f.chunk,
        CHANNELS=padded(channels),
        DEPTH=min(DEPTH, f.chunk),
        num_warps=8,
    )
    return y_BSHP, final_BHPN
