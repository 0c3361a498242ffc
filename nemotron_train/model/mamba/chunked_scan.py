"""The chunked PyTorch form of SSD (arXiv 2405.21060, section 6) with a hand-derived backward.

Owns the arithmetic only; `ssd.ssd` is the public function and states the contract. All heavy
work is batched matrix products; what scales their operands, and the short loop over chunks for
the state, is in `ssd_scaling`.

Shape suffixes: B batch, S tokens, H heads, P channels a head, G groups, N state size, L tokens a
chunk, K chunks, J heads a group (H = G x J), I the «steep» heads. Tensors are chunk-first and
group-second (K G B L ...): every product is then one batch over contiguous operands, and a step
of the loop over chunks touches one contiguous block.

How it avoids a decay matrix for every head. Inside a chunk, token s weighs on token l with
(C_l . B_s) exp(cum_l - cum_s) dt_s, where cum is the running sum of dt A. The exponential is split
into a factor exp(cum_l) on the output and exp(-cum_s) on the input; C.B^T is then shared by all
heads of a group, and a chunk is one product of width J x P. The split is safe while -cum stays
inside the exponent range. A head that forgets faster than that anywhere in the batch (a steep
head) gets its explicit decay matrix instead, and takes no part in the shared product.

A document's output does not depend on its neighbours in any bit, save that a neighbour's decays
can make a head steep, which changes that head's rounding.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_train.model.mamba import scan_scaling

# Largest -cum (nats within a chunk) the split takes: exp(79) = 2e34 is finite in FP32 and BF16.
SPLIT_RANGE = 79.0
# A power of two moved from the input's factor to the output's centres the range without rounding,
# so no operand of a product leaves 1e-18 ... 1e18 times its natural size.
_CENTRE = 2.0**57


class _Operands(NamedTuple):
    """What the forward derives from everything but x, and keeps for the backward.

    Small beside x: L x G, J and N numbers a token. The masks are None for «one document a row».
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


