"""Layers with the constructors and state of the real ones, computed by PyTorch."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class _Module(nn.Module):
    """The state of the real base class: whether the last forward pass was quantized, and how."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8, self.fp8_calibration = False, False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.save_original_input = False  # set by Megatron on the shared experts

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        if self.fp8:
            self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("no checkpoint of ours holds an extra state")


def _weight(out_size: int, in_size: int, device: Any, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(out_size, in_size, device=device, dtype=dtype))


class _AddingProduct(torch.autograd.Function):
    """x W^T whose backward pass adds the weight gradient to `weight.main_grad`, as the real one
    does under `fuse_wgrad_accumulation`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        ctx.weight.main_grad += dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        ctx.weight.grad_added_to_main_grad = True
        return dy @ weight, torch.empty_like(weight)  # the gradient has no meaning


def _product(x: Tensor, weight: Tensor, fuses: bool) -> Tensor:
    return _AddingProduct.apply(x, weight) if fuses else F.linear(x, weight)  # type: ignore[return-value]


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        device: Any,
        parallel_mode: str | None,
        bias: bool,
        tp_size: int,
        fuse_wgrad_accumulation: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not bias
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.in_features, self.out_features = in_features, out_features
        self.weight = _weight(out_features, in_features, device, params_dtype)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        self.init_fp8_metadata()
        return _product(x, self.weight, self.fuse_wgrad_accumulation)


class LayerNormLinear(Linear):
    """An RMS norm and a linear in one module."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        params_dtype: torch.dtype,
        device: Any,
        sequence_parallel: bool,
        **options: Any,
    ) -> None:
        super().__init__(
            in_features, out_features, params_dtype=params_dtype, device=device, **options
        )
        assert normalization == "RMSNorm"
        self.eps = eps
        scale = torch.empty(in_features, dtype=params_dtype, device=device)
        self.layer_norm_weight = nn.Parameter(scale)
        self.layer_norm_weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class LayerNorm(nn.Module):
    """Megatron refers to it. Nemotron 3 does not use it."""


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        params_dtype: torch.dtype,
        device: Any,
        bias: bool,
        tp_size: int,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        self.in_features, self.out_features = in_features, out_features
        for index in range(num_gemms):
            weight = _weight(out_features, in_features, device, params_dtype)
            self.register_parameter(f"weight{index}", weight)

    def forward(
        self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor:
        self.init_fp8_metadata(self.num_gemms)
        if self.fp8:
            assert all(split % 32 == 0 for split in m_splits), m_splits
        parts = [
            F.linear(part, self.get_parameter(f"weight{index}"))
            for index, part in enumerate(x.split(m_splits))
        ]
        return torch.cat(parts)


class Fp8Padding(nn.Module):
    """Instantiated by Megatron's grouped experts. The dispatcher pads instead."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()


class Fp8Unpadding(Fp8Padding):
    """Instantiated by Megatron's grouped experts, like Fp8Padding."""


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        *,
        sequence_parallel: bool,
        params_dtype: torch.dtype,
        device: Any,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DotProductAttention(nn.Module):
    """Causal attention of concatenated documents: [tokens, heads, channels]."""

    def __init__(self, **unused: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, cu_seqlens_q: Tensor, **__: Any
    ) -> Tensor:
        ends = cu_seqlens_q.tolist()
        rows = [
            F.scaled_dot_product_attention(
                *(x[start:end].transpose(0, 1)[None] for x in (query, key, value)),
                is_causal=True,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for start, end in pairwise(ends)
        ]
        return torch.cat(rows).flatten(1)
