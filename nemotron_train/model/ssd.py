"""The state-space core of Mamba-2 (SSD, arXiv 2405.21060): one function, two kernels.

Owns the recurrence, its chunked form with a hand-derived backward, document resets, and the
choice between `mamba_ssm` and PyTorch. Does not own the projections, the convolution, softplus
and limits of dt, or the gate: the mixer does.

Shape suffixes: B batch, S tokens, H heads, P channels a head, G groups, N state size, L tokens a
chunk, K chunks, J heads a group (H = G x J). The chunked form keeps everything chunk-first and
group-second (K G B L ...), so that every product is one batched matrix product over contiguous
operands and one step of the loop over chunks touches one contiguous block.

How the chunked form avoids a decay matrix for every head. Inside a chunk the weight of token s on
token l is (C_l . B_s) exp(cum_l - cum_s) dt_s, with cum the running sum of dt A. The exponential
is split into exp(cum_l) on the output and exp(-cum_s) on the input; C.B^T is then shared by all
heads of a group and the whole chunk is one product of width J x P. The split is safe only while
-cum stays inside the exponent range, so a head that forgets faster than that anywhere in the
batch (a «steep» head) gets its explicit decay matrix instead; its split input is zeroed.
"""

import importlib.util
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron_train.config.schema import ConfigError

# Largest -cum (nats within a chunk) the split form takes: exp(79) = 2e34 is finite in FP32 and
# BF16. A power of two moved from the input's factor to the output's centres the range without
# rounding, so no operand of a product leaves 1e-18 ... 1e18 times its natural size.
SPLIT_RANGE = 79.0
_CENTRE = 2.0**57

# Tokens a chunk where the configured chunk is longer, on a CPU. Measured: the products are flat
# from 32 to 128 tokens while the elementwise work on scores grows with it (docs/log.md).
CPU_CHUNK = 32


