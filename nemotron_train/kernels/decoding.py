"""C kernels of decoding on a CPU: a few tokens through a whole layer in one call.

Owns: the marshalling of tensors for the C functions, and the sizes they accept. Does not own: the
definition of a layer (its modules, which also compute in all other cases: emulated linears, ranks
that share a layer, GPUs, more tokens, no C compiler); the choice of weights (the `block` module of
each layer kind). tests/generate/test_one_truth.py and tests/kernels/test_decoding.py compare
kernels and modules.

The modules start about thirty torch operators a layer. For a few tokens each operator costs more
than its arithmetic.

Shapes: T tokens, D width of the residual stream, B sequences, n largest number of tokens of one
sequence, K taps, C channels of the convolution, H heads of P channels, N state size, G key/value
heads, Q query heads of each, L capacity of the KV cache, E experts, F their hidden width.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemotron_train.kernels.library import (
    INT32,
    INT64,
    POINTER,
    Kernel,
    as_float_pointers,
    as_pointer,
    limit,
    supports,
)

MAX_TOKENS = 32  # of a decode batch; for more, the larger products of the modules are faster


def _fields(text: str) -> list[tuple[str, Any]]:
    """Structure fields from "name name:type ...": pointer (default), i int64, b int32, f float."""
    types = {"p": POINTER, "i": INT64, "b": INT32, "f": ctypes.c_float}
    return [
        (name, types[kind or "p"])
        for name, _, kind in (word.partition(":") for word in text.split())
    ]


class _Tokens(ctypes.Structure):
    _fields_ = _fields("count:i width:i is_bfloat16:b epsilon:f x out norm")


class _Mamba(ctypes.Structure):
    _fields_ = [
        ("tokens", _Tokens),
        *_fields("batch:i most:i starts heads:i head_dim:i groups:i state_size:i taps:i in_proj"),
        *_fields("conv_weight conv_bias dt_bias A_log D dt_min:f dt_max:f gated_norm out_proj"),
        *_fields("window inputs before after workspace"),
    ]


class _MoE(ctypes.Structure):
    _fields_ = [
        ("tokens", _Tokens),
        *_fields("num_experts:i choices:i hidden:i latent:i shared:i router bias scale:f"),
        *_fields("shared1 shared2 latent1 latent2 weight1 weight2 workspace experts"),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("tokens", _Tokens),
        *_fields("groups:i queries:i head_dim:i linear_qkv linear_proj keys values"),
        *_fields("cache_capacity:i longest:i rows positions workspace"),
    ]


_mamba_decoding = Kernel("mamba_decoding", ctypes.POINTER(_Mamba), INT32)
_moe_decoding = Kernel("moe_decoding", ctypes.POINTER(_MoE), INT32)
_attention_decoding = Kernel("attention_decoding", ctypes.POINTER(_Attention), INT32)
_norm_rows = Kernel("norm_rows", ctypes.POINTER(_Tokens), INT32)
_few_rows = Kernel("few_rows", POINTER, INT64, INT64, POINTER, INT64, POINTER, POINTER, INT32)


@dataclass(frozen=True)
class ResidualStream:
    """A layer's input, [T,1,D] contiguous, and the weight [D] and epsilon of its norm."""

    hidden_T1D: Tensor
    norm_weight_D: Tensor
    epsilon: float

    def tokens(self, out_T1D: Tensor) -> _Tokens:
        """The C structure; the kernel writes its result to `out_T1D`."""
        count, _, width = self.hidden_T1D.shape
        is_bfloat16 = self.hidden_T1D.dtype == torch.bfloat16
        pointers = (t.data_ptr() for t in (self.hidden_T1D, out_T1D, self.norm_weight_D))
        return _Tokens(count, width, is_bfloat16, self.epsilon, *pointers)


def accepts_tokens(num_tokens: int, hidden_T1D: Tensor, weight: Tensor | None) -> bool:
    """Whether the layer kernels handle these tokens: at most MAX_TOKENS, no gradients, on a CPU, in
    the dtype of the layer's weights. weight: of the layer's norm, None if the layer has none."""
    if weight is None:
        return False
    is_few = num_tokens <= MAX_TOKENS and not torch.is_grad_enabled()
    return is_few and hidden_T1D.dtype == weight.dtype and supports(hidden_T1D)


def accepts_weights(weights: Sequence[Tensor]) -> bool:
    """Whether the kernels can read these weights: one dtype, contiguous, rows of at most
    `max_width` elements."""
    dtype, max_width = weights[0].dtype, limit("max_width")
    return all(t.dtype == dtype and t.is_contiguous() and t.shape[-1] <= max_width for t in weights)


