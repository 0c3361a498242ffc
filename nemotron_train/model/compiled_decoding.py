"""The compiled passes of decoding: passes/*_decoding.c, a few tokens through a whole layer.

Owns: which layers they take, and the tensors' way in and out. Does not own: what is computed: the
layers' modules define it, and compute where these do not (other linears than the plain ones, ranks
that share a layer, GPUs, more tokens, no C compiler). tests/generate/test_one_truth.py and
tests/model/test_compiled_decoding.py hold the two together.

A token's pass through the modules starts some thirty torch operators a layer, each of which costs
more than its arithmetic; here it is one call.

Shapes: T tokens, D width of the residual stream, B sequences, n most tokens of one, K taps, C
channels of the convolution.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_train.model.compiled_calls import MAX_WIDTH, as_numbers, as_pointer, call, take
from nemotron_train.model.decode_state import KeyValues, MambaState, NewTokens

MOST_TOKENS = 32  # of a pass; more of them are worth the modules' products
_MAX_TAPS, _MAX_QUERIES, _MAX_HEAD, _PIECE = (
    8,
    64,
    256,
    256,
)  # mamba_decoding.c, attention_decoding.c


def _fields(text: str) -> list[tuple[str, Any]]:
    """ "name name:type ...": pointers (the default), i = int64, b = int32, f = float."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "b": ctypes.c_int32, "f": ctypes.c_float}
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
        *_fields("window inputs before after room"),
    ]


class _MoE(ctypes.Structure):
    _fields_ = [
        ("tokens", _Tokens),
        *_fields("num_experts:i choices:i hidden:i latent:i shared:i router bias scale:f"),
        *_fields("shared1 shared2 latent1 latent2 weight1 weight2 room experts"),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("tokens", _Tokens),
        *_fields("groups:i queries:i head_dim:i linear_qkv linear_proj keys values cache_room:i"),
        *_fields("longest:i rows positions room"),
    ]


def takes_tokens(new: NewTokens, hidden_T1D: Tensor, norm: Any) -> bool:
    """Whether a pass over these tokens is one for the compiled form, in the weights' type."""
    is_few = sum(new.counts) <= MOST_TOKENS and not torch.is_grad_enabled()
    return is_few and hidden_T1D.dtype == norm.weight.dtype and take(hidden_T1D)


def takes_weights(weights: Sequence[Tensor]) -> bool:
    """Whether a layer's weights are what its pass reads: of one type, contiguous, narrow enough."""
    dtype = weights[0].dtype
    return all(t.dtype == dtype and t.is_contiguous() and t.shape[-1] <= MAX_WIDTH for t in weights)


def _tokens(hidden_T1D: Tensor, out_T1D: Tensor, norm: Any) -> _Tokens:
    count, _, width = hidden_T1D.shape
    is_bfloat16 = hidden_T1D.dtype == torch.bfloat16
    pointers = (t.data_ptr() for t in (hidden_T1D, out_T1D, norm.weight))
    return _Tokens(count, width, is_bfloat16, norm.eps, *pointers)


def _run(name: str, of: ctypes.Structure) -> None:
    call(name, ctypes.byref(of), torch.get_num_threads())


