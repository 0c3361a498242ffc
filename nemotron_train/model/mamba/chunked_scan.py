"""The chunked PyTorch form of SSD (arXiv 2405.21060, section 6) with a hand-derived backward.

Owns the arithmetic only; `core.ssd` is the public function and states the contract. All heavy
work is batched matrix products; `scan_operands` derives the small operands, `scan_scaling` scales
x by them and runs the short loop over chunks for the state.

Shape suffixes: B batch, S tokens, H heads, P channels a head, G groups, N state size, L tokens a
chunk, K chunks, J heads a group (H = G x J), I the steep heads. Tensors are chunk-first and
group-second (K G B L ...): every product is then one batch over contiguous operands, and a step
of the loop over chunks touches one contiguous block.

How it avoids a decay matrix for every head. Inside a chunk, token s weighs on token l with
(C_l . B_s) exp(cum_l - cum_s) dt_s, where cum is the running sum of dt A. The exponential is split
into a factor exp(cum_l) on the output and exp(-cum_s) on the input; C.B^T is then shared by all
heads of a group, and a chunk is one product of width J x P. The split is safe while -cum stays
inside the exponent range. A head that forgets faster than that anywhere in the batch (a steep
head) gets its explicit decay matrix instead (`steep_heads`) and takes no part in the shared
product.

The other documents of a row do not change a document's output by one bit, with one exception:
their decays can make a head steep, which changes that head's rounding.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_train.model.mamba import scan_scaling
from nemotron_train.model.mamba.scan_operands import (
    CENTRE,
    Operands,
    add_bmm,
    bmm,
    bmm_into,
    chunk_view,
    derive_operands,
    masked,
    own_weight,
    pad,
)
from nemotron_train.model.mamba.steep_heads import (
    add_steep_gradients,
    add_to_heads,
    steep_heads,
    without_steep,
)


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
    """y_BSHP, and the final state or None (`return_final_state`); see `core.ssd`."""
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
        op = derive_operands(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, document_ids_BS, chunk_size)
        num_chunks = op.dt_KGBLJ.shape[0]
        x_BSHP = pad(x_BSHP, op)
        # xw = x dt exp(-cum): the input as every later token of its chunk reads it.
        xw = scan_scaling.to_chunks(x_BSHP, op.dt_KGBLJ, op.write_KGBLJ)
        states = _scan_states(op, xw, initial_BHPN)

        # Inside a chunk: out_l = sum over s < l of (C_l . B_s) xw_s, still without exp(cum_l).
        out = bmm(op.scores_KGBLL, without_steep(xw, op))
        # From before the chunk: out_l += C_l . state. Without an initial state chunk 0 enters with
        # zeros, and its product is left out.
        start = 0 if initial_BHPN is not None else 1
        if start < num_chunks:
            entering = states[start:num_chunks].to(out.dtype)
            add_bmm(out[start:], masked(op.C_KGBLN, op.first_KGBL1)[start:], entering)

        # y_l = exp(cum_l) out_l + (D + dt_l (C_l . B_l)) x_l: the diagonal rides on the D skip.
        y_BSHP = scan_scaling.from_chunks(x_BSHP, out, own_weight(op, D_H), op.read_KGBLJ)
        if op.steep_I is not None:
            steep = steep_heads(op, op.steep_I, x_BSHP)
            inside_KIBLP = steep.weights_KIBLL @ steep.xdt_KIBLP
            add_to_heads(chunk_view(y_BSHP, op), op.steep_I, inside_KIBLP)

        ctx.save_for_backward(x_BSHP, A_H, D_H, states, out, xw, *op)
        ctx.length = length
        ctx.has_initial = initial_BHPN is not None
        final_BHPN = _state_to_heads(states[-1], head_dim) * CENTRE if return_final_state else None
        return y_BSHP[:, :length].to(x_BSHP.dtype), final_BHPN

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients in the order of the forward's arguments.

        Written as in the forward: y_l = r_l out_l + (D + dt_l own_l) x_l with r = exp(cum),
        out_l = sum_s scores_ls xw_s + C_l . state, xw_s = x_s dt_s w_s with w = exp(-cum). All that
        dt, A and D need are sums over a head's channels, so `readers` and `writers` reduce first:
        row_l = sum_P dy_l r_l out_l, dyx_l = sum_P dy_l x_l, dxdt_s = sum_P dxw_s w_s x_s.
        """
        dy_BSHP, dfinal_BHPN = gradients
        x_BSHP, A_H, D_H, states, out, xw, *saved_operands = ctx.saved_tensors
        op = Operands(*saved_operands)
        num_chunks, num_groups = op.dt_KGBLJ.shape[:2]
        head_dim, dtype = x_BSHP.shape[3], x_BSHP.dtype
        accumulate = op.dt_KGBLJ.dtype
        dy_BSHP = pad(dy_BSHP, op)
        # dyr = dy exp(cum) is the gradient of `out`; row is d loss / d cum_l on the reading side.
        dyr, row_KGBLJ, dyx_KGBLJ = scan_scaling.readers(dy_BSHP, x_BSHP, out, op.read_KGBLJ)

        # Through the states, from the last chunk to the first. dsum is the gradient of each chunk's
        # own sum of xw B^T; ends is d loss / d cum at a chunk's last token, through its decay.
        dstates = _state_gradients(op, dyr, dfinal_BHPN)
        ends_KGBJ, dsum = scan_scaling.scan_states_backward(
            dstates, states.view_as(dstates), op.end_KGBJ, op.carry_KGBJ, dtype
        )
        dinitial = None
        if ctx.has_initial:
            dinitial = _state_to_heads(dstates[0].flatten(-2), head_dim) / CENTRE

        # out = scores @ xw, so dscores = dyr @ xw^T and dxw = scores^T @ dyr; xw also entered the
        # chunk's own sum, through B.
        dyr_inside = without_steep(dyr, op)
        dscores = bmm(dyr_inside, without_steep(xw, op).mT)
        dxw = bmm(op.scores_KGBLL.mT, dyr_inside)
        add_bmm(dxw, masked(op.B_KGBLN, op.last_KGBL1), dsum)

        dx_BSHP, dxdt_KGBLJ = scan_scaling.writers(
            dy_BSHP, x_BSHP, dxw, own_weight(op, D_H), op.dt_KGBLJ, op.write_KGBLJ
        )
        if op.steep_I is not None:
            steep = steep_heads(op, op.steep_I, x_BSHP)
            dy_KGBLJP, dx_KGBLJP = chunk_view(dy_BSHP, op), chunk_view(dx_BSHP, op)
            add_steep_gradients(op, steep, dy_KGBLJP, dscores, row_KGBLJ, dxdt_KGBLJ, dx_KGBLJP)

        # xw_s holds exp(-cum_s): the writing side of cum is -dt dxdt. cum itself is a running sum
        # of a = dt A, so a's gradient is the sum over the later tokens of its chunk and document:
        # the transposed 0/1 matrix `pairs`. FP64, as in the forward.
        dcum_KGBLJ = row_KGBLJ.addcmul_(op.dt_KGBLJ, dxdt_KGBLJ, value=-1)
        dcum_KGBLJ[..., -1, :] += ends_KGBJ
        da_KGBLJ = (op.pairs.mT @ dcum_KGBLJ.double()).to(accumulate)
        # dt enters three times: in xw (dxdt), on the diagonal (dyx own), and in a = dt A.
        ddt_KGBLJ = dxdt_KGBLJ.addcmul_(dyx_KGBLJ, op.own_KGBL[..., None])
        ddt_KGBLJ.addcmul_(da_KGBLJ, A_H.view(num_groups, 1, 1, -1))
        dA_H = (da_KGBLJ * op.dt_KGBLJ).sum((0, 2, 3)).flatten()

        # scores = C B^T below the diagonal; its diagonal, which the forward put on the D skip,
        # joins here, so that one product serves both.
        dscores.mul_(op.pairs.tril(-1).to(dtype))
        dscores.diagonal(dim1=-2, dim2=-1).add_((dyx_KGBLJ * op.dt_KGBLJ).sum(-1))
        dB = masked(bmm(xw, dsum.mT), op.last_KGBL1)
        add_bmm(dB, dscores.mT, op.C_KGBLN)
        dC = bmm(dscores, op.B_KGBLN)
        start = 0 if ctx.has_initial else 1
        if start < num_chunks:  # C also reads the state that entered the chunk
            part = bmm(dyr[start:], states[start:num_chunks].to(dtype).mT)
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


