"""Heads that decay too fast for the split exponential: explicit decay matrices, one a head.

Owns: the forward and backward contribution of those heads inside a chunk, and how heads are
selected. Does not own: which heads are steep (`scan_operands`), everything else of the scan
(`chunked_scan`).

Shape suffixes: as in chunked_scan.py; I the steep heads.
"""

from typing import NamedTuple

from torch import Tensor

from nemotron_train.model.mamba.scan_operands import Operands, chunk_view


class SteepHeads(NamedTuple):
    """Steep heads with their explicit weights, heads in front of tokens."""

    decay_KIBLL: Tensor
    weights_KIBLL: Tensor  # scores x decay
    x_KIBLP: Tensor
    dt_KIBL1: Tensor
    xdt_KIBLP: Tensor


def steep_heads(op: Operands, steep_I: Tensor, x_BSHP: Tensor) -> SteepHeads:
    cum_KIBL = select_heads(op.cum_KGBLJ, steep_I)
    difference = cum_KIBL[..., :, None] - cum_KIBL[..., None, :]
    # Positive above the diagonal, where it could overflow; the scores are zero there.
    decay_KIBLL = difference.to(x_BSHP.dtype).clamp_(max=0).exp_()
    scores_KIBLL = op.scores_KGBLL[:, steep_I // op.dt_KGBLJ.shape[4]]
    x_KIBLP, dt_KIBL = (
        select_heads(chunk_view(x_BSHP, op), steep_I),
        select_heads(op.dt_KGBLJ, steep_I),
    )
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
    """Adds the steep heads' part to the four gradients, in place."""
    assert op.steep_I is not None
    accumulate = row_KGBLJ.dtype
    dy_KIBLP = select_heads(dy_KGBLJP, op.steep_I)
    y_KIBLP = steep.weights_KIBLL @ steep.xdt_KIBLP
    dxdt_KIBLP = steep.weights_KIBLL.mT @ dy_KIBLP
    dweights_KIBLL = (dy_KIBLP @ steep.xdt_KIBLP.mT).mul_(steep.decay_KIBLL)
    dscores_KGBLL.index_add_(1, op.steep_I // op.dt_KGBLJ.shape[4], dweights_KIBLL)
    row_KIBL = (dy_KIBLP * y_KIBLP).sum(-1, dtype=accumulate)
    add_to_heads(row_KGBLJ, op.steep_I, row_KIBL)
    dxdt_KIBL = (dxdt_KIBLP * steep.x_KIBLP).sum(-1, dtype=accumulate)
    add_to_heads(dxdt_KGBLJ, op.steep_I, dxdt_KIBL)
    add_to_heads(dx_KGBLJP, op.steep_I, dxdt_KIBLP * steep.dt_KIBL1)


def select_heads(t_KGBLJ: Tensor, steep_I: Tensor) -> Tensor:
    """[K, G, B, L, J, ...] -> the chosen heads [K, I, B, L, ...]."""
    heads = t_KGBLJ.shape[4]
    return t_KGBLJ.movedim(4, 2)[:, steep_I // heads, steep_I % heads]


def add_to_heads(total_KGBLJ: Tensor, steep_I: Tensor, part_KIBL: Tensor) -> None:
    """total[chosen heads] += part, through a view of `total`."""
    heads = total_KGBLJ.shape[4]
    view = total_KGBLJ.movedim(4, 2)
    view[:, steep_I // heads, steep_I % heads] += part_KIBL.to(view.dtype)


def without_steep(t: Tensor, op: Operands) -> Tensor:
    """[K, G, B, L, J x P] with the steep heads zeroed."""
    if op.steep_I is None:
        return t
    num_groups, heads = op.dt_KGBLJ.shape[1], op.dt_KGBLJ.shape[4]
    keep_H = t.new_ones(num_groups * heads).index_fill_(0, op.steep_I, 0)
    split = t.unflatten(-1, (heads, -1))
    return (split * keep_H.view(num_groups, 1, 1, heads, 1)).flatten(-2)