def mamba_layer(
    hidden_T1D: Tensor, norm: Any, mixer: Any, state: MambaState, new: NewTokens
) -> Tensor:
    """x + mixer(norm(x)), [T,1,D], and the states after the pass in `state`."""
    hidden_T1D = hidden_T1D.contiguous()
    (num_tokens, _, width), batch = hidden_T1D.shape, len(new.counts)
    mamba, inner = mixer.mamba, mixer.inner_width
    channels, taps = sum(mixer.conv_components), mixer.conv_weight.shape[1]
    out_T1D, window_BKC = torch.empty_like(hidden_T1D), state.window_BKC.contiguous()
    inputs_BWC = hidden_T1D.new_empty(batch, taps - 1 + new.most, channels)
    before_BHPN = after = state.ssm_BHPN.contiguous()
    if new.may_be_taken_back:
        after = torch.empty((new.most, *before_BHPN.shape), dtype=torch.float32)
    room = torch.empty(num_tokens * (width + 2 * inner + 2 * channels + mixer.num_heads))
    of = _Mamba(
        _tokens(hidden_T1D, out_T1D, norm),
        batch,
        new.most,
        new.starts.data_ptr(),
        mixer.num_heads,
        mamba.head_dim,
        mixer.num_groups,
        mamba.state_size,
        taps,
        mixer.in_proj.weight.data_ptr(),
        mixer.conv_weight.data_ptr(),
        mixer.conv_bias.data_ptr(),
        mixer.dt_bias.data_ptr(),
        mixer.A_log.data_ptr(),
        mixer.D.data_ptr(),
        mamba.dt_limit_min,
        mamba.dt_limit_max,
        mixer.norm.weight.data_ptr(),
        mixer.out_proj.weight.data_ptr(),
        window_BKC.data_ptr(),
        inputs_BWC.data_ptr(),
        before_BHPN.data_ptr(),
        after.data_ptr(),
        room.data_ptr(),
    )
    _run("mamba_decoding", of)
    state.take(inputs_BWC, new)
    state.ssm_BHPN = before_BHPN
    if new.may_be_taken_back:
        state.went_through(list(after), new)
    return out_T1D


def takes_mamba(norm: Any, mixer: Any) -> bool:
    """Whether `mamba_layer` computes this layer; its linears are the plain ones."""
    convolution = mixer.conv_weight, mixer.conv_bias
    weights = (
        norm.weight,
        mixer.in_proj.weight,
        *convolution,
        mixer.norm.weight,
        mixer.out_proj.weight,
    )
    narrow = (t.dtype == torch.float32 for t in (mixer.dt_bias, mixer.A_log, mixer.D))
    return takes_weights(weights) and all(narrow) and mixer.conv_weight.shape[1] <= _MAX_TAPS


def moe_layer(hidden_T1D: Tensor, norm: Any, moe: Any) -> Tensor:
    """x + moe(norm(x)), [T,1,D]."""
    hidden_T1D = hidden_T1D.contiguous()
    num_tokens, _, width = hidden_T1D.shape
    router, experts, shared = moe.router, moe.experts, moe.shared_experts
    weight1, weight2 = experts.linear_fc1.weight, experts.linear_fc2.weight
    num_experts, expert_width, _ = weight1.shape
    latent = moe.config.moe_latent_size or 0
    shared_width = shared.linear_fc1.weight.shape[0] if shared is not None else 0
    around = _pair(moe.fc1_latent_proj, moe.fc2_latent_proj) if latent else (None, None)
    beside = (None, None) if shared is None else _pair(shared.linear_fc1, shared.linear_fc2)
    choices, out_T1D = router.topk, torch.empty_like(hidden_T1D)
    one = 3 * width + num_experts + choices + shared_width + 2 * latent + choices * expert_width
    room, chosen = (
        torch.empty(num_tokens * one),
        torch.empty(num_tokens * choices, dtype=torch.int64),
    )
    of = _MoE(
        _tokens(hidden_T1D, out_T1D, norm),
        num_experts,
        choices,
        expert_width,
        latent,
        shared_width,
        router.weight.data_ptr(),
        router.expert_bias.data_ptr(),
        router.config.moe_router_topk_scaling_factor or 1.0,
        *beside,
        *around,
        weight1.data_ptr(),
        weight2.data_ptr(),
        room.data_ptr(),
        chosen.data_ptr(),
    )
    _run("moe_decoding", of)
    return out_T1D


def _pair(one: Any, other: Any) -> tuple[int, int]:
    return one.weight.data_ptr(), other.weight.data_ptr()