@dataclass(frozen=True)
class MambaWeights:
    """The weights of one Mamba-2 layer: convolution [C,K] and [C], per-head FP32 [H], matrices
    [out, in]."""

    in_proj: Tensor
    conv_weight_CK: Tensor
    conv_bias_C: Tensor
    dt_bias_H: Tensor
    A_log_H: Tensor
    D_H: Tensor
    gated_norm: Tensor
    out_proj: Tensor

    def are_accepted(self, norm_weight_D: Tensor) -> bool:
        """Whether `mamba_layer` can compute with these weights."""
        matrices = (self.in_proj, self.conv_weight_CK, self.conv_bias_C, self.gated_norm)
        per_head = (self.dt_bias_H, self.A_log_H, self.D_H)
        return (
            accepts_weights([norm_weight_D, *matrices, self.out_proj])
            and all(t.dtype == torch.float32 for t in per_head)
            and self.conv_weight_CK.shape[1] <= limit("mamba_decoding_max_taps")
        )


def mamba_layer(
    stream: ResidualStream,
    weights: MambaWeights,
    *,
    sizes: tuple[int, int, int, int],
    dt_limits: tuple[float, float],
    longest: int,
    starts: Tensor,
    window_BKC: Tensor,
    inputs_BWC: Tensor,
    ssm_before_BHPN: Tensor,
    ssm_after: Tensor,
) -> Tensor:
    """x + mixer(norm(x)), [T,1,D].

    sizes: H, P, groups, N. longest: n. starts: int64 [B + 1], index of each sequence's first token.
    window_BKC: the last K - 1 inputs of the convolution before this batch. inputs_BWC: output,
    those inputs followed by the new ones, W = K - 1 + n. ssm_after: output, the state after each
    token [n,B,H,P,N]; or `ssm_before_BHPN` itself, then updated in place to the last state.
    """
    hidden_T1D = stream.hidden_T1D
    num_tokens, _, width = hidden_T1D.shape
    num_heads, head_dim, num_groups, state_size = sizes
    channels, taps = weights.conv_weight_CK.shape
    inner = num_heads * head_dim
    out_T1D = torch.empty_like(hidden_T1D)
    workspace = torch.empty(num_tokens * (width + 2 * inner + 2 * channels + num_heads))
    arguments = _Mamba(
        stream.tokens(out_T1D),
        len(starts) - 1,
        longest,
        starts.data_ptr(),
        num_heads,
        head_dim,
        num_groups,
        state_size,
        taps,
        weights.in_proj.data_ptr(),
        weights.conv_weight_CK.data_ptr(),
        weights.conv_bias_C.data_ptr(),
        weights.dt_bias_H.data_ptr(),
        weights.A_log_H.data_ptr(),
        weights.D_H.data_ptr(),
        *dt_limits,
        weights.gated_norm.data_ptr(),
        weights.out_proj.data_ptr(),
        window_BKC.data_ptr(),
        inputs_BWC.data_ptr(),
        ssm_before_BHPN.data_ptr(),
        ssm_after.data_ptr(),
        workspace.data_ptr(),
    )
    _mamba_decoding(arguments, torch.get_num_threads())
    return out_T1D


@dataclass(frozen=True)
class MoEWeights:
    """The weights of one LatentMoE layer with all experts on this rank. shared: both matrices of
    the shared expert. latent: both projections. None if the layer has none."""

    router_ED: Tensor
    bias_E: Tensor
    weight1_EFD: Tensor
    weight2_EDF: Tensor
    shared: tuple[Tensor, Tensor] | None
    latent: tuple[Tensor, Tensor] | None

    def are_accepted(self, norm_weight_D: Tensor) -> bool:
        """Whether `moe_layer` can compute with these weights."""
        optional = [*(self.shared or ()), *(self.latent or ())]
        matrices = [norm_weight_D, self.weight1_EFD, self.weight2_EDF, self.router_ED, *optional]
        has_fit_bias = self.bias_E.dtype == torch.float32 and len(self.bias_E) <= limit("max_width")
        return has_fit_bias and accepts_weights(matrices)