def _scan_states(op: Operands, xw: Tensor, initial_BHPN: Tensor | None) -> Tensor:
    """States divided by the centre, [K + 1, G, B, N, J x P] in dt's dtype: entry k enters chunk
    k, the last one is final. One batched product, then the loop over chunks."""
    num_chunks, num_groups, batch, _, state_size = op.B_KGBLN.shape
    heads = op.dt_KGBLJ.shape[4]
    shape = (num_chunks + 1, num_groups, batch, state_size, heads, xw.shape[-1] // heads)
    states = op.dt_KGBLJ.new_empty(shape)
    if initial_BHPN is None:
        states[0].zero_()
    else:
        states[0] = initial_BHPN.unflatten(1, (num_groups, heads)).permute(1, 0, 4, 2, 3) / CENTRE
    bmm_into(states[1:].flatten(-2), masked(op.B_KGBLN, op.last_KGBL1).mT, xw)
    scan_scaling.scan_states(states, op.end_KGBJ, op.carry_KGBJ)
    return states.flatten(-2)


def _state_gradients(op: Operands, dyr: Tensor, dfinal_BHPN: Tensor | None) -> Tensor:
    """Gradient of the loss with respect to each state from the outputs of one chunk only:
    [K + 1, G, B, N, J, P]. Entry k belongs to the state entering chunk k and the last entry to the
    final state. `scan_states_backward` then adds the contribution of the later chunks."""
    num_chunks, num_groups, batch, _, state_size = op.B_KGBLN.shape
    heads = op.dt_KGBLJ.shape[4]
    shape = (num_chunks + 1, num_groups, batch, state_size, heads, dyr.shape[-1] // heads)
    dstates = op.dt_KGBLJ.new_empty(shape)
    if dfinal_BHPN is None:
        dstates[-1].zero_()
    else:
        final = dfinal_BHPN.unflatten(1, (num_groups, heads)).permute(1, 0, 4, 2, 3)
        torch.mul(final, CENTRE, out=dstates[-1])
    bmm_into(dstates[:-1].flatten(-2), masked(op.C_KGBLN, op.first_KGBL1).mT, dyr)
    return dstates


def _state_to_heads(state_GBNJP: Tensor, head_dim: int) -> Tensor:
    """[G, B, N, J x P] -> [B, H, P, N]."""
    return state_GBNJP.unflatten(-1, (-1, head_dim)).permute(1, 0, 3, 4, 2).flatten(1, 2)
