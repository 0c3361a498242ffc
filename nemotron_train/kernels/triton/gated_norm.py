"""Triton kernels of Mamba-2's gated RMSNorm: forward and backward.

Owns: the kernels and their launches. Does not own: the definition (model/mamba/gated_norm.py), the
choice of the form. The functions are those of kernels/training.py, which holds the C form.

Floor, BF16: forward reads y and the gate and writes the result, 6 bytes an element over the
bandwidth (1.31 us for a million elements at 4.8 TB/s), plus 4 bytes a group; backward reads y, the
gate and the result's gradient and writes two gradients, 10 bytes (2.18 us), plus the partial sums
of the weight's gradient, 4 bytes per channel for each 64 tokens (or each program, if that is more).
Torch's operators make about ten passes in FP32.

Shape suffixes: B batch, S tokens, C channels, G groups, W channels a group (C = G x W).
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_train.kernels.triton.elements import as_bits, loaded, sigmoid, stored, tiles

_TILE = 4096  # elements of a tile
_TOKENS_PER_PROGRAM = 64  # of the backward pass: tokens whose weight gradients one program adds


@triton.jit
def _offsets(n, length, c, batch_stride, token_stride, channel_stride):
    """Offsets [T, W] of tokens n of the flattened [B x S]."""
    row = (n // length).to(tl.int64) * batch_stride + (n % length).to(tl.int64) * token_stride
    return row[:, None] + c.to(tl.int64)[None, :] * channel_stride


@triton.jit
def _norm_forward(
    y,
    gate,
    out,
    weight,
    scales,
    tokens,
    length,
    groups,
    width,
    epsilon,
    y_batch,
    y_token,
    y_channel,
    gate_batch,
    gate_token,
    gate_channel,
    out_batch,
    out_token,
    out_channel,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0) % groups
    n = (tl.program_id(0) // groups) * TOKENS + tl.arange(0, TOKENS)
    w = tl.arange(0, WIDTH)
    c = group * width + w
    inside = (n < tokens)[:, None] & (w < width)[None, :]
    y_at = y + _offsets(n, length, c, y_batch, y_token, y_channel)
    gate_at = gate + _offsets(n, length, c, gate_batch, gate_token, gate_channel)
    out_at = out + _offsets(n, length, c, out_batch, out_token, out_channel)
    gates = loaded(tl.load(gate_at, mask=inside, other=0))
    u = gates * sigmoid(gates) * loaded(tl.load(y_at, mask=inside, other=0))
    mean = tl.sum(u * u, axis=1) / width
    scale = 1.0 / tl.sqrt_rn(mean + epsilon)
    factors = loaded(tl.load(weight + c, mask=w < width, other=0))
    tl.store(out_at, stored(u * scale[:, None] * factors[None, :], out_at), mask=inside)
    tl.store(scales + n.to(tl.int64) * groups + group, scale, mask=n < tokens)


@triton.jit
def _norm_backward(
    dout,
    y,
    gate,
    dy,
    dgate,
    weight,
    scales,
    parts,
    tokens,
    length,
    groups,
    width,
    dout_batch,
    dout_token,
    dout_channel,
    y_batch,
    y_token,
    y_channel,
    gate_batch,
    gate_token,
    gate_channel,
    dy_batch,
    dy_token,
    dy_channel,
    dgate_batch,
    dgate_token,
    dgate_channel,
    TOKENS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The formulas of `_GatedRmsNorm.backward`. parts: FP32 [programs, C]."""
    group = tl.program_id(0) % groups
    block = tl.program_id(0) // groups
    w = tl.arange(0, WIDTH)
    c = group * width + w
    factors = loaded(tl.load(weight + c, mask=w < width, other=0))[None, :]
    dweight = tl.zeros([WIDTH], tl.float32)
    for step in range(STEPS):
        n = (block * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        inside = (n < tokens)[:, None] & (w < width)[None, :]
        dout_at = dout + _offsets(n, length, c, dout_batch, dout_token, dout_channel)
        y_at = y + _offsets(n, length, c, y_batch, y_token, y_channel)
        gate_at = gate + _offsets(n, length, c, gate_batch, gate_token, gate_channel)
        scale = tl.load(scales + n.to(tl.int64) * groups + group, mask=n < tokens, other=0.0)
        values = loaded(tl.load(y_at, mask=inside, other=0))
        gates = loaded(tl.load(gate_at, mask=inside, other=0))
        gradient = loaded(tl.load(dout_at, mask=inside, other=0))
        share = sigmoid(gates)
        silu = gates * share
        normed = silu * values * scale[:, None]
        dweight += tl.sum(gradient * normed, axis=0)
        scaled = gradient * factors
        mean = tl.sum(scaled * normed, axis=1) / width
        du = (scaled - normed * mean[:, None]) * scale[:, None]
        dy_at = dy + _offsets(n, length, c, dy_batch, dy_token, dy_channel)
        dgate_at = dgate + _offsets(n, length, c, dgate_batch, dgate_token, dgate_channel)
        tl.store(dy_at, stored(du * silu, dy_at), mask=inside)
        slope = share * (1.0 + gates * (1.0 - share))
        tl.store(dgate_at, stored(du * values * slope, dgate_at), mask=inside)
    tl.store(parts + block.to(tl.int64) * groups * width + c, dweight, mask=w < width)


def _tile(width: int) -> tuple[int, int, int]:
    """Tokens and padded width of a tile, powers of two, and the warps that keep 16 of its elements
    a thread in registers."""
    padded = triton.next_power_of_2(width)
    tokens = max(1, _TILE // padded)
    return tokens, padded, tokens * padded // (16 * 32)


def rms_norm(
    y_BSC: Tensor, gate_BSC: Tensor, weight_C: Tensor, width: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """weight u / sqrt(mean of u^2 over `width` channels + epsilon), u = y SiLU(gate), in y's dtype
    and memory order; and the scales 1 / sqrt(...), FP32 [B x S, G], for the backward pass.

    BF16 or FP32, y and gate with any strides, weight contiguous. width: at most
    `available.MAX_NORM_WIDTH`.
    """
    batch, length, channels = y_BSC.shape
    groups = channels // width
    out_BSC = torch.empty_like(y_BSC)
    scale = y_BSC.new_empty((batch * length, groups), dtype=torch.float32)
    if y_BSC.numel():
        tokens, padded, warps = _tile(width)
        _norm_forward[(tiles(batch * length, tokens) * groups,)](
            *(as_bits(t) for t in (y_BSC, gate_BSC, out_BSC, weight_C)),
            scale,
            batch * length,
            length,
            groups,
            width,
            epsilon,
            *y_BSC.stride(),
            *gate_BSC.stride(),
            *out_BSC.stride(),
            TOKENS=tokens,
            WIDTH=padded,
            num_warps=warps,
        )
    return out_BSC, scale


def rms_norm_backward(
    dout_BSC: Tensor, y_BSC: Tensor, gate_BSC: Tensor, weight_C: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and gate in their dtypes, and of the weight in FP32. scale: the second result
    of `rms_norm`. Sums over tokens are added in a fixed order, so results repeat bit for bit."""
    batch, length, channels = y_BSC.shape
    groups = scale.shape[1]
    width = channels // groups
    dy_BSC, dgate_BSC = torch.empty_like(y_BSC), torch.empty_like(gate_BSC)
    tokens, padded, warps = _tile(width)
    steps = max(1, _TOKENS_PER_PROGRAM // tokens)
    blocks = tiles(batch * length, tokens * steps)
    parts = y_BSC.new_empty((blocks, channels), dtype=torch.float32)
    if y_BSC.numel():
        _norm_backward[(blocks * groups,)](
            *(as_bits(t) for t in (dout_BSC, y_BSC, gate_BSC, dy_BSC, dgate_BSC, weight_C)),
            scale,
            parts,
            batch * length,
            length,
            groups,
            width,
            *dout_BSC.stride(),
            *y_BSC.stride(),
            *gate_BSC.stride(),
            *dy_BSC.stride(),
            *dgate_BSC.stride(),
            TOKENS=tokens,
            STEPS=steps,
            WIDTH=padded,
            num_warps=warps,
        )
    return dy_BSC, dgate_BSC, parts.sum(0)
