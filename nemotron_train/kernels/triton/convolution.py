"""Triton kernels of the short causal convolution with SiLU and documents: forward and backward.

Owns: the kernels and their launches. Does not own: the definition (model/mamba/convolution.py),
the choice of the form. The functions are those of kernels/training.py, which holds the C form.

Tensors may have any strides, so a part of the input projection is read where it lies. The
`causal_conv1d` package needs strides that are multiples of 8.

Floor, BF16: forward reads x and writes y, 4 bytes an element over the bandwidth (0.87 us for a
million elements at 4.8 TB/s); backward reads x and dy and writes dx, 6 bytes (1.31 us), plus
4 (K + 1) / 32 bytes for the partial sums of taps and bias. The backward pass recomputes the sums
before the SiLU for each of the K tokens that one token reaches: K^2 multiply-adds and K
exponentials an element, from values that the cache holds. Storing them instead would add 8 bytes.

Shape suffixes: B batch, S tokens, C channels, K taps.
"""

# Triton does not type the launch of a kernel.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_train.kernels.triton.elements import as_bits, loaded, sigmoid, stored, tiles

_TOKENS, _CHANNELS = 32, 128  # of a tile


@triton.jit
def _place(length, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """The batch row, tokens and channels of this program, and the number of its block of tokens."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) // channel_tiles
    token_tiles = tl.cdiv(length, TOKENS)
    row = (block // token_tiles).to(tl.int64)
    t = (block % token_tiles) * TOKENS + tl.arange(0, TOKENS)
    c = (tl.program_id(0) % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    return row, t, c, block


@triton.jit
def _reaches(ids, t, j, length, HAS_IDS: tl.constexpr):
    """Whether tap j of token t reads a token of the same row and document."""
    inside = (t >= j) & (t < length)
    if HAS_IDS:
        own = tl.load(ids + t, mask=inside, other=0)
        inside = inside & (tl.load(ids + t - j, mask=inside, other=0) == own)
    return inside


@triton.jit
def _read(x, t, c, token_stride, channel_stride, is_token, channels):
    """FP32 [T, C]; zero where `is_token` is false."""
    at = t.to(tl.int64)[:, None] * token_stride + c.to(tl.int64)[None, :] * channel_stride
    return loaded(tl.load(x + at, mask=is_token[:, None] & (c < channels)[None, :], other=0))


@triton.jit
def _sum_before_silu(
    x, ids, taps, bias, t, c, length, channels, x_token, x_channel, K: tl.constexpr, HAS_IDS
):
    """bias + sum_j taps[j] x_{t-j}, FP32 [T, C], in the order of the torch form."""
    total = tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    for j in tl.static_range(K):
        tap = tl.load(taps + j * channels + c, mask=c < channels, other=0.0)
        is_read = _reaches(ids, t, j, length, HAS_IDS)
        total = total + _read(x, t - j, c, x_token, x_channel, is_read, channels) * tap[None, :]
    return total


@triton.jit
def _convolution_forward(
    x,
    y,
    ids,
    taps,
    bias,
    length,
    channels,
    x_batch,
    x_token,
    x_channel,
    y_batch,
    y_token,
    y_channel,
    K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row, t, c, _ = _place(length, channels, TOKENS, CHANNELS)
    x += row * x_batch
    y += row * y_batch
    ids += row * length
    total = _sum_before_silu(
        x, ids, taps, bias, t, c, length, channels, x_token, x_channel, K, HAS_IDS
    )
    to = y + t.to(tl.int64)[:, None] * y_token + c.to(tl.int64)[None, :] * y_channel
    inside = (t < length)[:, None] & (c < channels)[None, :]
    tl.store(to, stored(total * sigmoid(total), to), mask=inside)


@triton.jit
def _convolution_backward(
    x,
    dy,
    dx,
    ids,
    taps,
    bias,
    parts,
    length,
    channels,
    x_batch,
    x_token,
    x_channel,
    dy_batch,
    dy_token,
    dy_channel,
    dx_batch,
    dx_token,
    dx_channel,
    K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The formulas of `_CausalConv.backward`. parts: FP32 [blocks, K + 1, C], the sums over this
    block's tokens of the gradients of the taps, then of the bias."""
    row, t, c, block = _place(length, channels, TOKENS, CHANNELS)
    x += row * x_batch
    dy += row * dy_batch
    dx += row * dx_batch
    ids += row * length
    parts += block.to(tl.int64) * (K + 1) * channels
    total_dx = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for i in tl.static_range(K):
        # Token u = t + i read x_t through tap i.
        u = t + i
        total = _sum_before_silu(
            x, ids, taps, bias, u, c, length, channels, x_token, x_channel, K, HAS_IDS
        )
        is_reader = _reaches(ids, u, i, length, HAS_IDS)
        gradient = _read(dy, u, c, dy_token, dy_channel, is_reader, channels)
        share = sigmoid(total)
        dsum = gradient * share * (1.0 + total * (1.0 - share))
        tap = tl.load(taps + i * channels + c, mask=c < channels, other=0.0)
        total_dx += dsum * tap[None, :]
        if i == 0:
            for j in tl.static_range(K):
                is_read = _reaches(ids, t, j, length, HAS_IDS)
                read = _read(x, t - j, c, x_token, x_channel, is_read, channels)
                tl.store(parts + j * channels + c, tl.sum(dsum * read, axis=0), mask=c < channels)
            tl.store(parts + K * channels + c, tl.sum(dsum, axis=0), mask=c < channels)
    to = dx + t.to(tl.int64)[:, None] * dx_token + c.to(tl.int64)[None, :] * dx_channel
    inside = (t < length)[:, None] & (c < channels)[None, :]
    tl.store(to, stored(total_dx, to), mask=inside)


def _blocks(x_BSC: Tensor) -> tuple[int, int]:
    """Number of blocks of tokens in all rows, and of programs."""
    batch, length, channels = x_BSC.shape
    blocks = batch * tiles(length, _TOKENS)
    return blocks, blocks * tiles(channels, _CHANNELS)


def causal_conv(x_BSC: Tensor, taps_KC: Tensor, bias_C: Tensor, ids_BS: Tensor | None) -> Tensor:
    """SiLU(bias + sum_j taps[j] x_{t-j}) in x's dtype and memory order.

    x: BF16 or FP32, any strides. taps and bias FP32, ids int64, all contiguous; K at least 1.
    """
    y_BSC = torch.empty_like(x_BSC)
    if not x_BSC.numel():
        return y_BSC
    _convolution_forward[(_blocks(x_BSC)[1],)](
        as_bits(x_BSC),
        as_bits(y_BSC),
        taps_KC if ids_BS is None else ids_BS,  # an unused pointer without documents
        taps_KC,
        bias_C,
        *x_BSC.shape[1:],
        *x_BSC.stride(),
        *y_BSC.stride(),
        K=len(taps_KC),
        HAS_IDS=ids_BS is not None,
        TOKENS=_TOKENS,
        CHANNELS=_CHANNELS,
    )
    return y_BSC


def causal_conv_backward(
    dy_BSC: Tensor, x_BSC: Tensor, taps_KC: Tensor, bias_C: Tensor, ids_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype, and of taps [K, C] and bias [C] in FP32. Arguments as in
    `causal_conv`. Sums over tokens are added in a fixed order, so results repeat bit for bit."""
    dx_BSC = torch.empty_like(x_BSC)
    blocks, programs = _blocks(x_BSC)
    parts = x_BSC.new_empty((blocks, len(taps_KC) + 1, x_BSC.shape[2]), dtype=torch.float32)
    if x_BSC.numel():
        _convolution_backward[(programs,)](
            as_bits(x_BSC),
            as_bits(dy_BSC),
            as_bits(dx_BSC),
            taps_KC if ids_BS is None else ids_BS,
            taps_KC,
            bias_C,
            parts,
            *x_BSC.shape[1:],
            *x_BSC.stride(),
            *dy_BSC.stride(),
            *dx_BSC.stride(),
            K=len(taps_KC),
            HAS_IDS=ids_BS is not None,
            TOKENS=_TOKENS,
            CHANNELS=_CHANNELS,
            num_warps=8,
        )
    sums = parts.sum(0)
    return dx_BSC, sums[:-1], sums[-1]
