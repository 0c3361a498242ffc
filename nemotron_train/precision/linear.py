"""Linears whose three products are computed in emulated block-scaled formats, on any device.

Owns: how each operand of each product is quantized (the training recipe of arXiv 2509.25149 and
Transformer Engine's NVFP4BlockScaling), also under tensor and sequence parallelism. Does not own:
the numerics (`nvfp4`, `mxfp8`, `gemm`), which format a linear gets (`plan`), experts
(`precision.experts`). Never imports Transformer Engine.

    fprop  y  = x  w^T    x along K, nearest; w in 16 x 16 blocks, nearest
    dgrad  dx = dy w      dy along N, stochastic; the same w blocks
    wgrad  dw = dy^T x    both along T, after a Hadamard transform; dy stochastic

A tensor that is sharded over tensor- or context-parallel ranks uses the amax of all its shards, so
its codes do not depend on the layout if shards are multiples of a block. (Transformer Engine
reduces the amax only where sequence parallelism splits a tensor, and scales other shards
separately.)
A random word depends on its position in the whole tensor and on the number of the micro-batch
within the step, so random words do not depend on the layout either. Two exceptions: Mamba's input
projection, whose columns are packed rank by rank, and experts, whose tensors hold the tokens that
were dispatched to a rank.

Shapes: T tokens, K input features, N output features, all local to this rank.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from nemotron_train.config.schema import GemmFormat
from nemotron_train.model.linears import ReplicatedLinear
from nemotron_train.plan.precision.resolve import LinearFormats
from nemotron_train.precision import nvfp4
from nemotron_train.precision.gemm import Operand, block_scaled_matmul
from nemotron_train.precision.hadamard import hadamard
from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.rounding import RandomWords

Role = Literal["x", "w", "dy"]
Dim = Literal[-1, 0]
Cut = Literal["", "inputs", "outputs", "tokens"]


@dataclass
class RoundingClock:
    """State of a process that all its linears share and that quantization depends on.

    seed: the run's seed. step: the optimizer step being computed. weights_version: counts changes
    of the weights; a linear caches its quantized weight until the version changes.
    per_token_scales: forward products use one NVFP4 tensor scale per token instead of one for all
    tokens of the forward pass, so a token's result does not depend on the other tokens.
    """

    seed: int = 0
    step: int = 0
    weights_version: int = 0
    per_token_scales: bool = False


class Observer(Protocol):
    """Receives the operands of a linear on the steps that telemetry measures. `rows`: number of
    rows of each expert, if tensors are stacked along the rows."""

    def forward(
        self, attached: "Attached", x: Tensor, weight: Tensor, rows: list[int] | None = None
    ) -> None: ...

    def backward(
        self, attached: "Attached", dy: Tensor, call: int, rows: list[int] | None = None
    ) -> None: ...


@dataclass
class Attached:
    """The part of a precision plan that is attached to one linear.

    shards: the tensor-parallel group. `cut` says what it shards: the weight along its inputs (row
    parallel) or outputs (column parallel), or the tokens, with the weight whole (latent projections
    under sequence parallelism). context: the context-parallel group, over which the sequence is
    sharded first; None for experts. first_call: number of calls within a step on all data-parallel
    ranks before this one. part: index of this set of experts among those that share a path.
    calls: {current step: number of forward calls so far}.
    """

    path: str
    formats: LinearFormats
    clock: RoundingClock
    shards: dist.ProcessGroup | None = None
    cut: Cut = ""
    context: dist.ProcessGroup | None = None
    first_call: int = 0
    part: int = 0
    calls: dict[int, int] = field(default_factory=dict)
    observer: Observer | None = None

    @property
    def quantizes(self) -> bool:
        """Whether any product is in a block-scaled format; if none, the linear runs unchanged."""
        return self.formats.is_quantized

    def next_call(self) -> int:
        """Number (from 0) of this forward call within the step on this rank, counting micro-batches
        and multi-token-prediction depths together."""
        step = self.clock.step
        call = self.calls.get(step, 0)
        self.calls = {step: call + 1}
        return call

    def random_words(self, shape: tuple[int, ...], product: str, call: int) -> RandomWords:
        """Random words for this rank's part, of `shape`, of a gradient [T, N].

        They depend on the path, the product, the number of the call among all data-parallel ranks,
        and the row and column in the whole gradient.
        """
        shard = self.shards.rank() if self.shards is not None else 0
        row_shard = self.context.rank() if self.context is not None else 0
        if self.cut == "tokens" and self.shards is not None:
            row_shard = row_shard * self.shards.size() + shard
        name = f"{self.path}/{product}/{self.first_call + call}/{self.part}"
        return RandomWords(
            seed=self.clock.seed,
            stream=zlib.crc32(name.encode()),
            step=self.clock.step,
            row_offset=row_shard * shape[0],
            column_offset=shard * shape[1] if self.cut == "outputs" else 0,
        )

    def words(self, shape: torch.Size, product: str, call: int, device: torch.device) -> Tensor:
        """The `random_words` of a gradient of this shape, drawn: uint8 of `shape`."""
        return self.random_words(shape, product, call).draw(shape, device)

    def is_cut(self, role: Role) -> bool:
        """Whether this tensor-parallel rank holds only a shard of the tensor.

        Sharded are: the weight and the inputs of a row-parallel linear; the weight and the output
        gradients of a column-parallel one; inputs and output gradients if tokens are sharded.
        """
        if self.shards is None or self.shards.size() == 1 or not self.cut:
            return False
        if self.cut == "tokens":
            return role != "w"
        return role == "w" or role == ("x" if self.cut == "inputs" else "dy")

    def amax_reduction(self, role: Role) -> nvfp4.ReduceAmax | None:
        """A function from this rank's amax to the amax of the whole tensor (COLLECTIVE); None if
        this rank holds the whole tensor."""
        groups = []
        if self.is_cut(role) and self.shards is not None:
            groups.append(self.shards)
        if role != "w" and self.context is not None and self.context.size() > 1:
            groups.append(self.context)
        return partial(_largest_over, groups) if groups else None

    def operand(
        self,
        tensor: Tensor,
        form: GemmFormat,
        role: Role,
        dim: Dim,
        words: RandomWords | None = None,
    ) -> Operand:
        """Quantize `tensor` [rows, columns] to format `form`, blocks along `dim`. COLLECTIVE if the
        tensor is sharded and `form` is NVFP4. BF16 and FP32 operands get scale 1."""
        if form == GemmFormat.mxfp8:
            return mxfp8_operand(tensor, dim=dim)
        if form == GemmFormat.nvfp4 and self.has_per_token_scales(role, dim):
            return self.per_token_operand(tensor)
        if form == GemmFormat.nvfp4:
            return nvfp4.nvfp4_operand(
                tensor,
                block="2d" if role == "w" and self.formats.weight_2d else "1d",
                dim=dim,
                random_words=words,
                reduce_amax=self.amax_reduction(role),
            )
        values = tensor if form == GemmFormat.float32 else tensor.bfloat16()
        return Operand(values, torch.ones((), device=tensor.device), 1.0)

    def has_per_token_scales(self, role: Role, dim: Dim) -> bool:
        """Whether NVFP4 scales each row of this operand as a separate tensor."""
        return self.clock.per_token_scales and role == "x" and dim == -1

    def per_token_operand(self, x_TK: Tensor) -> Operand:
        """NVFP4 operand with one amax per token; its scale is [T]. COLLECTIVE if the features of a
        token are sharded. Only tensor-parallel ranks shard them, context-parallel ranks do not."""
        shards = self.shards if self.cut == "inputs" else None
        groups = [shards] if shards is not None and shards.size() > 1 else []
        return nvfp4.nvfp4_operand(
            x_TK,
            reduce_amax=partial(_largest_over, groups) if groups else None,
            rows_per_tensor=torch.ones(x_TK.shape[0], dtype=torch.int64, device=x_TK.device),
        )


def _largest_over(groups: Sequence[dist.ProcessGroup], amax: Tensor) -> Tensor:
    for group in groups:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    return amax


def pad_tokens(x_TC: Tensor) -> Tensor:
    """Append zero rows up to a multiple of 16. Both operands of a weight gradient get the same
    padding, and zero rows add nothing to their product."""
    missing = -x_TC.shape[0] % nvfp4.BLOCK
    return F.pad(x_TC, (0, 0, 0, missing)) if missing else x_TC


class _Products(torch.autograd.Function):
    """y = x w^T. Each of the three products has its own format."""

    @staticmethod
    def forward(ctx, x_TK: Tensor, weight_NK: Tensor, attached: Attached, linear) -> Tensor:
        form = attached.formats.fprop
        w = weight_operand(linear, weight_NK, attached, "fprop")
        x = attached.operand(x_TK, form, "x", -1)
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.attached, ctx.linear = attached, linear
        ctx.call = attached.next_call()
        if attached.observer is not None:
            attached.observer.forward(attached, x_TK, weight_NK)
        return block_scaled_matmul(x, w, out_dtype=x_TK.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TK, weight_NK = ctx.saved_tensors
        attached: Attached = ctx.attached
        dy_TN = grads[0].contiguous()
        if attached.observer is not None:
            attached.observer.backward(attached, dy_TN, ctx.call)
        dx_TK = dw_NK = None
        if ctx.needs_input_grad[0]:
            w = weight_operand(ctx.linear, weight_NK, attached, "dgrad")
            dy = _gradient_operand(attached, dy_TN, "dgrad", ctx.call, dim=-1)
            dx_TK = block_scaled_matmul(dy, w.t(), out_dtype=x_TK.dtype)
        if ctx.needs_input_grad[1]:
            dw_NK = _weight_gradient(attached, dy_TN, x_TK, ctx.call, weight_NK.dtype)
        return dx_TK, dw_NK, None, None


def _gradient_operand(
    attached: Attached, dy_TN: Tensor, product: str, call: int, dim: Dim
) -> Operand:
    formats = attached.formats
    form = formats.dgrad if product == "dgrad" else formats.wgrad
    words = None
    if form == GemmFormat.nvfp4 and formats.stochastic_rounding:
        words = attached.random_words(dy_TN.shape, product, call)
    return attached.operand(dy_TN, form, "dy", dim, words)


def _weight_gradient(
    attached: Attached, dy_TN: Tensor, x_TK: Tensor, call: int, dtype: torch.dtype
) -> Tensor:
    formats = attached.formats
    if formats.wgrad == GemmFormat.nvfp4 and formats.hadamard:
        dy_TN = hadamard(pad_tokens(dy_TN), dim=0)
        x_TK = hadamard(pad_tokens(x_TK), dim=0)
    dy = _gradient_operand(attached, dy_TN, "wgrad", call, dim=0)
    x = attached.operand(x_TK, formats.wgrad, "x", 0)
    return block_scaled_matmul(dy.t(), x.t(), out_dtype=dtype)


def weight_operand(linear: torch.nn.Module, weight: Tensor, attached: Attached, product: str):
    """The quantized weight, cached until the weights change. `product`: "fprop" or "dgrad".

    fprop sums over the inputs, dgrad over the outputs. 16 x 16 blocks serve both. Other formats
    are quantized once along each dimension, both times from the high-precision weight.
    """
    formats = attached.formats
    form = formats.fprop if product == "fprop" else formats.dgrad
    is_2d = form == GemmFormat.nvfp4 and formats.weight_2d
    dim: Dim = -1 if is_2d or product == "fprop" else 0
    key = (form, dim if form.is_block_scaled else -1, attached.clock.weights_version)
    cache: dict = linear.__dict__.setdefault("_quantized_weight", {})
    if key not in cache:
        for stale in [stale for stale in cache if stale[2] != key[2]]:
            del cache[stale]
        cache[key] = attached.operand(weight.detach(), form, "w", dim)
    return cache[key]


class _GatherSequence(torch.autograd.Function):
    """All-gather a sequence-parallel input; reduce-scatter its gradient. COLLECTIVE."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        local_grad = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(local_grad, grad, group=ctx.group)
        return local_grad, None


