"""Heads that decay too fast for the split exponential: one explicit decay matrix each.

Owns: the forward and backward contribution of those heads inside a chunk, and the indexing of
heads. Does not own: the choice of steep heads (`scan_operands`), the rest of the scan
(`chunked_scan`).

Forward, per steep head, inside a chunk (s < l, same document):
    y_l = sum_s weights_ls xdt_s,  weights_ls = scores_ls decay_ls,
    decay_ls = exp(cum_l - cum_s),  xdt_s = x_s dt_s.
The contribution of the state that enters the chunk is computed with all other heads.

Shape suffixes: as in chunked_scan.py; I the steep heads.
"""

from typing import NamedTuple

from torch import Tensor

from nemotron_train.model.mamba.scan_operands import Operands, chunk_view


class SteepHeads(NamedTuple):
    """Operands of the steep heads, with the head dimension before the tokens."""

    decay_KIBLL: Tensor  # exp(cum_l - cum_s)
    weights_KIBLL: Tensor  # scores x decay
    x_KIBLP: Tensor
    dt_KIBL1: Tensor
    xdt_KIBLP: Tensor


def steep_heads(op: Operands, steep_I: Tensor, x_BSHP: Tensor) -> SteepHeads:
    """Compute the operands; the forward and the backward pass each do so (they are not saved)."""
    cum_KIBL = select_heads(op.cum_KGBLJ, steep_I)
    difference = cum_KIBL[..., :, None] - cum_KIBL[..., None, :]
    # Positive above the diagonal, where exp could overflow. The scores are zero there, so the
    # clamped value does not matter. The difference is taken in FP64 (cum's dtype).
    decay_KIBLL = difference.to(x_BSHP.dtype).clamp_(max=0).exp_()
    scores_KIBLL = op.scores_KGBLL[:, steep_I // op.dt_KGBLJ.shape[4]]  # of each head's group
    x_KIBLP = select_heads(chunk_view(x_BSHP, op), steep_I)
    dt_KIBL = select_heads(op.dt_KGBLJ, steep_I)
    dt_KIBL1 = dt_KIBL[..., None]
    xdt_KIBLP = (x_KIBLP * dt_KIBL1).to(x_BSHP.dtype)
    return SteepHeads(decay_KIBLL, decay_KIBLL * scores_KIBLL, x_KIBLP, dt_KIBL1, xdt_KIBLP)


def add_steep_gradients(
    op: Operands,
    steep: SteepHeads,
    dy_KGBLJP: Tensor,
    dscores_KGBLL: Tensor,
    row_KGBLJ: Tensor,
    dxdt_KGBLJ: Tensor,
    dx_KGBLJP: Tensor,
) -> None:
    """Add the part of the steep heads to four gradients of the backward pass, in place.

    From y = weights @ xdt (module docstring):
        dxdt    = weights^T dy                  gradient of x dt; dx += dxdt dt
        dscores = (dy xdt^T) decay              elementwise product with the decay
        row_l   = sum_P dy_l y_l                d loss / d cum_l, l as the reading token
        dxdt_s  = sum_P dxdt_s x_s              d loss / d dt_s; the caller's -dt dxdt is then
                                                d loss / d cum_s, s as the writing token
    The last two need no [L, L] gradient of the decay: summed over s (or l), d loss / d decay times
    decay is d loss / d weights times weights, which is dy_l . y_l (or xdt_s . dxdt_s).
    """
    assert op.steep_I is not None
    accumulate = row_KGBLJ.dtype
    dy_KIBLP = select_heads(dy_KGBLJP, op.steep_I)
    y_KIBLP = steep.weights_KIBLL @ steep.xdt_KIBLP  # recomputed: cheaper than saving it
    dxdt_KIBLP = steep.weights_KIBLL.mT @ dy_KIBLP
    # Gradient of weights, times decay: the gradient of this head's copy of its group's scores.
    dweights_KIBLL = (dy_KIBLP @ steep.xdt_KIBLP.mT).mul_(steep.decay_KIBLL)
    # Heads of one group share the scores: index_add_ sums over them. Entries on and above the
    # diagonal are not zero here; the caller masks them.
    dscores_KGBLL.index_add_(1, op.steep_I // op.dt_KGBLJ.shape[4], dweights_KIBLL)
    row_KIBL = (dy_KIBLP * y_KIBLP).sum(-1, dtype=accumulate)
    add_to_heads(row_KGBLJ, op.steep_I, row_KIBL)
    dxdt_KIBL = (dxdt_KIBLP * steep.x_KIBLP).sum(-1, dtype=accumulate)
    add_to_heads(dxdt_KGBLJ, op.steep_I, dxdt_KIBL)
    add_to_heads(dx_KGBLJP, op.steep_I, dxdt_KIBLP * steep.dt_KIBL1)


def select_heads(t_KGBLJ: Tensor, steep_I: Tensor) -> Tensor:
    """[K, G, B, L, J, ...] -> the heads `steep_I`, a copy [K, I, B, L, ...]."""
    heads = t_KGBLJ.shape[4]
    return t_KGBLJ.movedim(4, 2)[:, steep_I // heads, steep_I % heads]


def add_to_heads(total_KGBLJ: Tensor, steep_I: Tensor, part_KIBL: Tensor) -> None:
    """total[heads `steep_I`] += part, in place. part: [K, I, B, L, ...]."""
    heads = total_KGBLJ.shape[4]
    view = total_KGBLJ.movedim(4, 2)  # [K, G, J, B, L, ...], writes reach `total`
    view[:, steep_I // heads, steep_I % heads] += part_KIBL.to(view.dtype)


def without_steep(t: Tensor, op: Operands) -> Tensor:
    """`t` [K, G, B, L, J x P] with the channels of steep heads set to zero: they take no part in
    the shared products inside a chunk."""
    if op.steep_I is None:
        return t
    num_groups, heads = op.dt_KGBLJ.shape[1], op.dt_KGBLJ.shape[4]
    keep_H = t.new_ones(num_groups * heads).index_fill_(0, op.steep_I, 0)
    split = t.unflatten(-1, (heads, -1))
    return (split * keep_H.view(num_groups, 1, 1, heads, 1)).flatten(-2)
