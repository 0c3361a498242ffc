"""The elementwise work around the matrix products of chunked SSD: per-head scaling with the change
between token order and chunk order, the matching gradients, and the recurrence over chunk states.

Owns: each function in two forms, torch operators (GPU, FP64, or no C compiler) and one C kernel on
a CPU (kernels/csrc/scan.c). Does not own: the products (`chunked_scan`), the scale factors
(`scan_operands`).

Shape suffixes: as in chunked_scan.py. Factors of a head are [K, G, B, L, J] in dt's dtype. Operands
of products are [K, G, B, L, J x P], contiguous, in x's dtype. Tokens are [B, K x L, H, P] in any
memory order.
"""

import torch
from torch import Tensor

from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import limit, supports


def _compiled(numbers_KGBLJ: Tensor, *tokens_BSHP: Tensor) -> bool:
    """Whether the C kernels handle these: FP32 factors, BF16 or FP32 tokens, on a CPU."""
    widest = max((t.shape[-1] for t in tokens_BSHP), default=0)
    fits = numbers_KGBLJ.dtype == torch.float32 and widest <= limit("scan_max_head_dim")
    return fits and supports(numbers_KGBLJ, *tokens_BSHP)


def to_chunks(x_BSHP: Tensor, scale_KGBLJ: Tensor, scale2_KGBLJ: Tensor | None = None) -> Tensor:
    """x scale, or x scale scale2, in chunk order as an operand of products: [K, G, B, L, J x P]."""
    if _compiled(scale_KGBLJ, x_BSHP):
        return training_kernels.scan_to_chunks(x_BSHP, scale_KGBLJ, scale2_KGBLJ)
    # The scale is rounded to x's dtype before the multiplication: in BF16 that halves the time.
    scale_KGBLJ = scale_KGBLJ if scale2_KGBLJ is None else scale_KGBLJ * scale2_KGBLJ
    x_KGBLJP = chunks(x_BSHP, scale_KGBLJ)
    return _expanded(scale_KGBLJ.to(x_BSHP.dtype), x_BSHP.shape[-1]).mul_(x_KGBLJP).flatten(-2)


def from_chunks(x_BSHP: Tensor, part: Tensor, own_KGBLJ: Tensor, scale_KGBLJ: Tensor) -> Tensor:
    """y = own x + scale part in token order [B, K x L, H, P]; part: [K, G, B, L, J x P].

    The result has x's memory order: Megatron's activations are sequence-first, so the next layers
    read it without a copy. Its dtype is dt's (torch form) or x's (C kernel).
    """
    if _compiled(scale_KGBLJ, x_BSHP):
        return training_kernels.scan_from_chunks(x_BSHP, part, own_KGBLJ, scale_KGBLJ)
    y_BSHP = _to_tokens_like(own_KGBLJ, x_BSHP).mul_(x_BSHP)
    head_dim = x_BSHP.shape[-1]
    # Writes into y_BSHP through its chunk-order view.
    chunks(y_BSHP, scale_KGBLJ).addcmul_(
        part.unflatten(-1, (-1, head_dim)), _expanded(scale_KGBLJ, head_dim)
    )
    return y_BSHP


