"""The state-space core of Mamba-2 (SSD, arXiv 2405.21060): one function, two implementations.

Owns: the definition of the recurrence, and the choice between `mamba_ssm` and our Triton kernels
(`triton_scan`) on CUDA and the chunked PyTorch form (`chunked_scan`). Does not own: the
projections, the convolution, softplus and limits of dt, the gate (all in `layer`).

Shape suffixes: B batch, S tokens, H heads, P channels a head, G groups, N state size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron_train.kernels.triton import available
from nemotron_train.model.mamba import triton_scan
from nemotron_train.model.mamba.chunked_scan import chunked_ssd
from nemotron_train.model.mamba.scan_operands import SPLIT_RANGE
from nemotron_train.plan.switches import MAMBA_SSM
from nemotron_train.platform.packages import is_usable

# Chunk lengths on a CPU, in tokens (upper limits). Measured on two cores, forward and backward
# (docs/log.md): 64 costs 5 to 15 % less than 32 and two thirds of 128. But more heads are steep in
# a longer chunk, and a steep head costs two to three times as much as any other.
CPU_CHUNKS = (64, 32)


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
    `chunk_size` changes speed and rounding only.

    Returns y_BSHP in x's dtype, or (y_BSHP, final state BHPN in dt's dtype) with
    `return_final_state`. All floating inputs and the initial state receive gradients.

    On CUDA `mamba_ssm` computes it if it can be used, x is not FP64 and its 32-bit offsets suffice
    (state-spaces/mamba#1015); else our Triton kernels, if Triton can be used and a head has at most
    128 channels; neither with `force_torch`.
    """
    arguments = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
    matrices = (x_BSHP, B_BSGN, C_BSGN)
    if not force_torch and mamba_ssm_takes(*matrices, chunk_size):
        return _mamba_ssm(
            *arguments, chunk_size, document_ids_BS, initial_state_BHPN, return_final_state
        )
    if not force_torch and available.can_use(*matrices) and triton_scan.takes(*matrices):
        y_BSHP, final_BHPN = triton_scan.TritonSsd.apply(  # pyright: ignore
            *arguments, initial_state_BHPN, document_ids_BS, chunk_size
        )
        return (y_BSHP, final_BHPN) if return_final_state else y_BSHP
    if not x_BSHP.is_cuda:
        chunk_size = min(chunk_size, _cpu_chunk(dt_BSH, A_H))
    y_BSHP, final_BHPN = chunked_ssd(
        *arguments, initial_state_BHPN, document_ids_BS, chunk_size, return_final_state
    )
    return (y_BSHP, final_BHPN) if return_final_state else y_BSHP


@torch.no_grad()
def _cpu_chunk(dt_BSH: Tensor, A_H: Tensor) -> int:
    """The longer of CPU_CHUNKS, unless more than one head in sixteen would be steep in it."""
    longest, shorter = CPU_CHUNKS
    padding = -dt_BSH.shape[1] % longest
    # Sum of dt over each chunk; times A it is cum at the chunk's end (documents ignored).
    windows = F.pad(dt_BSH, (0, 0, 0, padding)).unflatten(1, (-1, longest)).sum(2)
    steep_H = (windows.amax((0, 1)) * A_H) < -SPLIT_RANGE
    return longest if 16 * int(steep_H.sum()) <= len(A_H) else shorter


def mamba_ssm_takes(x_BSHP: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, chunk_size: int) -> bool:
    """Whether `mamba_ssm` can be used here and computes these tensors right."""
    if not x_BSHP.is_cuda or x_BSHP.dtype == torch.float64 or not is_usable(MAMBA_SSM):
        return False
    return not offsets_overflow(x_BSHP, B_BSGN, C_BSGN, chunk_size)


def offsets_overflow(x_BSHP: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, chunk_size: int) -> bool:
    """Whether an element offset inside mamba_ssm's kernels would reach 2^31.

    UPSTREAM(mamba-ssm 2.3): Triton computes them in 32 bits and wraps silently, giving finite,
    wrong output (state-spaces/mamba#1015). Strides count: x, B and C are views of wider tensors.
    """
    batch, length, num_heads, head_dim = x_BSHP.shape
    num_groups, state_size = B_BSGN.shape[2:]
    num_chunks = -(-length // chunk_size)
    spans = [(batch - 1) * t.stride(0) + length * t.stride(1) for t in (x_BSHP, B_BSGN, C_BSGN)]
    spans.append(batch * num_chunks * num_heads * head_dim * state_size)  # chunk states
    spans.append(batch * num_chunks * chunk_size * chunk_size * num_groups)  # C.B^T
    return max(spans) >= 2**31


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
    """`ssd` by mamba_ssm's Triton kernels."""
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        mamba_chunk_scan_combined,
    )

    seq_idx = None
    if document_ids_BS is not None:  # the kernel applies the initial state to index 0 only
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