def moe_layer(stream: ResidualStream, weights: MoEWeights, *, top_k: int, scale: float) -> Tensor:
    """x + moe(norm(x)), [T,1,D]; top_k experts a token, whose routing weights sum to `scale`."""
    hidden_T1D = stream.hidden_T1D
    num_tokens, _, width = hidden_T1D.shape
    num_experts, expert_width, _ = weights.weight1_EFD.shape
    shared_width = 0 if weights.shared is None else weights.shared[0].shape[0]
    latent_width = 0 if weights.latent is None else weights.latent[0].shape[0]
    out_T1D = torch.empty_like(hidden_T1D)
    per_token = 3 * width + num_experts + top_k + shared_width
    per_token += 2 * latent_width + top_k * expert_width
    workspace = torch.empty(num_tokens * per_token)
    experts = torch.empty(num_tokens * top_k, dtype=torch.int64)
    arguments = _MoE(
        stream.tokens(out_T1D),
        num_experts,
        top_k,
        expert_width,
        latent_width,
        shared_width,
        weights.router_ED.data_ptr(),
        weights.bias_E.data_ptr(),
        scale,
        *_pair_pointers(weights.shared),
        *_pair_pointers(weights.latent),
        weights.weight1_EFD.data_ptr(),
        weights.weight2_EDF.data_ptr(),
        workspace.data_ptr(),
        experts.data_ptr(),
    )
    _moe_decoding(arguments, torch.get_num_threads())
    return out_T1D


def _pair_pointers(pair: tuple[Tensor, Tensor] | None) -> tuple[int | None, int | None]:
    return (None, None) if pair is None else (pair[0].data_ptr(), pair[1].data_ptr())


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of one attention layer: linear_qkv [G x (Q + 2) x head_dim, D] and linear_proj
    [D, G x Q x head_dim]."""

    linear_qkv: Tensor
    linear_proj: Tensor
    num_groups: int
    queries_per_group: int
    head_dim: int

    def are_accepted(self, norm_weight_D: Tensor) -> bool:
        """Whether `attention_layer` can compute with these weights."""
        return (
            accepts_weights([norm_weight_D, self.linear_qkv, self.linear_proj])
            and self.queries_per_group <= limit("attention_decoding_max_queries")
            and self.head_dim <= limit("attention_decoding_max_head_dim")
        )


def attention_layer(
    stream: ResidualStream,
    weights: AttentionWeights,
    *,
    keys_BGLD: Tensor,
    values_BGLD: Tensor,
    longest: int,
    row_T: Tensor,
    position_T: Tensor,
) -> Tensor:
    """x + attention(norm(x)), [T,1,D]; writes the new keys and values to the cache.

    longest: tokens of the longest sequence after this call, at most L. row_T, position_T: int64,
    the sequence of each token and its position there.
    """
    hidden_T1D = stream.hidden_T1D
    num_tokens, _, width = hidden_T1D.shape
    groups, queries, head_dim = weights.num_groups, weights.queries_per_group, weights.head_dim
    pieces = -(-longest // limit("attention_decoding_piece"))
    per_token = width + groups * (2 * queries + 2) * head_dim
    per_token += groups * pieces * queries * (2 + head_dim)
    out_T1D = torch.empty_like(hidden_T1D)
    workspace = torch.empty(num_tokens * per_token)
    arguments = _Attention(
        stream.tokens(out_T1D),
        groups,
        queries,
        head_dim,
        weights.linear_qkv.data_ptr(),
        weights.linear_proj.data_ptr(),
        keys_BGLD.data_ptr(),
        values_BGLD.data_ptr(),
        keys_BGLD.shape[2],
        longest,
        row_T.data_ptr(),
        position_T.data_ptr(),
        workspace.data_ptr(),
    )
    _attention_decoding(arguments, torch.get_num_threads())
    return out_T1D


def norm_rows(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of a contiguous [..., D] in the weight's dtype; D is at most `max_width`."""
    out, width = torch.empty_like(x), x.shape[-1]
    pointers = (t.data_ptr() for t in (x, out, weight_D))
    rows = _Tokens(x.numel() // width, width, x.dtype == torch.bfloat16, epsilon, *pointers)
    _norm_rows(rows, torch.get_num_threads())
    return out


def few_rows(x_RD: Tensor, weight_FD: Tensor) -> Tensor:
    """x Wᵀ for a few BF16 rows, [R,D] -> [R,F], summed in FP32; D is at most `max_width`."""
    assert x_RD.dtype == weight_FD.dtype == torch.bfloat16
    wide_RD = x_RD.float().contiguous()
    workspace_RF = torch.empty(len(x_RD), len(weight_FD))
    y_RF = x_RD.new_empty(workspace_RF.shape)
    (wide,), (workspace,) = as_float_pointers(wide_RD), as_float_pointers(workspace_RF)
    _few_rows(
        wide,
        *x_RD.shape,
        as_pointer(weight_FD),
        len(weight_FD),
        workspace,
        as_pointer(y_RF),
        torch.get_num_threads(),
    )
    return y_RF
