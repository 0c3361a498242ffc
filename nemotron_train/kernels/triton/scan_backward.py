"""Triton kernels of the chunked state-space scan: gradients.

Owns: the launches and the sums after them. Does not own: the kernels (scan_gradients.py), the
forward pass (scan.py, whose docstring has the notation), the autograd function
(model/mamba/triton_scan.py). All offsets have 64 bits. Scores and states are computed again, so the
forward pass saves its arguments only.

With M_ls = scores_ls exp(cum_l - cum_s) for s <= l in one document, else 0:

    y_l = sum_s M_ls dt_s x_s + read_l C_l entering + D x_l
    dx_s = dt_s (sum_l M_ls dy_l + write_s B_s dafter) + D dy_s
    dscores_ls = exp(cum_l - cum_s) dt_s (dy_l . x_s), summed over the heads of a group
    dC_l = sum_s dscores_ls B_s + sum over heads of read_l dy_l entering
    dB_s = sum_l dscores_ls C_l + sum over heads of write_s dt_s x_s dafter

dafter is the gradient of the state after the chunk. The gradient of cum is dy_l . y_l without D x_l
for a reading token, minus what a token writes, and at the chunk's end what the state after the
chunk holds of this document. da_s, the gradient of dt_s A, is the sum of these from s to the end of
its chunk and document.

Floor, BF16, per token: x and dy read twice and dx written (10 H P bytes), B and C read and written
(8 G N), states computed again and their gradients (16 H P N / L each), scores and their gradients
(8 G L), factors (about 80 H). Nemotron 3 Nano: 40 + 8 + 128 + 8 + 5 KB = 189 KB, 40 us for 1,024
tokens at 4.8 TB/s.

Shape suffixes: as in scan.py.
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

import torch
from torch import Tensor

from nemotron_train.kernels.triton.elements import as_bits, tiles
from nemotron_train.kernels.triton.scan import (
    COLUMNS,
    DEPTH,
    chunk_sums,
    entering_states,
    score_matrices,
)
from nemotron_train.kernels.triton.scan_factors import Factors, chunk_length, factors, padded
from nemotron_train.kernels.triton.scan_gradients import (
    group_gradients,
    input_gradients,
    pass_gradients,
    scores_backward,
)

_ROWS = 64  # tokens of a tile of `scores_backward`
_STATE_BLOCK = 1024


def _state_gradients(
    dy_BSHP: Tensor, C_BSGN: Tensor, f: Factors, states: Tensor, dfinal_BHPN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the state after each chunk, [B, K, H, P, N]; of the initial state; and each
    chunk's part of the gradient of cum at its end that comes from the entering state, [B, H, K]."""
    gradients = chunk_sums(dy_BSHP, C_BSGN, f.read, f.chunk)
    batch, num_chunks, heads, channels, width = gradients.shape
    size = channels * width
    if dfinal_BHPN is None:
        dfinal_BHPN = gradients.new_zeros(batch, heads, channels, width)
    dinitial_BHPN = torch.empty_like(dfinal_BHPN, dtype=torch.float32)
    blocks = tiles(size, _STATE_BLOCK)
    parts = gradients.new_empty(blocks, batch, heads, num_chunks)
    pass_gradients[(batch * heads * blocks,)](
        gradients,
        states,
        f.carry,
        dfinal_BHPN.float().contiguous(),
        dinitial_BHPN,
        parts,
        heads,
        num_chunks,
        size,
        BLOCK=_STATE_BLOCK,
    )
    return gradients, dinitial_BHPN, parts.sum(0) * f.carry


def _gradient_of_decays(f: Factors, dcum_BHT: Tensor, dend_BHK: Tensor) -> Tensor:
    """da [B, H, T]: the sum of dcum over the later tokens of the chunk and document, where the
    chunk's last token also gets dend. FP64 sums; what belongs to a later document is taken out."""
    dcum = dcum_BHT.double().unflatten(2, (f.num_chunks, f.chunk))
    dcum[..., -1] += dend_BHK
    sums = torch.nn.functional.pad(dcum.flip(-1).cumsum(-1).flip(-1), (0, 1))
    ids_BKL = f.ids_BT.unflatten(1, (-1, f.chunk))
    after_BKL = torch.searchsorted(ids_BKL, ids_BKL, right=True)  # the next document's first token
    later = sums.gather(-1, after_BKL[:, None].expand_as(dcum))
    return (sums[..., :-1] - later).float().flatten(2)