def readers(
    dy_BSHP: Tensor, x_BSHP: Tensor, out: Tensor, read_KGBLJ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y = own x + read out (the call of `from_chunks`) on the output side:

        dyr_l = read_l dy_l                gradient of `out`, an operand [K, G, B, L, J x P]
        row_l = read_l sum_P dy_l out_l    gradient of cum_l, since read = exp(cum) x constant
        dyx_l = sum_P dy_l x_l             gradient of own_l

    The last two are [K, G, B, L, J] in dt's dtype. The gradient of x is in `writers`.
    """
    if _compiled(read_KGBLJ, x_BSHP, dy_BSHP):
        return training_kernels.scan_readers(dy_BSHP, x_BSHP, out, read_KGBLJ)
    dy_KGBLJP = chunks(dy_BSHP, read_KGBLJ)
    accumulate = read_KGBLJ.dtype
    row_KGBLJ = (dy_KGBLJP * out.view(dy_KGBLJP.shape)).sum(-1, dtype=accumulate)
    dyx_BSH = (dy_BSHP * x_BSHP).sum(-1, dtype=accumulate)
    return (
        to_chunks(dy_BSHP, read_KGBLJ),
        row_KGBLJ.mul_(read_KGBLJ),
        chunks(dyx_BSH, read_KGBLJ).contiguous(),
    )


def writers(
    dy_BSHP: Tensor,
    x_BSHP: Tensor,
    dxw: Tensor,
    own_KGBLJ: Tensor,
    dt_KGBLJ: Tensor,
    write_KGBLJ: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients on the input side, of xw = x dt write (`to_chunks`) and of y = own x + ...:

        dx_s   = own_s dy_s + dt_s write_s dxw_s    in token order and x's memory order
        dxdt_s = write_s sum_P dxw_s x_s            gradient of dt_s through xw, [K, G, B, L, J]

    dxw: gradient of xw, [K, G, B, L, J x P]. Since write = exp(-cum) x constant, the gradient of
    cum_s on this side is -dt_s dxdt_s; the caller computes it.
    """
    if _compiled(dt_KGBLJ, x_BSHP, dy_BSHP):
        return training_kernels.scan_writers(dy_BSHP, x_BSHP, dxw, own_KGBLJ, dt_KGBLJ, write_KGBLJ)
    head_dim = x_BSHP.shape[-1]
    dxw_KGBLJP = dxw.unflatten(-1, (-1, head_dim))
    dxdt_KGBLJ = (dxw_KGBLJP * chunks(x_BSHP, dt_KGBLJ)).sum(-1, dtype=dt_KGBLJ.dtype)
    dx_BSHP = _to_tokens_like(own_KGBLJ, x_BSHP).mul_(dy_BSHP)
    dx_KGBLJP = chunks(dx_BSHP, dt_KGBLJ)
    dx_KGBLJP.addcmul_(dxw_KGBLJP, _expanded(dt_KGBLJ * write_KGBLJ, head_dim))
    return dx_BSHP, dxdt_KGBLJ.mul_(write_KGBLJ)


def scan_states(states: Tensor, end_KGBJ: Tensor, carry_KGBJ: Tensor) -> None:
    """The recurrence over chunks, in place:

        states[k + 1] = end[k] states[k + 1] + carry[k] states[k]

    states: [K + 1, G, B, N, J, P], contiguous. On entry, states[k + 1] is the sum of xw B^T over
    chunk k; on return, it is the state after chunk k.
    """
    if _compiled(states, states):
        training_kernels.scan_states(states, end_KGBJ, carry_KGBJ)
        return
    end, carry = end_KGBJ[..., None, :, None], carry_KGBJ[..., None, :, None]
    for k in range(len(end)):
        states[k + 1].mul_(end[k]).addcmul_(states[k], carry[k])


def scan_states_backward(
    dstates: Tensor, states: Tensor, end_KGBJ: Tensor, carry_KGBJ: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradient of `scan_states`, from the last chunk to the first.

    dstates [K + 1, G, B, N, J, P], updated in place: on entry, entry k is the gradient with respect
    to the state entering chunk k from the outputs of chunk k only; on return, from all outputs.
        dstates[k] += carry[k] dstates[k + 1]
    Returns
        ends_k = sum over N and P of states[k + 1] dstates[k + 1]: gradient of cum at the end of
            chunk k, [K, G, B, J]. `end` and `carry` are both exp(cum_end), so it scales the state.
        dsum_k = end[k] dstates[k + 1]: gradient of the sum of xw B^T over chunk k,
            [K, G, B, N, J x P] in `dtype`.
    """
    if _compiled(states, states) and dtype != torch.float64:
        return training_kernels.scan_states_backward(dstates, states, end_KGBJ, carry_KGBJ, dtype)
    carry = carry_KGBJ[..., None, :, None]
    for k in reversed(range(len(carry))):
        dstates[k].addcmul_(dstates[k + 1], carry[k])
    ends_KGBJ = (states[1:] * dstates[1:]).sum((-3, -1))
    return ends_KGBJ, (dstates[1:] * end_KGBJ[..., None, :, None]).flatten(-2).to(dtype)


def chunks(t: Tensor, like_KGBLJ: Tensor) -> Tensor:
    """[B, K x L, H, ...] -> a view [K, G, B, L, J, ...]; sizes from `like_KGBLJ`."""
    num_chunks, num_groups, _, length, heads = like_KGBLJ.shape
    t = t.unflatten(1, (num_chunks, length)).unflatten(3, (num_groups, heads))
    return t.movedim((1, 3), (0, 1))


def to_tokens(t_KGBLJ: Tensor, merge: bool = True) -> Tensor:
    """[K, G, B, L, J] -> [B, K x L, G x J], or [B, K x L, G, J] without `merge`."""
    t = t_KGBLJ.permute(2, 0, 3, 1, 4).flatten(1, 2)
    return t.flatten(2) if merge else t


def _to_tokens_like(numbers_KGBLJ: Tensor, x_BSHP: Tensor) -> Tensor:
    """[K, G, B, L, J] -> a fresh [B, S, H, P], repeated over the channels, in x's memory order."""
    if x_BSHP.stride(0) >= x_BSHP.stride(1):  # batch-first
        return _expanded(to_tokens(numbers_KGBLJ), x_BSHP.shape[3])
    numbers_SBH = numbers_KGBLJ.permute(0, 3, 2, 1, 4).flatten(0, 1).flatten(2)
    return _expanded(numbers_SBH, x_BSHP.shape[3]).transpose(0, 1)


def _expanded(scale: Tensor, head_dim: int) -> Tensor:
    """[..., H] -> a fresh contiguous [..., H, P].

    On a CPU this copy and a full-width multiplication are three times faster than a multiplication
    that broadcasts over 32 channels at a time.
    """
    expanded = scale[..., None].expand(*scale.shape, head_dim)
    return expanded.clone(memory_format=torch.contiguous_format)  # never an alias, even for P = 1