def takes_moe(norm: Any, moe: Any) -> bool:
    """Whether `moe_layer` computes this layer, all of whose experts are here; its linears are the
    plain ones."""
    linears = [moe.experts.linear_fc1, moe.experts.linear_fc2, moe.router]
    if moe.config.moe_latent_size:
        linears += [moe.fc1_latent_proj, moe.fc2_latent_proj]
    if moe.shared_experts is not None:
        linears += [moe.shared_experts.linear_fc1, moe.shared_experts.linear_fc2]
    bias = moe.router.expert_bias
    is_fit = bias is not None and bias.dtype == torch.float32 and len(bias) <= MAX_WIDTH
    return is_fit and takes_weights([norm.weight, *(linear.weight for linear in linears)])


def attention_layer(
    hidden_T1D: Tensor, norm: Any, attention: Any, cache: KeyValues, new: NewTokens
) -> Tensor:
    """x + attention(norm(x)), [T,1,D], the new keys and values written to `cache`."""
    hidden_T1D = hidden_T1D.contiguous()
    num_tokens, _, width = hidden_T1D.shape
    cache.make_room(new.longest_after)
    groups, queries, head_dim = _heads(attention)
    out_T1D, pieces = torch.empty_like(hidden_T1D), -(-new.longest_after // _PIECE)
    one = width + groups * (2 * queries + 2) * head_dim + groups * pieces * queries * (2 + head_dim)
    room = torch.empty(num_tokens * one)
    of = _Attention(
        _tokens(hidden_T1D, out_T1D, norm),
        groups,
        queries,
        head_dim,
        attention.linear_qkv.weight.data_ptr(),
        attention.linear_proj.weight.data_ptr(),
        cache.keys_BGLD.data_ptr(),
        cache.values_BGLD.data_ptr(),
        cache.keys_BGLD.shape[2],
        new.longest_after,
        new.row_T.data_ptr(),
        new.position_T.data_ptr(),
        room.data_ptr(),
    )
    _run("attention_decoding", of)
    return out_T1D


def _heads(attention: Any) -> tuple[int, int, int]:
    """Key/value heads, query heads over each, head dimension."""
    groups = attention.num_query_groups_per_partition
    queries = attention.num_attention_heads_per_partition // groups
    return groups, queries, attention.hidden_size_per_attention_head


def takes_attention(norm: Any, attention: Any) -> bool:
    """Whether `attention_layer` computes this layer; its linears are the plain ones."""
    weights = norm.weight, attention.linear_qkv.weight, attention.linear_proj.weight
    _, queries, head_dim = _heads(attention)
    return takes_weights(weights) and queries <= _MAX_QUERIES and head_dim <= _MAX_HEAD


def norm_rows(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """norm.rms_norm of [..., D] in the weight's type, contiguous; D is at most MAX_WIDTH."""
    out = torch.empty_like(x)
    width, is_bfloat16 = x.shape[-1], x.dtype == torch.bfloat16
    pointers = (t.data_ptr() for t in (x, out, weight_D))
    of = _Tokens(x.numel() // width, width, is_bfloat16, epsilon, *pointers)
    _run("norm_rows", of)
    return out


def few_rows(x_RD: Tensor, weight_FD: Tensor) -> Tensor:
    """x Wᵀ of a few rows in BF16, [R,D] -> [R,F], sums in FP32; D is at most MAX_WIDTH."""
    assert x_RD.dtype == weight_FD.dtype == torch.bfloat16
    wide_RD, room = x_RD.float().contiguous(), torch.empty(len(x_RD), len(weight_FD))
    y_RF = x_RD.new_empty(room.shape)
    rows, width, outputs = (ctypes.c_int64(size) for size in (*x_RD.shape, len(weight_FD)))
    inputs = *as_numbers(wide_RD), rows, width, as_pointer(weight_FD), outputs
    call("few_rows", *inputs, *as_numbers(room), as_pointer(y_RF), torch.get_num_threads())
    return y_RF
