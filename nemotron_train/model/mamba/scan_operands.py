"""The small operands that the chunked scan derives from everything but x, and its padding.

Owns: the running sums of decays, the factors of the split exponential, the document masks, which
heads are steep. Does not own: the products (`chunked_scan`), the steep heads' own form
(`steep_heads`).

Shape suffixes: as in chunked_scan.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_train.model.mamba import scan_scaling

# Largest -cum (nats within a chunk) the split takes: exp(79) = 2e34 is finite in FP32 and BF16.
SPLIT_RANGE = 79.0
# A power of two moved from the input's factor to the output's centres the range without rounding,
# so no operand of a product leaves 1e-18 ... 1e18 times its natural size.
CENTRE = 2.0**57


class Operands(NamedTuple):
    """What the forward derives from everything but x, and keeps for the backward.

    Small beside x: L x G, J and N numbers a token. The masks are None where each row is one
    document.
    """

    dt_KGBLJ: Tensor
    B_KGBLN: Tensor
    C_KGBLN: Tensor
    scores_KGBLL: Tensor  # C.B^T strictly below the diagonal, within documents
    own_KGBL: Tensor  # its diagonal, C_l . B_l
    cum_KGBLJ: Tensor  # FP64 running sum of dt A within chunk and document
    read_KGBLJ: Tensor  # exp(cum) * centre, on outputs
    write_KGBLJ: Tensor  # exp(-cum) / centre, on inputs; steep: exp(cum_end - cum) / centre
    end_KGBJ: Tensor  # exp(cum_end), from a chunk's sum to the state; steep: 1
    carry_KGBJ: Tensor  # exp(cum_end), from state to state; 0 where the document ends
    pairs: Tensor  # FP64 [L, L] or [K, 1, B, L, L]: 1 where s <= l in one document
    steep_I: Tensor | None  # indices of the steep heads
    first_KGBL1: Tensor | None  # 1 where the state entering the chunk is this token's document's
    last_KGBL1: Tensor | None  # 1 where this token's document is the one leaving the chunk


def derive_operands(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    document_ids_BS: Tensor | None,
    chunk_size: int,
) -> Operands:
    length, num_groups = x_BSHP.shape[1], B_BSGN.shape[2]
    chunk = min(chunk_size, length)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length
    # dt = 0 in the padding: the state passes through it untouched.
    dt_KGBLJ = pad_by(dt_BSH, padding).unflatten(2, (num_groups, -1))
    dt_KGBLJ, B_KGBLN, C_KGBLN = (
        t.unflatten(1, (num_chunks, chunk)).permute(1, 3, 0, 2, 4).contiguous()
        for t in (dt_KGBLJ, pad_by(B_BSGN, padding), pad_by(C_BSGN, padding))
    )
    dtype, accumulate = x_BSHP.dtype, dt_BSH.dtype
    pairs = torch.ones(chunk, chunk, dtype=torch.float64, device=x_BSHP.device).tril_()
    first_KGBL1 = last_KGBL1 = whole_KGB1 = None
    if document_ids_BS is not None:
        ids = torch.cat([document_ids_BS, document_ids_BS[:, -1:].expand(-1, padding)], dim=1)
        ids_KGBL = ids.unflatten(1, (num_chunks, chunk)).transpose(0, 1)[:, None]
        entering = torch.cat([ids_KGBL[:1, ..., :1], ids_KGBL[:-1, ..., -1:]])
        leaving = ids_KGBL[..., -1:]
        pairs = (ids_KGBL[..., :, None] == ids_KGBL[..., None, :]) * pairs
        first_KGBL1 = (ids_KGBL == entering).to(dtype)[..., None]
        last_KGBL1 = (ids_KGBL == leaving).to(dtype)[..., None]
        whole_KGB1 = entering == leaving

    # FP64: differences of running sums must not cancel after one very fast decay, and TF32 must
    # not touch them. It is J numbers a token.
    cum_KGBLJ = pairs @ (dt_KGBLJ.double() * A_H.double().view(num_groups, 1, 1, -1))
    steep_GJ = cum_KGBLJ.amin((0, 2, 3)) < -SPLIT_RANGE
    # SYNC: which heads are steep decides shapes; free on a CPU, and CUDA has its own kernel.
    steep_I = steep_GJ.flatten().nonzero().flatten()
    write_KGBLJ, end_KGBJ = -cum_KGBLJ, cum_KGBLJ[..., -1, :]
    carry_KGBJ = end_KGBJ.to(accumulate).exp()
    if whole_KGB1 is not None:
        carry_KGBJ = carry_KGBJ * whole_KGB1
    if steep_I.numel():
        # Tokens of earlier documents get a meaningless positive exponent here; they are masked
        # out of the state, so it only has to stay finite.
        relative = (end_KGBJ[..., None, :] - cum_KGBLJ).clamp_(max=0)
        write_KGBLJ = torch.where(steep_GJ[:, None, None], relative, write_KGBLJ)
        end_KGBJ = end_KGBJ.masked_fill(steep_GJ[:, None], 0)

    scores_KGBLL = bmm(C_KGBLN, B_KGBLN.mT)
    own_KGBL = scores_KGBLL.diagonal(dim1=-2, dim2=-1).to(accumulate, copy=True)
    scores_KGBLL.mul_(pairs.tril(-1).to(dtype))
    return Operands(
        dt_KGBLJ,
        B_KGBLN,
        C_KGBLN,
        scores_KGBLL,
        own_KGBL,
        cum_KGBLJ,
        cum_KGBLJ.to(accumulate).exp().mul_(CENTRE),
        write_KGBLJ.to(accumulate).exp().div_(CENTRE),
        end_KGBJ.to(accumulate).exp(),
        carry_KGBJ,
        pairs,
        steep_I if steep_I.numel() else None,
        first_KGBL1,
        last_KGBL1,
    )


def own_weight(op: Operands, D_H: Tensor) -> Tensor:
    """The weight of a token on its own output, D + dt (C . B): [K, G, B, L, J]."""
    D_GJ = D_H.view(op.dt_KGBLJ.shape[1], 1, 1, -1)
    return torch.addcmul(D_GJ, op.dt_KGBLJ, op.own_KGBL[..., None])


def pad_by(t: Tensor, padding: int) -> Tensor:
    """Zeros after the last token."""
    if padding == 0:
        return t
    return torch.cat([t, t.new_zeros(t.shape[0], padding, *t.shape[2:])], dim=1)


def pad(t: Tensor, op: Operands) -> Tensor:
    return pad_by(t, op.dt_KGBLJ.shape[0] * op.dt_KGBLJ.shape[3] - t.shape[1])


def chunk_view(t: Tensor, op: Operands) -> Tensor:
    """[B, K x L, H, ...] -> a view [K, G, B, L, J, ...]."""
    return scan_scaling.chunks(t, op.dt_KGBLJ)


def masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t * mask


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Product over the last two dimensions; the three leading ones are one batch."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


def add_bmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place; `total` is contiguous."""
    total.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def bmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, `out` contiguous and possibly of a wider dtype."""
    if out.dtype == a.dtype:
        torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=out.flatten(0, 2))
    else:
        out.copy_(bmm(a, b))
