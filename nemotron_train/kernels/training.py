"""C kernels of a training step on a CPU: elementwise and row-wise work in one sweep each.

Owns: one Python function for each C function, and the marshalling of tensors. Does not own: the
definitions (the torch operators of the layers, which remain as fallback and for FP64), loading
(`library`).

The tensors of a step do not fit in the caches, so each torch operator costs one sweep over memory,
and in BF16 one more to convert to FP32. A kernel reads its operands once, computes in FP32 and
rounds once. Sums over tokens are added block by block, so they do not depend on the number of
threads.

Shape suffixes: B batch, S tokens, C channels, K taps, G groups.
"""

import ctypes

import torch
from torch import Tensor

from nemotron_train.kernels.library import (
    INT32,
    INT64,
    POINTER,
    ROWS,
    Kernel,
    as_float_pointers,
    as_pointer,
    as_rows,
    channels_last,
    limit,
)


class _Convolution(ctypes.Structure):
    _fields_ = (
        ("batch", INT64),
        ("length", INT64),
        ("channels", INT64),
        ("taps", INT32),
        ("weight", POINTER),
        ("bias", POINTER),
        ("document_ids", POINTER),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        ("batch", INT64),
        ("length", INT64),
        ("groups", INT64),
        ("width", INT64),
        ("epsilon", ctypes.c_float),
        ("weight", POINTER),
        ("weight_is_bfloat16", INT32),
        ("scale", POINTER),
    )


class _Scan(ctypes.Structure):
    _fields_ = tuple(
        (name, INT64) for name in ("chunks", "groups", "batch", "length", "heads", "head_dim")
    )


class _Activation(ctypes.Structure):
    _fields_ = (
        ("rows", INT64),
        ("width", INT64),
        ("hidden", POINTER),
        ("weight", POINTER),
        ("is_bfloat16", INT32),
    )


class _Logits(ctypes.Structure):
    _fields_ = (
        ("values", POINTER),
        ("rows", INT64),
        ("columns", INT64),
        ("is_bfloat16", INT32),
    )


# Argument types as in csrc/, in the order of its functions.
_CONVOLUTION = ctypes.POINTER(_Convolution)
_NORM = ctypes.POINTER(_Norm)
_SCAN = ctypes.POINTER(_Scan)
_ACTIVATION = ctypes.POINTER(_Activation)
_LOGITS = ctypes.POINTER(_Logits)
_convolution_forward = Kernel("convolution_forward", _CONVOLUTION, ROWS, ROWS, INT32)
_convolution_backward = Kernel(
    "convolution_backward", _CONVOLUTION, ROWS, ROWS, ROWS, INT32, POINTER, POINTER
)
_norm_forward = Kernel("norm_forward", _NORM, ROWS, ROWS, ROWS, INT32)
_norm_backward = Kernel(
    "norm_backward", _NORM, ROWS, ROWS, ROWS, ROWS, ROWS, INT32, POINTER, POINTER
)
_scan_to_chunks = Kernel("scan_to_chunks", _SCAN, ROWS, POINTER, POINTER, POINTER, INT32)
_scan_from_chunks = Kernel("scan_from_chunks", _SCAN, ROWS, POINTER, POINTER, POINTER, ROWS, INT32)
_scan_readers = Kernel(
    "scan_readers", _SCAN, ROWS, ROWS, POINTER, POINTER, POINTER, POINTER, POINTER, INT32
)
_scan_writers = Kernel(
    "scan_writers", _SCAN, ROWS, ROWS, POINTER, POINTER, POINTER, POINTER, ROWS, POINTER, INT32
)
_scan_states = Kernel("scan_states", _SCAN, INT64, POINTER, POINTER, POINTER, INT32)
_scan_states_backward = Kernel(
    "scan_states_backward",
    _SCAN,
    INT64,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    POINTER,
    INT32,
    INT32,
)
_squared_relu = Kernel("squared_relu", _ACTIVATION, POINTER, INT32)
_squared_relu_backward = Kernel("squared_relu_backward", _ACTIVATION, POINTER, POINTER, INT32)
_cross_entropy_sums = Kernel("cross_entropy_sums", _LOGITS, POINTER, POINTER, INT32)
_cross_entropy_gradient = Kernel(
    "cross_entropy_gradient", _LOGITS, POINTER, POINTER, POINTER, POINTER, INT32
)