class _CopyToShards(torch.autograd.Function):
    """Identity; the backward pass sums the gradient over the tensor-parallel group. COLLECTIVE."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _multiply(linear: torch.nn.Module, x: Tensor, weight: Tensor, attached: Attached) -> Tensor:
    """[..., K] -> [..., N] through `_Products`."""
    flat = _Products.apply(x.reshape(-1, x.shape[-1]), weight, attached, linear)
    return flat.view(*x.shape[:-1], -1)


def observe_plain(attached: Attached, y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Pass the operands of an unquantized product y = x w^T to the observer, if there is one, and
    its dy during the backward pass."""
    observer = attached.observer
    if observer is None:
        return
    call = attached.next_call()
    observer.forward(attached, x.detach().reshape(-1, x.shape[-1]), weight.detach())
    if y.requires_grad:
        y.register_hook(lambda dy: observer.backward(attached, dy.reshape(-1, dy.shape[-1]), call))


class EmulatedColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear. Its products are emulated once a plan is attached."""

    attached: Attached | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any):
        attached = self.attached
        if attached is None or not attached.quantizes:
            y = super()._forward_impl(input, weight, *args, **kwargs)
            if attached is not None and attached.observer is not None:
                split = kwargs.get("sequence_parallel")
                x = _GatherSequence.apply(input.detach(), self.tp_group) if split else input
                observe_plain(attached, y, x, weight)
            return y
        if kwargs.get("sequence_parallel"):
            input = _GatherSequence.apply(input, self.tp_group)
        elif kwargs.get("allreduce_dgrad"):
            input = _CopyToShards.apply(input, self.tp_group)
        return _multiply(self, input, weight, attached)


class EmulatedRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel linear. Its products are emulated once a plan is attached; Megatron
    sums over ranks, in high precision."""

    attached: Attached | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any):
        attached = self.attached
        if attached is None or not attached.quantizes:
            y = super()._forward_impl(input, weight, *args, **kwargs)
            if attached is not None:
                observe_plain(attached, y, input, weight)
            return y
        return _multiply(self, input, weight, attached)


class EmulatedReplicatedLinear(ReplicatedLinear):
    """A latent projection with the whole weight on every tensor-parallel rank. Each rank multiplies
    its own tokens; the products are emulated once a plan is attached."""

    attached: Attached | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., K] -> ([..., N], no bias)."""
        if self.attached is None or not self.attached.quantizes:
            y, _ = super().forward(x)
            if self.attached is not None:
                observe_plain(self.attached, y, x, self.weight)
            return y, None
        return _multiply(self, x, self.weight, self.attached), None
