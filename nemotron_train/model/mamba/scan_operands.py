"""The small operands that the chunked scan derives from dt, A, B, C and the document ids.

Owns: the running sums of decays, the factors of the split exponential, the document masks, the
choice of steep heads, the padding to whole chunks. Does not own: the large products
(`chunked_scan`), the computation of steep heads (`steep_heads`).

Shape suffixes: as in chunked_scan.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_train.model.mamba import scan_scaling

# Largest -cum (nats within a chunk) that the split exponential accepts: exp(79) = 2e34 is finite in
# FP32 and BF16. A head beyond it is steep.
SPLIT_RANGE = 79.0
# The input's factor is divided by this and the output's multiplied by it. That centres the range:
# no operand of a product is scaled by less than 1e-18 or more than 1e18. A power of two, so it
# adds no rounding.
CENTRE = 2.0**57


class Operands(NamedTuple):
    """The operands of the forward pass that do not depend on x, saved for the backward pass.

    They are small compared to x: about L x G, J and N numbers a token. The two masks are None if
    each row is one document.
    """

    dt_KGBLJ: Tensor
    B_KGBLN: Tensor
    C_KGBLN: Tensor
    scores_KGBLL: Tensor  # C_l . B_s for s < l in the same document, else 0
    own_KGBL: Tensor  # the diagonal C_l . B_l, kept apart from the scores
    cum_KGBLJ: Tensor  # FP64 running sum of dt A within chunk and document
    read_KGBLJ: Tensor  # exp(cum) * centre, on outputs
    write_KGBLJ: Tensor  # exp(-cum) / centre, on inputs; steep: exp(cum_end - cum) / centre
    end_KGBJ: Tensor  # exp(cum_end), multiplies the sum of xw B^T of a chunk; steep: 1
    carry_KGBJ: Tensor  # exp(cum_end), multiplies the previous state; 0 if a document ends here
    pairs: Tensor  # FP64 [L, L] or [K, 1, B, L, L]: 1 where s <= l in one document
    steep_I: Tensor | None  # indices of the steep heads
    first_KGBL1: Tensor | None  # 1 if the token's document also holds the token before the chunk
    last_KGBL1: Tensor | None  # 1 if the token's document also holds the chunk's last token


def derive_operands(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    document_ids_BS: Tensor | None,
    chunk_size: int,
) -> Operands:
    """Pad to whole chunks, reorder to chunk-first, and compute the operands. `x_BSHP` gives only
    the length and the dtype of the products."""
    length, num_groups = x_BSHP.shape[1], B_BSGN.shape[2]
    chunk = min(chunk_size, length)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length
    # dt = 0 in the padding: decay exp(0) = 1 and no input, so the state does not change there.
    dt_KGBLJ = pad_by(dt_BSH, padding).unflatten(2, (num_groups, -1))
    dt_KGBLJ, B_KGBLN, C_KGBLN = (
        t.unflatten(1, (num_chunks, chunk)).permute(1, 3, 0, 2, 4).contiguous()
        for t in (dt_KGBLJ, pad_by(B_BSGN, padding), pad_by(C_BSGN, padding))
    )
    dtype = x_BSHP.dtype  # of the products
    accumulate = dt_BSH.dtype  # of sums, decays and states
    pairs = torch.ones(chunk, chunk, dtype=torch.float64, device=x_BSHP.device).tril_()
    first_KGBL1 = last_KGBL1 = whole_KGB1 = None
    if document_ids_BS is not None:
        # The padding belongs to the last document, so that it does not reset the state.
        ids = torch.cat([document_ids_BS, document_ids_BS[:, -1:].expand(-1, padding)], dim=1)
        ids_KGBL = ids.unflatten(1, (num_chunks, chunk)).transpose(0, 1)[:, None]
        # The entering state belongs to the document of the token before the chunk.
        entering = torch.cat([ids_KGBL[:1, ..., :1], ids_KGBL[:-1, ..., -1:]])
        leaving = ids_KGBL[..., -1:]
        pairs = (ids_KGBL[..., :, None] == ids_KGBL[..., None, :]) * pairs
        first_KGBL1 = (ids_KGBL == entering).to(dtype)[..., None]
        last_KGBL1 = (ids_KGBL == leaving).to(dtype)[..., None]
        whole_KGB1 = entering == leaving  # the chunk lies in one document: its state carries over

    # cum_l = sum of dt_s A over s <= l in l's document, as a product with the 0/1 matrix `pairs`.
    # FP64: differences of running sums must not cancel after one very fast decay, and TF32 must
    # not touch them. It is J numbers a token. Sums over the whole chunk would give the same but for
    # rounding, since only differences inside a document are used; but then the other documents
    # would change a document's bits and could make its heads steep.
    cum_KGBLJ = pairs @ (dt_KGBLJ.double() * A_H.double().view(num_groups, 1, 1, -1))
    steep_GJ, steep_I = _steep(cum_KGBLJ)
    write_KGBLJ = -cum_KGBLJ  # exponents; exp follows in the return statement
    end_KGBJ = cum_KGBLJ[..., -1, :]
    carry_KGBJ = end_KGBJ.to(accumulate).exp()
    if whole_KGB1 is not None:
        carry_KGBJ = carry_KGBJ * whole_KGB1
    if steep_I.numel():
        # exp(-cum) would overflow. A steep head takes part in the chunk's state sum only, so its
        # input factor is relative to the chunk's end, exp(cum_end - cum) <= 1, and `end` is 1.
        # Tokens of earlier documents get a meaningless positive exponent here; they are masked
        # out of the state, so it only has to stay finite.
        relative = (end_KGBJ[..., None, :] - cum_KGBLJ).clamp_(max=0)
        write_KGBLJ = torch.where(steep_GJ[:, None, None], relative, write_KGBLJ)
        end_KGBJ = end_KGBJ.masked_fill(steep_GJ[:, None], 0)

    scores_KGBLL = bmm(C_KGBLN, B_KGBLN.mT)
    # A copy: the next line sets the diagonal to zero.
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


def _steep(cum_KGBLJ: Tensor) -> tuple[Tensor, Tensor]:
    """Which heads are steep, bool [G, J], and their indices.

    On a GPU every head counts as steep: to ask which are would make the host wait once a layer and
    micro-batch. It costs a decay matrix of [L, L] a head and chunk; the kernels of `core.ssd`,
    which a GPU should have, need neither.
    """
    if cum_KGBLJ.is_cuda:
        num_groups, heads = cum_KGBLJ.shape[1], cum_KGBLJ.shape[4]
        steep_GJ = cum_KGBLJ.new_ones((num_groups, heads), dtype=torch.bool)
        return steep_GJ, torch.arange(num_groups * heads, device=cum_KGBLJ.device)
    steep_GJ = cum_KGBLJ.amin((0, 2, 3)) < -SPLIT_RANGE
    return steep_GJ, steep_GJ.flatten().nonzero().flatten()


def own_weight(op: Operands, D_H: Tensor) -> Tensor:
    """The weight of x_l on y_l, D + dt_l (C_l . B_l): [K, G, B, L, J]."""
    D_GJ = D_H.view(op.dt_KGBLJ.shape[1], 1, 1, -1)
    return torch.addcmul(D_GJ, op.dt_KGBLJ, op.own_KGBL[..., None])


def pad_by(t: Tensor, padding: int) -> Tensor:
    """`t` [B, S, ...] with `padding` zero tokens after the last one."""
    if padding == 0:
        return t
    return torch.cat([t, t.new_zeros(t.shape[0], padding, *t.shape[2:])], dim=1)


def pad(t: Tensor, op: Operands) -> Tensor:
    """`t` [B, S, ...] padded with zeros to whole chunks, [B, K x L, ...]."""
    return pad_by(t, op.dt_KGBLJ.shape[0] * op.dt_KGBLJ.shape[3] - t.shape[1])


def chunk_view(t: Tensor, op: Operands) -> Tensor:
    """[B, K x L, H, ...] -> a view [K, G, B, L, J, ...]."""
    return scan_scaling.chunks(t, op.dt_KGBLJ)


def masked(t: Tensor, mask: Tensor | None) -> Tensor:
    """t * mask, or `t` itself without a mask (one document a row)."""
    return t if mask is None else t * mask


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b over the last two dimensions; the three leading ones (K, G, B) are one batch."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


def add_bmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place; `total` is contiguous."""
    total.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def bmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b; `out` is contiguous and may have a wider dtype than a and b."""
    if out.dtype == a.dtype:
        torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=out.flatten(0, 2))
    else:
        out.copy_(bmm(a, b))