def _blocks(count: int) -> int:
    """Number of blocks into which the kernels divide `count` tokens for sums over tokens."""
    return -(-count // limit("block_tokens"))


def _convolution(x_BSC: Tensor, taps_KC: Tensor, bias_C: Tensor, ids_BS: Tensor | None):
    pointers = (taps_KC.data_ptr(), bias_C.data_ptr(), as_pointer(ids_BS))
    return _Convolution(*x_BSC.shape, len(taps_KC), *pointers)


def causal_conv(x_BSC: Tensor, taps_KC: Tensor, bias_C: Tensor, ids_BS: Tensor | None) -> Tensor:
    """SiLU(bias + sum_j taps[j] x_{t-j}); taps and bias FP32, ids int64, all contiguous."""
    x_BSC = channels_last(x_BSC)
    y_BSC = torch.empty_like(x_BSC)
    # The kernel needs contiguous channels. `empty_like` does not always give them.
    y_BSC = y_BSC if y_BSC.stride(-1) == 1 else torch.empty(x_BSC.shape, dtype=x_BSC.dtype)
    conv = _convolution(x_BSC, taps_KC, bias_C, ids_BS)
    _convolution_forward(conv, as_rows(x_BSC), as_rows(y_BSC), torch.get_num_threads())
    return y_BSC


def causal_conv_backward(
    dy_BSC: Tensor, x_BSC: Tensor, taps_KC: Tensor, bias_C: Tensor, ids_BS: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype, and of taps [K, C] and bias [C] in FP32."""
    dy_BSC, x_BSC = channels_last(dy_BSC), channels_last(x_BSC)
    batch, length, channels = x_BSC.shape
    dx_BSC = torch.empty_like(x_BSC)
    parts = torch.empty(batch * _blocks(length), len(taps_KC) + 1, channels)  # sums of each block
    out = torch.empty(len(taps_KC) + 1, channels)  # taps, then the bias
    conv = _convolution(x_BSC, taps_KC, bias_C, ids_BS)
    rows = (as_rows(t) for t in (x_BSC, dy_BSC, dx_BSC))
    pointers = (as_pointer(parts), as_pointer(out))
    _convolution_backward(conv, *rows, torch.get_num_threads(), *pointers)
    return dx_BSC, out[:-1], out[-1]


def _norm(y_BSC: Tensor, weight_C: Tensor, width: int, epsilon: float, scale: Tensor) -> _Norm:
    batch, length, channels = y_BSC.shape
    return _Norm(
        batch,
        length,
        channels // width,
        width,
        epsilon,
        as_pointer(weight_C),
        weight_C.dtype == torch.bfloat16,
        as_pointer(scale),
    )


def rms_norm(
    y_BSC: Tensor, gate_BSC: Tensor | None, weight_C: Tensor, width: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """weight u / sqrt(mean of u^2 over `width` channels + epsilon), with u = y SiLU(gate), or u = y
    without a gate; and the scales 1 / sqrt(...), FP32 [S x B, G], for the backward pass. width: at
    most `max_width`."""
    y_BSC = channels_last(y_BSC)
    gate_BSC = None if gate_BSC is None else channels_last(gate_BSC)
    batch, length, channels = y_BSC.shape
    out_BSC = torch.empty_like(y_BSC)
    scale = torch.empty(batch * length, channels // width)
    _norm_forward(
        _norm(y_BSC, weight_C, width, epsilon, scale),
        as_rows(y_BSC),
        None if gate_BSC is None else as_rows(gate_BSC),
        as_rows(out_BSC),
        torch.get_num_threads(),
    )
    return out_BSC, scale


def rms_norm_backward(
    dout_BSC: Tensor, y_BSC: Tensor, gate_BSC: Tensor | None, weight_C: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of y and gate (None without a gate) in their dtypes, and of the weight in FP32.
    scale: the second result of `rms_norm`."""
    dout_BSC, y_BSC = channels_last(dout_BSC), channels_last(y_BSC)
    gate_BSC = None if gate_BSC is None else channels_last(gate_BSC)
    batch, length, channels = y_BSC.shape
    dy_BSC = torch.empty_like(y_BSC)
    dgate_BSC = None if gate_BSC is None else torch.empty_like(gate_BSC)
    parts, dweight_C = torch.zeros(_blocks(batch * length), channels), torch.empty(channels)
    _norm_backward(
        _norm(y_BSC, weight_C, channels // scale.shape[1], 0.0, scale),
        as_rows(y_BSC),
        None if gate_BSC is None else as_rows(gate_BSC),
        as_rows(dout_BSC),
        as_rows(dy_BSC),
        None if dgate_BSC is None else as_rows(dgate_BSC),
        torch.get_num_threads(),
        as_pointer(parts),
        as_pointer(dweight_C),
    )
    return dy_BSC, dgate_BSC, dweight_C


def _heads(t_BSHP: Tensor) -> Tensor:
    """[B, S, H x P] with contiguous channels, a view if possible."""
    return channels_last(t_BSHP.flatten(2))


def _scan(numbers_KGBLJ: Tensor, head_dim: int) -> _Scan:
    return _Scan(*numbers_KGBLJ.shape, head_dim)


def _operand(numbers_KGBLJ: Tensor, like_BSHP: Tensor) -> Tensor:
    """An uninitialized operand of products, [K, G, B, L, J x P] in the dtype of `like_BSHP`."""
    shape = (*numbers_KGBLJ.shape[:-1], numbers_KGBLJ.shape[-1] * like_BSHP.shape[-1])
    return torch.empty(shape, dtype=like_BSHP.dtype)


def scan_to_chunks(x_BSHP: Tensor, scale_KGBLJ: Tensor, scale2_KGBLJ: Tensor | None) -> Tensor:
    """`model.mamba.scan_scaling.to_chunks`."""
    out, scan = _operand(scale_KGBLJ, x_BSHP), _scan(scale_KGBLJ, x_BSHP.shape[-1])
    x, numbers = _heads(x_BSHP), [scale_KGBLJ.contiguous()]
    numbers.append(
        torch.ones_like(numbers[0]) if scale2_KGBLJ is None else scale2_KGBLJ.contiguous()
    )
    threads = torch.get_num_threads()
    _scan_to_chunks(scan, as_rows(x), *as_float_pointers(*numbers), as_pointer(out), threads)
    return out


def scan_from_chunks(
    x_BSHP: Tensor, part: Tensor, own_KGBLJ: Tensor, scale_KGBLJ: Tensor
) -> Tensor:
    """`model.mamba.scan_scaling.from_chunks`, in x's dtype."""
    x, numbers = _heads(x_BSHP), (own_KGBLJ.contiguous(), scale_KGBLJ.contiguous())
    y, scan = torch.empty_like(x), _scan(scale_KGBLJ, x_BSHP.shape[-1])
    part, threads = part.contiguous(), torch.get_num_threads()
    arguments = (as_rows(x), as_pointer(part), *as_float_pointers(*numbers), as_rows(y), threads)
    _scan_from_chunks(scan, *arguments)
    return y.view(x_BSHP.shape)


def scan_readers(
    dy_BSHP: Tensor, x_BSHP: Tensor, part: Tensor, read_KGBLJ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on the output side: `model.mamba.scan_scaling.readers` gives the formulas."""
    dy, x, read_KGBLJ = _heads(dy_BSHP), _heads(x_BSHP), read_KGBLJ.contiguous()
    dyr, scan = _operand(read_KGBLJ, x_BSHP), _scan(read_KGBLJ, x_BSHP.shape[-1])
    row, dyx = torch.empty_like(read_KGBLJ), torch.empty_like(read_KGBLJ)
    part, threads = part.contiguous(), torch.get_num_threads()
    pointers = (
        as_pointer(part),
        *as_float_pointers(read_KGBLJ),
        as_pointer(dyr),
        *as_float_pointers(row, dyx),
    )
    _scan_readers(scan, as_rows(dy), as_rows(x), *pointers, threads)
    return dyr, row, dyx


def scan_writers(
    dy_BSHP: Tensor,
    x_BSHP: Tensor,
    dxw: Tensor,
    own_KGBLJ: Tensor,
    dt_KGBLJ: Tensor,
    write_KGBLJ: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients on the input side, dx in x's dtype: `model.mamba.scan_scaling.writers` gives the
    formulas."""
    dy, x, dxw = _heads(dy_BSHP), _heads(x_BSHP), dxw.contiguous()
    numbers = [t.contiguous() for t in (own_KGBLJ, dt_KGBLJ, write_KGBLJ)]
    dx, dxdt = torch.empty_like(x), torch.empty_like(numbers[0])
    scan, threads = _scan(dxdt, x_BSHP.shape[-1]), torch.get_num_threads()
    pointers = (
        as_pointer(dxw),
        *as_float_pointers(*numbers),
        as_rows(dx),
        *as_float_pointers(dxdt),
    )
    _scan_writers(scan, as_rows(dy), as_rows(x), *pointers, threads)
    return dx.view(x_BSHP.shape), dxdt


def _state_scan(states: Tensor) -> tuple[_Scan, int]:
    """The sizes for the state kernels, which do not use the chunk length (0), and N."""
    entries, groups, batch, state_size, heads, head_dim = states.shape
    return _Scan(entries - 1, groups, batch, 0, heads, head_dim), state_size


def scan_states(states: Tensor, end_KGBJ: Tensor, carry_KGBJ: Tensor) -> None:
    """`model.mamba.scan_scaling.scan_states`, in place."""
    numbers = (end_KGBJ.contiguous(), carry_KGBJ.contiguous())
    threads = torch.get_num_threads()
    scan, state_size = _state_scan(states)
    _scan_states(scan, state_size, *as_float_pointers(states, *numbers), threads)


def scan_states_backward(
    dstates: Tensor, states: Tensor, end_KGBJ: Tensor, carry_KGBJ: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`model.mamba.scan_scaling.scan_states_backward`; updates `dstates` in place."""
    numbers = (end_KGBJ.contiguous(), carry_KGBJ.contiguous())
    ends = torch.empty_like(numbers[0])
    dsum = torch.empty(states[1:].shape, dtype=dtype).flatten(-2)
    scan, state_size = _state_scan(states)
    _scan_states_backward(
        scan,
        state_size,
        *as_float_pointers(dstates, states, *numbers, ends),
        as_pointer(dsum),
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return ends, dsum


def _activation(hidden_TF: Tensor, weight_T: Tensor | None) -> _Activation:
    assert weight_T is None or weight_T.dtype == torch.float32
    pointers = (as_pointer(hidden_TF), as_pointer(weight_T))
    return _Activation(*hidden_TF.shape, *pointers, hidden_TF.dtype == torch.bfloat16)


def squared_relu(hidden_TF: Tensor, weight_T: Tensor | None) -> Tensor:
    """weight relu(hidden)^2, one FP32 weight a row (None: 1); contiguous rows of at most
    `max_width`."""
    out_TF, threads = torch.empty_like(hidden_TF), torch.get_num_threads()
    _squared_relu(_activation(hidden_TF, weight_T), as_pointer(out_TF), threads)
    return out_TF


def squared_relu_backward_(
    grad_TF: Tensor, hidden_TF: Tensor, weight_T: Tensor | None, with_weight: bool
) -> Tensor | None:
    """Overwrite `grad_TF`, the gradient of the result, with that of `hidden_TF`. Returns the
    gradient of the weight, FP32 [T], if `with_weight`, else None."""
    assert grad_TF.dtype == hidden_TF.dtype and grad_TF.shape == hidden_TF.shape
    dweight_T = torch.empty(len(hidden_TF)) if with_weight else None
    pointers = (as_pointer(grad_TF), as_pointer(dweight_T))
    activation, threads = _activation(hidden_TF, weight_T), torch.get_num_threads()
    _squared_relu_backward(activation, *pointers, threads)
    return dweight_T


def _logits(logits_NV: Tensor) -> _Logits:
    pointer = as_pointer(logits_NV)
    return _Logits(pointer, *logits_NV.shape, logits_NV.dtype == torch.bfloat16)


def cross_entropy_sums(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit, and its sum of e^(logit - largest): FP32 [N] each. The logits are
    contiguous."""
    largest_N, sum_N = torch.empty(2, len(logits_NV)).unbind()
    threads = torch.get_num_threads()
    _cross_entropy_sums(_logits(logits_NV), *as_float_pointers(largest_N, sum_N), threads)
    return largest_N, sum_N


def cross_entropy_gradient_(
    logits_NV: Tensor, largest_N: Tensor, factor_N: Tensor, labels_N: Tensor, onehot_N: Tensor
) -> None:
    """Replace the logits by e^(logit - largest) factor, plus onehot at the label (int64)."""
    numbers = as_float_pointers(largest_N, factor_N.contiguous())
    labels, onehot = labels_N.contiguous(), onehot_N.contiguous()
    targets = (as_pointer(labels), *as_float_pointers(onehot))
    _cross_entropy_gradient(_logits(logits_NV), *numbers, *targets, torch.get_num_threads())