def ssd(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int,
    document_ids_BS: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    return_final_state: bool = False,
    force_torch: bool = False,
) -> Any:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t, for each head.

    Head h reads B and C of group h // (H // G). `dt_BSH` is final (after softplus and limits,
    >= 0) and `A_H` negative, both FP32 (FP64 with FP64 inputs). `document_ids_BS` (integers,
    non-decreasing along S) sets the state to zero wherever it changes; `initial_state_BHPN`
    belongs to each row's first document. States and decays accumulate in FP32 or better.

    Returns y_BSHP in x's dtype, or (y_BSHP, final state BHPN in the accumulation dtype) with
    `return_final_state`. All floating inputs and the initial state receive gradients.

    On CUDA `mamba_ssm` computes it where it is installed, unless `force_torch`. Raises
    ConfigError where its 32-bit offsets would overflow (state-spaces/mamba#1015).

    With the chunked form a document's output does not depend on its neighbours in any bit, save
    that a neighbour's decays can move a head between the split and the explicit form (rounding).
    """
    arguments = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
    if x_BSHP.is_cuda and not force_torch and x_BSHP.dtype != torch.float64 and _has_mamba_ssm():
        return _mamba_ssm(
            *arguments, chunk_size, document_ids_BS, initial_state_BHPN, return_final_state
        )
    if not x_BSHP.is_cuda:
        chunk_size = min(chunk_size, CPU_CHUNK)
    y_BSHP, final_BHPN = _ChunkedSsd.apply(
        *arguments, initial_state_BHPN, document_ids_BS, chunk_size, return_final_state
    )
    return (y_BSHP, final_BHPN) if return_final_state else y_BSHP


@lru_cache(maxsize=1)
def _has_mamba_ssm() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


def check_offsets(x_BSHP: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, chunk_size: int) -> None:
    """Raises ConfigError if an element offset inside mamba_ssm's kernels would reach 2^31.

    UPSTREAM(mamba-ssm 2.3): Triton computes them in 32 bits and wraps silently, giving finite,
    wrong output (state-spaces/mamba#1015). Strides count: x, B and C are views of wider tensors.
    """
    batch, length, num_heads, head_dim = x_BSHP.shape
    num_groups, state_size = B_BSGN.shape[2:]
    num_chunks = -(-length // chunk_size)
    spans = [batch * t.stride(0) + length * t.stride(1) for t in (x_BSHP, B_BSGN, C_BSGN)]
    spans.append(batch * num_chunks * num_heads * head_dim * state_size)  # chunk states
    spans.append(batch * num_chunks * chunk_size * chunk_size * num_groups)  # C.B^T
    if max(spans) >= 2**31:
        raise ConfigError(
            f"train.sequence_length={length} with {batch} sequences a rank overflows the 32-bit "
            "offsets of mamba_ssm (state-spaces/mamba#1015): use fewer sequences a micro-batch, "
            "more tensor or context parallel ranks, or a shorter sequence"
        )


def _mamba_ssm(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    document_ids_BS: Tensor | None,
    initial_state_BHPN: Tensor | None,
    return_final_state: bool,
) -> Any:
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_chunk_scan_combined,
    )

    check_offsets(x_BSHP, B_BSGN, C_BSGN, chunk_size)
    seq_idx = None
    if document_ids_BS is not None:  # the kernel gives the initial state to index 0
        seq_idx = (document_ids_BS - document_ids_BS[:, :1]).to(torch.int32).contiguous()
    return mamba_chunk_scan_combined(
        x_BSHP,
        dt_BSH,
        A_H,
        B_BSGN,
        C_BSGN,
        chunk_size,
        D=D_H,
        initial_states=initial_state_BHPN,
        seq_idx=seq_idx,
        return_final_states=return_final_state,
    )


class _Documents(NamedTuple):
    """Which pairs of tokens may see each other; None members mean «all»."""

    pairs: Tensor  # [L, L] or [K, 1, B, L, L] FP64: 1 where s <= l in one document
    first_KBL1: Tensor | None  # 1 where the state entering the chunk is this token's document's
    last_KBL1: Tensor | None  # 1 where this token's document is the one leaving the chunk
    carry_KB: Tensor | None  # 1 where one document enters and leaves


class _Decays(NamedTuple):
    """Factors of the exponentials, from dt, A and the documents; all small beside x."""

    cum_KGBLJ: Tensor  # FP64 running sum of dt A within chunk and document
    read_KGBLJ: Tensor  # exp(cum) * centre, on outputs
    write_KGBLJ: Tensor  # exp(-cum) / centre, on inputs; steep heads: exp(cum_end - cum) / centre
    end_KGBJ: Tensor  # exp(cum_end), from the chunk's sum to its state; steep heads: 1
    carry_KGBJ: Tensor  # exp(cum_end) from state to state, 0 where a document ends
    steep: Tensor | None  # indices of steep heads


def _documents(ids_BS: Tensor | None, num_chunks: int, length: int, like: Tensor) -> _Documents:
    lower = torch.ones(length, length, dtype=torch.float64, device=like.device).tril_()
    if ids_BS is None:
        return _Documents(lower, None, None, None)
    ids_KBL = ids_BS.unflatten(1, (num_chunks, length)).transpose(0, 1)
    entering_KB1 = torch.cat([ids_KBL[:1, :, :1], ids_KBL[:-1, :, -1:]])
    leaving_KB1 = ids_KBL[:, :, -1:]
    same_KBLL = ids_KBL[..., :, None] == ids_KBL[..., None, :]
    return _Documents(
        (same_KBLL * lower)[:, None],
        (ids_KBL == entering_KB1).to(like.dtype)[..., None],
        (ids_KBL == leaving_KB1).to(like.dtype)[..., None],
        (entering_KB1 == leaving_KB1).to(like.dtype)[..., 0],
    )


def _decays(dt_KGBLJ: Tensor, A_GJ: Tensor, documents: _Documents) -> _Decays:
    dtype = dt_KGBLJ.dtype
    # FP64: differences of running sums must not cancel after a very fast decay. It is L x J
    # numbers a chunk, and immune to TF32.
    a_KGBLJ = dt_KGBLJ.double() * A_GJ.double()[:, None, None]
    cum_KGBLJ = documents.pairs @ a_KGBLJ
    end_KGB1J = cum_KGBLJ[..., -1:, :]
    steepest_GJ = cum_KGBLJ.amin((0, 2, 3))
    # SYNC: which heads are steep decides shapes; free on a CPU, and CUDA has its own kernel.
    steep = (steepest_GJ < -SPLIT_RANGE).flatten().nonzero().flatten()
    write_KGBLJ = -cum_KGBLJ
    end_KGBJ = end_KGB1J.squeeze(-2)
    carry_KGBJ = end_KGBJ.to(dtype).exp()
    if steep.numel():
        steep_GJ = steepest_GJ < -SPLIT_RANGE
        # Tokens of earlier documents get a meaningless positive exponent here; they are masked
        # out of the state, so it only has to stay finite.
        write_KGBLJ = torch.where(
            steep_GJ[:, None, None], (end_KGB1J - cum_KGBLJ).clamp_(max=0), write_KGBLJ
        )
        end_KGBJ = end_KGBJ.masked_fill(steep_GJ[:, None], 0)
    if documents.carry_KB is not None:
        carry_KGBJ = carry_KGBJ * documents.carry_KB[:, None, :, None]
    return _Decays(
        cum_KGBLJ,
        cum_KGBLJ.to(dtype).exp().mul_(_CENTRE),
        write_KGBLJ.to(dtype).exp().div_(_CENTRE),
        end_KGBJ.to(dtype).exp(),
        carry_KGBJ,
        steep if steep.numel() else None,
    )


def _by_chunk_and_group(t: Tensor, num_chunks: int, num_groups: int | None = None) -> Tensor:
    """[B, S, H or G, ...] -> a view [K, G, B, L, J, ...] (or [K, G, B, L, ...] for B and C)."""
    t = t.unflatten(1, (num_chunks, -1))
    if num_groups is not None:
        t = t.unflatten(3, (num_groups, -1))
    return t.movedim(3, 0).movedim(2, 0)


def _pad(t: Tensor, amount: int) -> Tensor:
    """Zeros after the last token (dt = 0 there: the state passes through untouched)."""
    if amount == 0:
        return t
    return torch.cat([t, t.new_zeros(t.shape[0], amount, *t.shape[2:])], dim=1)


def _dot_last(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a * b).sum(-1, dtype=dtype)


class _Operands(NamedTuple):
    """Inputs in chunk order; recomputed in the backward because they cost one pass each."""

    x_KGBLJP: Tensor  # a view of the caller's x
    dt_KGBLJ: Tensor
    B_KGBLN: Tensor
    C_KGBLN: Tensor
    B_last_KGBLN: Tensor  # zero rows for documents that end inside the chunk
    C_first_KGBLN: Tensor  # zero rows for documents that begin inside the chunk
    scores_KGBLL: Tensor  # C.B^T strictly below the diagonal, within documents
    own_KGBL: Tensor  # its diagonal, C_l . B_l
    documents: _Documents
    decays: _Decays
    xw_KGBLJP: Tensor  # x dt write


def _operands(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    document_ids_BS: Tensor | None,
    chunk_size: int,
    dtype: torch.dtype,
) -> _Operands:
    length, num_groups = x_BSHP.shape[1], B_BSGN.shape[2]
    chunk = min(chunk_size, length)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length
    if document_ids_BS is not None and padding:
        tail = document_ids_BS[:, -1:].expand(-1, padding)
        document_ids_BS = torch.cat([document_ids_BS, tail], dim=1)
    x_KGBLJP = _by_chunk_and_group(_pad(x_BSHP, padding), num_chunks, num_groups)
    dt_KGBLJ = _by_chunk_and_group(_pad(dt_BSH, padding), num_chunks, num_groups).contiguous()
    B_KGBLN, C_KGBLN = (
        _by_chunk_and_group(_pad(t, padding), num_chunks)
        .to(dtype)
        .contiguous(memory_format=torch.contiguous_format)
        for t in (B_BSGN, C_BSGN)
    )
    documents = _documents(document_ids_BS, num_chunks, chunk, dt_BSH)
    decays = _decays(dt_KGBLJ, A_H.view(num_groups, -1), documents)
    scores_KGBLL = _bmm(C_KGBLN, B_KGBLN.mT)
    own_KGBL = scores_KGBLL.diagonal(dim1=-2, dim2=-1).to(dt_BSH.dtype, copy=True)
    scores_KGBLL.mul_(documents.pairs.tril(-1).to(dtype))
    B_last, C_first = B_KGBLN, C_KGBLN
    if documents.first_KBL1 is not None and documents.last_KBL1 is not None:
        B_last = B_KGBLN * documents.last_KBL1.to(dtype)[:, None]
        C_first = C_KGBLN * documents.first_KBL1.to(dtype)[:, None]
    xw_KGBLJP = torch.empty(x_KGBLJP.shape, dtype=dtype, device=x_BSHP.device)
    torch.mul(x_KGBLJP, (dt_KGBLJ * decays.write_KGBLJ)[..., None], out=xw_KGBLJP)
    return _Operands(
        x_KGBLJP, dt_KGBLJ, B_KGBLN, C_KGBLN, B_last, C_first, scores_KGBLL, own_KGBL,
        documents, decays, xw_KGBLJP,
    )  # fmt: skip


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Product over the last two dimensions of [K, G, B, ., .]; all leading ones are one batch."""
    product = torch.bmm(a.flatten(0, 2), b.flatten(0, 2))
    return product.unflatten(0, a.shape[:3])


def _add_bmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place; `total` contiguous."""
    total.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def _without_steep(t_KGBLJP: Tensor, steep: Tensor | None) -> Tensor:
    """Steep heads zeroed, heads and channels merged: [K, G, B, L, J x P]."""
    if steep is not None:
        num_groups, heads = t_KGBLJP.shape[1], t_KGBLJP.shape[4]
        keep_GJ = t_KGBLJP.new_ones(num_groups * heads).index_fill_(0, steep, 0)
        t_KGBLJP = t_KGBLJP * keep_GJ.view(num_groups, 1, 1, heads, 1)
    return t_KGBLJP.flatten(-2)


class _Steep(NamedTuple):
    """Steep heads with their explicit weights, heads (index I) in front of tokens."""

    group_of_I: Tensor
    decay_KIBLL: Tensor
    weights_KIBLL: Tensor  # scores x decay
    xdt_KIBLP: Tensor


def _heads_of(t_KGBLJ: Tensor, steep: Tensor) -> Tensor:
    """[K, G, B, L, J, ...] -> the chosen heads [K, I, B, L, ...]."""
    heads = t_KGBLJ.shape[4]
    return t_KGBLJ.movedim(4, 2)[:, steep // heads, steep % heads]


def _steep(operands: _Operands, steep: Tensor, dtype: torch.dtype) -> _Steep:
    group_of_I = steep // operands.dt_KGBLJ.shape[4]
    cum_KIBL = _heads_of(operands.decays.cum_KGBLJ, steep)
    difference = cum_KIBL[..., :, None] - cum_KIBL[..., None, :]
    allowed = operands.documents.pairs.tril(-1) > 0
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    decay_KIBLL = difference.masked_fill_(~allowed, -torch.inf).to(dtype).exp_()
    weights_KIBLL = decay_KIBLL * operands.scores_KGBLL[:, group_of_I]
    x_KIBLP, dt_KIBL = _heads_of(operands.x_KGBLJP, steep), _heads_of(operands.dt_KGBLJ, steep)
    return _Steep(group_of_I, decay_KIBLL, weights_KIBLL, (x_KIBLP * dt_KIBL[..., None]).to(dtype))


def _add_to_heads(total_KGBLJ: Tensor, steep: Tensor, part_KIBL: Tensor) -> None:
    """total[..., steep heads, ...] += part, in place through a view of `total`."""
    heads = total_KGBLJ.shape[4]
    view = total_KGBLJ.movedim(4, 2)
    view[:, steep // heads, steep % heads] += part_KIBL.to(view.dtype)


class _ChunkedSsd(torch.autograd.Function):
    """The chunked form. Saves the inputs, the state entering each chunk and the off-diagonal
    output before its scale; recomputes the rest."""

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
        batch, length, num_heads, head_dim = x_BSHP.shape
        num_groups = B_BSGN.shape[2]
        dtype = _product_dtype(x_BSHP)
        op = _operands(
            x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, document_ids_BS, chunk_size, dtype
        )
        num_chunks, chunk = op.dt_KGBLJ.shape[0], op.dt_KGBLJ.shape[3]
        states = _scan_states(op, initial_BHPN)

        # The output below the diagonal, still without exp(cum_l).
        out_KGBLJP = _bmm(op.scores_KGBLL, _without_steep(op.xw_KGBLJP, op.decays.steep))
        start = 0 if initial_BHPN is not None else 1
        if start < num_chunks:
            entering = states[start:num_chunks].to(dtype)
            _add_bmm(out_KGBLJP[start:], op.C_first_KGBLN[start:], entering)
        out_KGBLJP = out_KGBLJP.unflatten(-1, (-1, head_dim))

        y_BSHP = torch.empty(
            batch, num_chunks * chunk, num_heads, head_dim, dtype=dt_BSH.dtype, device=dt_BSH.device
        )
        y_KGBLJP = _by_chunk_and_group(y_BSHP, num_chunks, num_groups)
        torch.mul(out_KGBLJP, op.decays.read_KGBLJ[..., None], out=y_KGBLJP)
        # A token's own contribution dt (C.B) x rides on the D skip.
        own_KGBLJ = _own(op, D_H)
        y_KGBLJP.addcmul_(op.x_KGBLJP, own_KGBLJ[..., None])
        if op.decays.steep is not None:
            steep = _steep(op, op.decays.steep, dtype)
            _add_to_heads(y_KGBLJP, op.decays.steep, steep.weights_KIBLL @ steep.xdt_KIBLP)

        ctx.save_for_backward(
            x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, document_ids_BS, states, out_KGBLJP
        )
        ctx.chunk_size, ctx.start, ctx.has_initial = chunk_size, start, initial_BHPN is not None
        final_BHPN = None
        if return_final_state:
            final_BHPN = _state_to_heads(states[-1], head_dim).mul(_CENTRE)
        return y_BSHP[:, :length].to(x_BSHP.dtype), final_BHPN

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dy_BSHP, dfinal_BHPN = gradients
        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, document_ids_BS, states, out_KGBLJP = (
            ctx.saved_tensors
        )
        length, head_dim = x_BSHP.shape[1], x_BSHP.shape[3]
        dtype, accumulate = _product_dtype(x_BSHP), dt_BSH.dtype
        op = _operands(
            x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, document_ids_BS, ctx.chunk_size, dtype
        )
        documents, decays, start = op.documents, op.decays, ctx.start
        num_chunks, num_groups, _, chunk, _ = op.dt_KGBLJ.shape
        dy_BSHP = _pad(dy_BSHP, num_chunks * chunk - length)
        dy_KGBLJP = _by_chunk_and_group(dy_BSHP, num_chunks, num_groups)

        dyr_KGBLJP = torch.empty_like(op.xw_KGBLJP)
        torch.mul(dy_KGBLJP, decays.read_KGBLJ[..., None], out=dyr_KGBLJP)
        row_KGBLJ = _dot_last(dyr_KGBLJP, out_KGBLJP, accumulate)  # d loss / d cum_l, positive part
        dyr, xw = dyr_KGBLJP.flatten(-2), op.xw_KGBLJP.flatten(-2)
        dyr_inside = _without_steep(dyr_KGBLJP, decays.steep)
        xw_inside = _without_steep(op.xw_KGBLJP, decays.steep)

        # Through the states. dsum is the gradient of each chunk's sum of x B^T.
        dstates = _scan_states_backward(op, dyr, dfinal_BHPN)
        ends_KGBJ = _ends(states, dstates, head_dim)
        dsum = (
            dstates[1:].unflatten(-1, (-1, head_dim)) * decays.end_KGBJ[..., None, :, None]
        ).flatten(-2).to(dtype)

        dscores_KGBLL = _bmm(dyr_inside, xw_inside.mT)
        dscores_KGBLL.mul_(documents.pairs.tril(-1).to(dtype))
        dxw = _bmm(op.scores_KGBLL.mT, dyr_inside)
        _add_bmm(dxw, op.B_last_KGBLN, dsum)
        dxw_KGBLJP = dxw.unflatten(-1, (-1, head_dim))

        # x, dt and D; every reduction over a head's channels is one pass.
        own_KGBLJ = _own(op, D_H)
        dx_BSHP = torch.empty(dy_BSHP.shape, dtype=accumulate, device=dy_BSHP.device)
        dx_KGBLJP = _by_chunk_and_group(dx_BSHP, num_chunks, num_groups)
        torch.mul(
            dxw_KGBLJP, (op.dt_KGBLJ * decays.write_KGBLJ)[..., None], out=dx_KGBLJP
        )
        dx_KGBLJP.addcmul_(dy_KGBLJP, own_KGBLJ[..., None])
        dyx_KGBLJ = _dot_last(dy_KGBLJP, op.x_KGBLJP, accumulate)
        dxdt_KGBLJ = _dot_last(dxw_KGBLJP, op.x_KGBLJP, accumulate) * decays.write_KGBLJ
        if decays.steep is not None:
            steep = _steep(op, decays.steep, dtype)
            _steep_backward(
                op, steep, decays.steep, dy_KGBLJP, dscores_KGBLL, row_KGBLJ, dxdt_KGBLJ, dx_KGBLJP
            )
        dcum_KGBLJ = row_KGBLJ.addcmul_(op.dt_KGBLJ, dxdt_KGBLJ, value=-1)
        dcum_KGBLJ[..., -1, :] += ends_KGBJ
        da_KGBLJ = (documents.pairs.mT @ dcum_KGBLJ.double()).to(accumulate)
        ddt_KGBLJ = dxdt_KGBLJ + dyx_KGBLJ * op.own_KGBL[..., None]
        ddt_KGBLJ.addcmul_(da_KGBLJ, A_H.view(num_groups, 1, 1, -1))
        dA_H = (da_KGBLJ * op.dt_KGBLJ).sum((0, 2, 3)).flatten()
        dD_H = dyx_KGBLJ.sum((0, 2, 3)).flatten()

        # B and C; the diagonal of the scores joins here.
        dscores_KGBLL.diagonal(dim1=-2, dim2=-1).add_((dyx_KGBLJ * op.dt_KGBLJ).sum(-1))
        dB = _bmm(xw, dsum.mT)
        if documents.last_KBL1 is not None:
            dB.mul_(documents.last_KBL1[:, None].to(dtype))
        _add_bmm(dB, dscores_KGBLL.mT, op.C_KGBLN)
        dC = _bmm(dscores_KGBLL, op.B_KGBLN)
        if start < num_chunks:
            part = _bmm(dyr[start:], states[start:num_chunks].to(dtype).mT)
            if documents.first_KBL1 is not None:
                part.mul_(documents.first_KBL1[start:, None].to(dtype))
            dC[start:] += part

        dinitial = _state_to_heads(dstates[0], head_dim).div(_CENTRE) if ctx.has_initial else None
        return (
            dx_BSHP[:, :length].to(x_BSHP.dtype),
            _to_tokens(ddt_KGBLJ.flatten(4), length, True).to(dt_BSH.dtype),
            dA_H.to(A_H.dtype),
            _to_tokens(dB, length, False).to(B_BSGN.dtype),
            _to_tokens(dC, length, False).to(C_BSGN.dtype),
            dD_H.to(D_H.dtype),
            dinitial,
            None,
            None,
            None,
        )


def _product_dtype(x_BSHP: Tensor) -> torch.dtype:
    """The dtype of the matrix products' operands."""
    return x_BSHP.dtype


def _own(op: _Operands, D_H: Tensor) -> Tensor:
    """The weight of a token on its own output: D + dt (C . B)."""
    D_GJ = D_H.to(op.dt_KGBLJ.dtype).view(op.dt_KGBLJ.shape[1], -1)
    return torch.addcmul(D_GJ[:, None, None], op.dt_KGBLJ, op.own_KGBL[..., None])


def _scan_states(op: _Operands, initial_BHPN: Tensor | None) -> Tensor:
    """States divided by the centre, [K + 1, G, B, N, J x P]: entry k enters chunk k, the last
    one is final. One batched product, then one short loop over chunks."""
    num_chunks, num_groups, batch, _, heads, head_dim = op.xw_KGBLJP.shape
    state_size, decays = op.B_KGBLN.shape[-1], op.decays
    states = decays.carry_KGBJ.new_empty(
        num_chunks + 1, num_groups, batch, state_size, heads, head_dim
    )
    if initial_BHPN is None:
        states[0].zero_()
    else:
        states[0] = initial_BHPN.unflatten(1, (num_groups, heads)).permute(1, 0, 4, 2, 3) / _CENTRE
    sums = _bmm(op.B_last_KGBLN.mT, op.xw_KGBLJP.flatten(-2)).view(states[1:].shape)
    torch.mul(sums, decays.end_KGBJ[..., None, :, None], out=states[1:])
    carry = decays.carry_KGBJ[..., None, :, None]
    for k in range(num_chunks):
        states[k + 1].addcmul_(states[k], carry[k])
    return states.flatten(-2)


def _scan_states_backward(op: _Operands, dyr: Tensor, dfinal_BHPN: Tensor | None) -> Tensor:
    """Gradients of `_scan_states`'s result: entry k is what chunk k and all after it ask of the
    state entering chunk k."""
    num_chunks, num_groups, batch, _, heads, head_dim = op.xw_KGBLJP.shape
    state_size = op.B_KGBLN.shape[-1]
    dstates = op.dt_KGBLJ.new_empty(num_chunks + 1, num_groups, batch, state_size, heads, head_dim)
    dstates[:-1] = _bmm(op.C_first_KGBLN.mT, dyr).view(dstates[1:].shape)
    if dfinal_BHPN is None:
        dstates[-1].zero_()
    else:
        final = dfinal_BHPN.unflatten(1, (num_groups, heads)).permute(1, 0, 4, 2, 3)
        torch.mul(final, _CENTRE, out=dstates[-1])
    carry = op.decays.carry_KGBJ[..., None, :, None]
    for k in reversed(range(num_chunks)):
        dstates[k].addcmul_(dstates[k + 1], carry[k])
    return dstates.flatten(-2)


def _ends(states: Tensor, dstates: Tensor, head_dim: int) -> Tensor:
    """Gradient of each chunk's last cum through the state it leaves: <state, dstate> a head."""
    products = (states[1:] * dstates[1:]).sum(-2)
    return products.unflatten(-1, (-1, head_dim)).sum(-1)


def _steep_backward(
    op: _Operands,
    steep: _Steep,
    indices: Tensor,
    dy_KGBLJP: Tensor,
    dscores_KGBLL: Tensor,
    row_KGBLJ: Tensor,
    dxdt_KGBLJ: Tensor,
    dx_KGBLJP: Tensor,
) -> None:
    """Adds the explicit form's part to the gradients, in place."""
    dtype, accumulate = dscores_KGBLL.dtype, row_KGBLJ.dtype
    dy_KIBLP = _heads_of(dy_KGBLJP, indices).to(dtype)
    y_KIBLP = steep.weights_KIBLL @ steep.xdt_KIBLP
    dxdt_KIBLP = steep.weights_KIBLL.mT @ dy_KIBLP
    dweights_KIBLL = dy_KIBLP @ steep.xdt_KIBLP.mT
    dscores_KGBLL.index_add_(1, steep.group_of_I, dweights_KIBLL.mul_(steep.decay_KIBLL))
    _add_to_heads(row_KGBLJ, indices, _dot_last(dy_KIBLP, y_KIBLP, accumulate))
    x_KIBLP, dt_KIBL = _heads_of(op.x_KGBLJP, indices), _heads_of(op.dt_KGBLJ, indices)
    _add_to_heads(dxdt_KGBLJ, indices, _dot_last(dxdt_KIBLP, x_KIBLP, accumulate))
    _add_to_heads(dx_KGBLJP, indices, dxdt_KIBLP * dt_KIBL[..., None])


def _state_to_heads(state_GBNJP: Tensor, head_dim: int) -> Tensor:
    """[G, B, N, J x P] -> [B, H, P, N]."""
    return state_GBNJP.unflatten(-1, (-1, head_dim)).permute(1, 0, 3, 4, 2).flatten(1, 2)


def _to_tokens(t_KGBLN: Tensor, length: int, merge_groups: bool) -> Tensor:
    """[K, G, B, L, N] -> [B, S, G, N], or [B, S, G x N]."""
    t_BSGN = t_KGBLN.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
    return t_BSGN.flatten(2) if merge_groups else t_BSGN