def _score_gradients(
    x_BSHP: Tensor, dy_BSHP: Tensor, scores: Tensor, f: Factors
) -> tuple[Tensor, Tensor, Tensor]:
    """dscores, and for each token what it reads and what it writes inside its chunk: [B, H, T]."""
    batch, length, heads, channels = x_BSHP.shape
    groups, blocks = scores.shape[2], tiles(f.chunk, _ROWS)
    dscores, reads = torch.empty_like(scores), torch.empty_like(f.dt)
    writes = f.dt.new_empty(blocks, *f.dt.shape)
    scores_backward[(batch * f.num_chunks * groups * blocks,)](
        *(as_bits(t) for t in (x_BSHP, dy_BSHP, scores, dscores)),
        reads,
        writes,
        f.ids_BT,
        f.dt,
        f.high,
        f.low,
        length,
        heads,
        heads // groups,
        f.num_chunks,
        channels,
        f.dt.numel(),
        x_BSHP.stride(),
        dy_BSHP.stride(),
        L=f.chunk,
        ROWS=f.chunk // blocks,
        CHANNELS=padded(channels),
        num_warps=8,
    )
    return dscores, reads, writes.sum(0)


def _gradient_of_group(
    u_BSHP: Tensor,
    weights_BHT: Tensor,
    states: Tensor,
    dscores: Tensor,
    other_BSGN: Tensor,
    chunk: int,
) -> Tensor:
    """dscores other + sum over a group's heads of weight u state: [B, S, G, N]. dscores may be
    transposed."""
    batch, length, heads, channels = u_BSHP.shape
    groups, width = other_BSGN.shape[2:]
    num_chunks = states.shape[1]
    out_BSGN = other_BSGN.new_empty(other_BSGN.shape)
    group_gradients[(batch * num_chunks * groups * tiles(width, COLUMNS),)](
        as_bits(u_BSHP),
        weights_BHT.contiguous(),
        states,
        *(as_bits(t) for t in (dscores, other_BSGN, out_BSGN)),
        length,
        heads,
        heads // groups,
        num_chunks,
        channels,
        width,
        *dscores.stride()[3:],
        u_BSHP.stride(),
        other_BSGN.stride(),
        NARROW=u_BSHP.dtype == torch.bfloat16,
        L=chunk,
        CHANNELS=padded(channels),
        COLUMNS=min(COLUMNS, padded(width)),
        DEPTH=min(DEPTH, chunk),
        num_warps=8,
    )
    return out_BSGN


def scan_backward(
    dy_BSHP: Tensor,
    dfinal_BHPN: Tensor | None,
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    initial_BHPN: Tensor | None,
    ids_BS: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and the initial state, given those of the results of
    `scan.scan`, whose arguments follow. x, B and C in their dtypes, the others FP32. Sums are added
    in a fixed order, so results repeat bit for bit."""
    batch, length, heads, channels = x_BSHP.shape
    groups, width = B_BSGN.shape[2:]
    f = factors(dt_BSH, A_H, ids_BS, chunk_length(chunk_size, length))
    dy_BSHP = dy_BSHP.to(x_BSHP.dtype)
    scores = score_matrices(C_BSGN, B_BSGN, f.chunk)
    states, _ = entering_states(x_BSHP, B_BSGN, f, initial_BHPN)
    dafter, dinitial, dend_BHK = _state_gradients(dy_BSHP, C_BSGN, f, states, dfinal_BHPN)
    dscores, reads, writes = _score_gradients(x_BSHP, dy_BSHP, scores, f)
    written = f.write * f.dt
    dB_BSGN = _gradient_of_group(x_BSHP, written, dafter, dscores.mT, C_BSGN, f.chunk)
    dC_BSGN = _gradient_of_group(dy_BSHP, f.read, states, dscores, B_BSGN, f.chunk)

    dx_BSHP = torch.empty_like(x_BSHP)
    through_D, read_sums, write_sums = (torch.empty_like(f.dt) for _ in range(3))
    inputs = (x_BSHP, dy_BSHP, B_BSGN, C_BSGN, dx_BSHP)
    input_gradients[(batch * f.num_chunks * heads,)](
        *(as_bits(t) for t in (*inputs, scores)),
        states,
        dafter,
        D_H.float().contiguous(),
        f.ids_BT,
        f.dt,
        f.high,
        f.low,
        f.read,
        f.write,
        through_D,
        read_sums,
        write_sums,
        length,
        heads,
        heads // groups,
        f.num_chunks,
        channels,
        width,
        *(t.stride() for t in inputs),
        NARROW=x_BSHP.dtype == torch.bfloat16,
        L=f.chunk,
        CHANNELS=padded(channels),
        DEPTH=min(DEPTH, f.chunk),
        num_warps=8,
    )
    dxdt = writes + write_sums  # the gradient of dt_s through x_s dt_s
    dend_BHK = dend_BHK + (f.dt * write_sums).unflatten(2, (-1, f.chunk)).sum(-1)
    da = _gradient_of_decays(f, reads + read_sums - f.dt * dxdt, dend_BHK)
    ddt = dxdt + da * A_H.float()[:, None]
    return (
        dx_BSHP,
        ddt[..., :length].transpose(1, 2),
        (da * f.dt).sum((0, 2)),
        dB_BSGN,
        dC_BSGN,
        through_D.sum((0, 2)),
        dinitial,
    )