def chunked_ssd(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    initial_BHPN: Tensor | None,
    document_ids_BS: Tensor | None,
    chunk_size: int,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """y_BSHP and, if asked for, the final state; see `ssd.ssd`."""
    return _ChunkedSsd.apply(
        x_BSHP,
        dt_BSH,
        A_H,
        B_BSGN,
        C_BSGN,
        D_H,
        initial_BHPN,
        document_ids_BS,
        chunk_size,
        return_final_state,
    )


class _ChunkedSsd(torch.autograd.Function):
    """Saves the small operands, x, the state entering each chunk, and the input and output of the
    products (x's width each). Products take x's dtype, sums dt's."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        A_H: Tensor,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        D_H: Tensor,
        initial_BHPN: Tensor | None,
        document_ids_BS: Tensor | None,
        chunk_size: int,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        length, head_dim = x_BSHP.shape[1], x_BSHP.shape[3]
        op = _operands(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, document_ids_BS, chunk_size)
        num_chunks = op.dt_KGBLJ.shape[0]
        x_BSHP = _pad(x_BSHP, op)
        xw = scan_scaling.to_chunks(x_BSHP, op.dt_KGBLJ, op.write_KGBLJ)
        states = _scan_states(op, xw, initial_BHPN)

        # The output below the diagonal, still without exp(cum_l).
        out = _bmm(op.scores_KGBLL, _without_steep(xw, op))
        start = 0 if initial_BHPN is not None else 1  # chunk 0 enters with zeros
        if start < num_chunks:
            entering = states[start:num_chunks].to(out.dtype)
            _add_bmm(out[start:], _masked(op.C_KGBLN, op.first_KGBL1)[start:], entering)

        # A token's own contribution dt (C.B) x rides on the D skip.
        y_BSHP = scan_scaling.from_chunks(x_BSHP, out, _own_tokens(op, D_H), op.read_KGBLJ)
        if op.steep_I is not None:
            steep = _steep(op, op.steep_I, x_BSHP)
            _add_to_heads(_chunks(y_BSHP, op), op.steep_I, steep.weights_KIBLL @ steep.xdt_KIBLP)

        ctx.save_for_backward(x_BSHP, A_H, D_H, states, out, xw, *op)
        ctx.length, ctx.has_initial = length, initial_BHPN is not None
        final_BHPN = _state_to_heads(states[-1], head_dim) * _CENTRE if return_final_state else None
        return y_BSHP[:, :length].to(x_BSHP.dtype), final_BHPN

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dy_BSHP, dfinal_BHPN = gradients
        x_BSHP, A_H, D_H, states, out, xw, *rest = ctx.saved_tensors
        op = _Operands(*rest)
        num_chunks, num_groups = op.dt_KGBLJ.shape[:2]
        head_dim, dtype, accumulate = x_BSHP.shape[3], x_BSHP.dtype, op.dt_KGBLJ.dtype
        dy_BSHP = _pad(dy_BSHP, op)
        # Three reductions over a head's channels carry everything dt, A and D need: two here.
        # row: d loss / d cum_l as a reader.
        dyr, row_KGBLJ, dyx_KGBLJ = scan_scaling.readers(dy_BSHP, x_BSHP, out, op.read_KGBLJ)

        # Through the states; dsum is the gradient of each chunk's own sum of x B^T.
        dstates = _states_asked(op, dyr, dfinal_BHPN)
        ends_KGBJ, dsum = scan_scaling.scan_states_backward(
            dstates, states.view_as(dstates), op.end_KGBJ, op.carry_KGBJ, dtype
        )
        dinitial = None
        if ctx.has_initial:
            dinitial = _state_to_heads(dstates[0].flatten(-2), head_dim) / _CENTRE

        dyr_inside = _without_steep(dyr, op)
        dscores = _bmm(dyr_inside, _without_steep(xw, op).mT)
        dxw = _bmm(op.scores_KGBLL.mT, dyr_inside)
        _add_bmm(dxw, _masked(op.B_KGBLN, op.last_KGBL1), dsum)

        dx_BSHP, dxdt_KGBLJ = scan_scaling.writers(
            dy_BSHP, x_BSHP, dxw, _own_tokens(op, D_H), op.dt_KGBLJ, op.write_KGBLJ
        )
        if op.steep_I is not None:
            steep = _steep(op, op.steep_I, x_BSHP)
            dy_KGBLJP, dx_KGBLJP = _chunks(dy_BSHP, op), _chunks(dx_BSHP, op)
            _steep_backward(op, steep, dy_KGBLJP, dscores, row_KGBLJ, dxdt_KGBLJ, dx_KGBLJP)

        dcum_KGBLJ = row_KGBLJ.addcmul_(op.dt_KGBLJ, dxdt_KGBLJ, value=-1)
        dcum_KGBLJ[..., -1, :] += ends_KGBJ
        da_KGBLJ = (op.pairs.mT @ dcum_KGBLJ.double()).to(accumulate)
        ddt_KGBLJ = dxdt_KGBLJ.addcmul_(dyx_KGBLJ, op.own_KGBL[..., None])
        ddt_KGBLJ.addcmul_(da_KGBLJ, A_H.view(num_groups, 1, 1, -1))
        dA_H = (da_KGBLJ * op.dt_KGBLJ).sum((0, 2, 3)).flatten()

        # B and C; the diagonal of the scores joins here.
        dscores.mul_(op.pairs.tril(-1).to(dtype))
        dscores.diagonal(dim1=-2, dim2=-1).add_((dyx_KGBLJ * op.dt_KGBLJ).sum(-1))
        dB = _masked(_bmm(xw, dsum.mT), op.last_KGBL1)
        _add_bmm(dB, dscores.mT, op.C_KGBLN)
        dC = _bmm(dscores, op.B_KGBLN)
        start = 0 if ctx.has_initial else 1
        if start < num_chunks:
            part = _bmm(dyr[start:], states[start:num_chunks].to(dtype).mT)
            dC[start:] += part if op.first_KGBL1 is None else part * op.first_KGBL1[start:]

        tokens = slice(0, ctx.length)
        return (
            dx_BSHP[:, tokens].to(dtype),
            scan_scaling.to_tokens(ddt_KGBLJ)[:, tokens],
            dA_H,
            scan_scaling.to_tokens(dB, merge=False)[:, tokens],
            scan_scaling.to_tokens(dC, merge=False)[:, tokens],
            dyx_KGBLJ.sum((0, 2, 3)).flatten(),
            dinitial,
            None,
            None,
            None,
        )


def _operands(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    document_ids_BS: Tensor | None,
    chunk_size: int,
) -> _Operands:
    length, num_groups = x_BSHP.shape[1], B_BSGN.shape[2]
    chunk = min(chunk_size, length)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length
    # dt = 0 in the padding: the state passes through it untouched.
    dt_KGBLJ = _pad_by(dt_BSH, padding).unflatten(2, (num_groups, -1))
    dt_KGBLJ, B_KGBLN, C_KGBLN = (
        t.unflatten(1, (num_chunks, chunk)).permute(1, 3, 0, 2, 4).contiguous()
        for t in (dt_KGBLJ, _pad_by(B_BSGN, padding), _pad_by(C_BSGN, padding))
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

    scores_KGBLL = _bmm(C_KGBLN, B_KGBLN.mT)
    own_KGBL = scores_KGBLL.diagonal(dim1=-2, dim2=-1).to(accumulate, copy=True)
    scores_KGBLL.mul_(pairs.tril(-1).to(dtype))
    return _Operands(
        dt_KGBLJ,
        B_KGBLN,
        C_KGBLN,
        scores_KGBLL,
        own_KGBL,
        cum_KGBLJ,
        cum_KGBLJ.to(accumulate).exp().mul_(_CENTRE),
        write_KGBLJ.to(accumulate).exp().div_(_CENTRE),
        end_KGBJ.to(accumulate).exp(),
        carry_KGBJ,
        pairs,
        steep_I if steep_I.numel() else None,
        first_KGBL1,
        last_KGBL1,
    )


def _scan_states(op: _Operands, xw: Tensor, initial_BHPN: Tensor | None) -> Tensor:
    """States divided by the centre, [K + 1, G, B, N, J x P] in dt's dtype: entry k enters chunk
    k, the last one is final. One batched product, then the loop over chunks."""
    num_chunks, num_groups, batch, _, state_size = op.B_KGBLN.shape
    heads = op.dt_KGBLJ.shape[4]
    shape = (num_chunks + 1, num_groups, batch, state_size, heads, xw.shape[-1] // heads)
    states = op.dt_KGBLJ.new_empty(shape)
    if initial_BHPN is None:
        states[0].zero_()
    else:
        states[0] = initial_BHPN.unflatten(1, (num_groups, heads)).permute(1, 0, 4, 2, 3) / _CENTRE
    _bmm_into(states[1:].flatten(-2), _masked(op.B_KGBLN, op.last_KGBL1).mT, xw)
    scan_scaling.scan_states(states, op.end_KGBJ, op.carry_KGBJ)
    return states.flatten(-2)


def _states_asked(op: _Operands, dyr: Tensor, dfinal_BHPN: Tensor | None) -> Tensor:
    """Gradients of `_scan_states`'s result before they are scanned, [K + 1, G, B, N, J, P]: entry k
    is what chunk k asks of the state entering it."""
    num_chunks, num_groups, batch, _, state_size = op.B_KGBLN.shape
    heads = op.dt_KGBLJ.shape[4]
    shape = (num_chunks + 1, num_groups, batch, state_size, heads, dyr.shape[-1] // heads)
    dstates = op.dt_KGBLJ.new_empty(shape)
    if dfinal_BHPN is None:
        dstates[-1].zero_()
    else:
        final = dfinal_BHPN.unflatten(1, (num_groups, heads)).permute(1, 0, 4, 2, 3)
        torch.mul(final, _CENTRE, out=dstates[-1])
    _bmm_into(dstates[:-1].flatten(-2), _masked(op.C_KGBLN, op.first_KGBL1).mT, dyr)
    return dstates


class _Steep(NamedTuple):
    """Steep heads with their explicit weights, heads in front of tokens."""

    decay_KIBLL: Tensor
    weights_KIBLL: Tensor  # scores x decay
    x_KIBLP: Tensor
    dt_KIBL1: Tensor
    xdt_KIBLP: Tensor


def _steep(op: _Operands, steep_I: Tensor, x_BSHP: Tensor) -> _Steep:
    cum_KIBL = _heads(op.cum_KGBLJ, steep_I)
    difference = cum_KIBL[..., :, None] - cum_KIBL[..., None, :]
    # Positive above the diagonal, where it could overflow; the scores are zero there.
    decay_KIBLL = difference.to(x_BSHP.dtype).clamp_(max=0).exp_()
    scores_KIBLL = op.scores_KGBLL[:, steep_I // op.dt_KGBLJ.shape[4]]
    x_KIBLP, dt_KIBL = _heads(_chunks(x_BSHP, op), steep_I), _heads(op.dt_KGBLJ, steep_I)
    dt_KIBL1 = dt_KIBL[..., None]
    xdt_KIBLP = (x_KIBLP * dt_KIBL1).to(x_BSHP.dtype)
    return _Steep(decay_KIBLL, decay_KIBLL * scores_KIBLL, x_KIBLP, dt_KIBL1, xdt_KIBLP)


def _steep_backward(
    op: _Operands,
    steep: _Steep,
    dy_KGBLJP: Tensor,
    dscores_KGBLL: Tensor,
    row_KGBLJ: Tensor,
    dxdt_KGBLJ: Tensor,
    dx_KGBLJP: Tensor,
) -> None:
    """Adds the steep heads' part to the four gradients, in place."""
    assert op.steep_I is not None
    accumulate = row_KGBLJ.dtype
    dy_KIBLP = _heads(dy_KGBLJP, op.steep_I)
    y_KIBLP = steep.weights_KIBLL @ steep.xdt_KIBLP
    dxdt_KIBLP = steep.weights_KIBLL.mT @ dy_KIBLP
    dweights_KIBLL = (dy_KIBLP @ steep.xdt_KIBLP.mT).mul_(steep.decay_KIBLL)
    dscores_KGBLL.index_add_(1, op.steep_I // op.dt_KGBLJ.shape[4], dweights_KIBLL)
    row_KIBL = (dy_KIBLP * y_KIBLP).sum(-1, dtype=accumulate)
    _add_to_heads(row_KGBLJ, op.steep_I, row_KIBL)
    dxdt_KIBL = (dxdt_KIBLP * steep.x_KIBLP).sum(-1, dtype=accumulate)
    _add_to_heads(dxdt_KGBLJ, op.steep_I, dxdt_KIBL)
    _add_to_heads(dx_KGBLJP, op.steep_I, dxdt_KIBLP * steep.dt_KIBL1)


def _heads(t_KGBLJ: Tensor, steep_I: Tensor) -> Tensor:
    """[K, G, B, L, J, ...] -> the chosen heads [K, I, B, L, ...]."""
    heads = t_KGBLJ.shape[4]
    return t_KGBLJ.movedim(4, 2)[:, steep_I // heads, steep_I % heads]


def _add_to_heads(total_KGBLJ: Tensor, steep_I: Tensor, part_KIBL: Tensor) -> None:
    """total[chosen heads] += part, through a view of `total`."""
    heads = total_KGBLJ.shape[4]
    view = total_KGBLJ.movedim(4, 2)
    view[:, steep_I // heads, steep_I % heads] += part_KIBL.to(view.dtype)


def _without_steep(t: Tensor, op: _Operands) -> Tensor:
    """[K, G, B, L, J x P] with the steep heads zeroed."""
    if op.steep_I is None:
        return t
    num_groups, heads = op.dt_KGBLJ.shape[1], op.dt_KGBLJ.shape[4]
    keep_H = t.new_ones(num_groups * heads).index_fill_(0, op.steep_I, 0)
    split = t.unflatten(-1, (heads, -1))
    return (split * keep_H.view(num_groups, 1, 1, heads, 1)).flatten(-2)


def _own_tokens(op: _Operands, D_H: Tensor) -> Tensor:
    """The weight of a token on its own output, D + dt (C . B): [K, G, B, L, J]."""
    D_GJ = D_H.view(op.dt_KGBLJ.shape[1], 1, 1, -1)
    return torch.addcmul(D_GJ, op.dt_KGBLJ, op.own_KGBL[..., None])


def _pad_by(t: Tensor, padding: int) -> Tensor:
    """Zeros after the last token."""
    if padding == 0:
        return t
    return torch.cat([t, t.new_zeros(t.shape[0], padding, *t.shape[2:])], dim=1)


def _pad(t: Tensor, op: _Operands) -> Tensor:
    return _pad_by(t, op.dt_KGBLJ.shape[0] * op.dt_KGBLJ.shape[3] - t.shape[1])


def _chunks(t: Tensor, op: _Operands) -> Tensor:
    """[B, K x L, H, ...] -> a view [K, G, B, L, J, ...]."""
    return scan_scaling.chunks(t, op.dt_KGBLJ)


def _state_to_heads(state_GBNJP: Tensor, head_dim: int) -> Tensor:
    """[G, B, N, J x P] -> [B, H, P, N]."""
    return state_GBNJP.unflatten(-1, (-1, head_dim)).permute(1, 0, 3, 4, 2).flatten(1, 2)


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t * mask


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Product over the last two dimensions; the three leading ones are one batch."""
    return torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])


def _add_bmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place; `total` is contiguous."""
    total.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def _bmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, `out` contiguous and possibly of a wider dtype."""
    if out.dtype == a.dtype:
        torch.bmm(a.flatten(0, 2), b.flatten(0, 2), out=out.flatten(0, 2))
    else:
        out.copy_(_bmm(a, b))
