"""What surrounds the matrix products of chunked SSD: numbers a head times channels a head, between
the order of the tokens and that of the chunks, and the running sum of states.

Owns both forms: torch operators (a GPU, FP64, no C compiler) and one compiled pass each on a CPU
(passes/scan.c). Does not own the products, nor where the numbers come from (ssd_chunked.py).

Shape suffixes: as in ssd_chunked.py. Numbers a head are [K, G, B, L, J], in dt's dtype; operands
of products [K, G, B, L, J x P], contiguous, in x's; tokens [B, K x L, H, P] in any memory order.
"""

import torch
from torch import Tensor

from nemotron_train.kernels import training as training_kernels
from nemotron_train.kernels.library import limit, supports


def _compiled(numbers_KGBLJ: Tensor, *tokens_BSHP: Tensor) -> bool:
    widest = max((t.shape[-1] for t in tokens_BSHP), default=0)
    fits = numbers_KGBLJ.dtype == torch.float32 and widest <= limit("scan_max_head_dim")
    return fits and supports(numbers_KGBLJ, *tokens_BSHP)


def to_chunks(x_BSHP: Tensor, scale_KGBLJ: Tensor, other_KGBLJ: Tensor | None = None) -> Tensor:
    """x scale (other) as an operand of products."""
    if _compiled(scale_KGBLJ, x_BSHP):
        return training_kernels.scan_to_chunks(x_BSHP, scale_KGBLJ, other_KGBLJ)
    # The scale is rounded to x's dtype first, as the product then is: in BF16 that halves the time.
    scale_KGBLJ = scale_KGBLJ if other_KGBLJ is None else scale_KGBLJ * other_KGBLJ
    x_KGBLJP = chunks(x_BSHP, scale_KGBLJ)
    return _expanded(scale_KGBLJ.to(x_BSHP.dtype), x_BSHP.shape[-1]).mul_(x_KGBLJP).flatten(-2)


def from_chunks(x_BSHP: Tensor, part: Tensor, own_KGBLJ: Tensor, scale_KGBLJ: Tensor) -> Tensor:
    """x own + part scale: tokens in x's memory order, since Megatron's activations are
    sequence-first and what leaves here meets them again. In dt's dtype or in x's."""
    if _compiled(scale_KGBLJ, x_BSHP):
        return training_kernels.scan_from_chunks(x_BSHP, part, own_KGBLJ, scale_KGBLJ)
    y_BSHP = _to_tokens_like(own_KGBLJ, x_BSHP).mul_(x_BSHP)
    head_dim = x_BSHP.shape[-1]
    chunks(y_BSHP, scale_KGBLJ).addcmul_(
        part.unflatten(-1, (-1, head_dim)), _expanded(scale_KGBLJ, head_dim)
    )
    return y_BSHP


def readers(
    dy_BSHP: Tensor, x_BSHP: Tensor, out: Tensor, read_KGBLJ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy read as an operand; read sum_P dy out; sum_P dy x. out: the products' result."""
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
    """dy own + dxw dt write, tokens in x's memory order; write sum_P dxw x."""
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
    """states [K + 1, G, B, N, J, P], contiguous: entry k + 1 holds chunk k's own sum, and becomes
    end sum + carry (entry k)."""
    if _compiled(states, states):
        training_kernels.scan_states(states, end_KGBJ, carry_KGBJ)
        return
    end, carry = end_KGBJ[..., None, :, None], carry_KGBJ[..., None, :, None]
    for k in range(len(end)):
        states[k + 1].mul_(end[k]).addcmul_(states[k], carry[k])


def scan_states_backward(
    dstates: Tensor, states: Tensor, end_KGBJ: Tensor, carry_KGBJ: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dstates, in place: entry k holds what chunk k asks of the state entering it, and becomes
    what all chunks from k on ask. Returns the gradient of end's logarithm [K, G, B, J], and of each
    chunk's own sum [K, G, B, N, J x P] in `dtype`."""
    if _compiled(states, states) and dtype != torch.float64:
        return training_kernels.scan_states_backward(dstates, states, end_KGBJ, carry_KGBJ, dtype)
    carry = carry_KGBJ[..., None, :, None]
    for k in reversed(range(len(carry))):
        dstates[k].addcmul_(dstates[k + 1], carry[k])
    ends_KGBJ = (states[1:] * dstates[1:]).sum((-3, -1))
    return ends_KGBJ, (dstates[1:] * end_KGBJ[..., None, :, None]).flatten(-2).to(dtype)


def chunks(t: Tensor, like_KGBLJ: Tensor) -> Tensor:
    """[B, K x L, H, ...] -> a view [K, G, B, L, J, ...]."""
    num_chunks, num_groups, _, length, heads = like_KGBLJ.shape
    t = t.unflatten(1, (num_chunks, length)).unflatten(3, (num_groups, heads))
    return t.movedim((1, 3), (0, 1))


def to_tokens(t_KGBLJ: Tensor, merge: bool = True) -> Tensor:
    """[K, G, B, L, J] -> [B, K x L, G x J], or [B, K x L, G, J]."""
    t = t_KGBLJ.permute(2, 0, 3, 1, 4).flatten(1, 2)
    return t.flatten(2) if merge else t


def _to_tokens_like(numbers_KGBLJ: Tensor, x_BSHP: Tensor) -> Tensor:
    """[K, G, B, L, J] -> [B, S, H, P], the same for all channels, in x's memory order."""
    if x_BSHP.stride(0) >= x_BSHP.stride(1):
        return _expanded(to_tokens(numbers_KGBLJ), x_BSHP.shape[3])
    numbers_SBH = numbers_KGBLJ.permute(0, 3, 2, 1, 4).flatten(0, 1).flatten(2)
    return _expanded(numbers_SBH, x_BSHP.shape[3]).transpose(0, 1)


def _expanded(scale: Tensor, head_dim: int) -> Tensor:
    """[..., H] -> a fresh contiguous [..., H, P]. A copy, then a full-width multiplication, is
    three times faster on a CPU than one that broadcasts over 32 channels at a time."""
    expanded = scale[..., None].expand(*scale.shape, head_dim)
    return expanded.clone(memory_format=torch.contiguous_format)  # never an alias, even for P = 1
