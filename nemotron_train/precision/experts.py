"""Routed experts whose grouped products are computed in emulated block-scaled formats.

The weights, tokens and gradients of each expert are separate tensors, each with its own amax, as
in Transformer Engine's grouped linear. An expert's tokens are padded with zero rows to a multiple
of 32, so that they hold a whole number of blocks of every format.

Shapes: T tokens sorted by expert, P the same with padding, E experts, D expert input and output
width, F expert hidden width; N output and K input features of one of the two products.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_train.config.schema import GemmFormat
from nemotron_train.kernels.triton import available
from nemotron_train.model.moe.experts import ExpertWeights, GroupedExperts
from nemotron_train.model.moe.permutation import (
    permute,
    permute_probabilities,
    plan_permutation,
    unpermute,
)
from nemotron_train.precision import nvfp4
from nemotron_train.precision.gemm import Operand
from nemotron_train.precision.grouped import (
    ROW_MULTIPLE,
    Rows,
    grouped_outer_product,
    grouped_product,
    grouped_product_per_token,
    padded_rows,
)
from nemotron_train.precision.hadamard import hadamard
from nemotron_train.precision.linear import Attached, Dim, Role
from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.rounding import RandomWords


def _grouped_operand(
    attached: Attached,
    tensor: Tensor,
    form: GemmFormat,
    role: Role,
    dim: Dim,
    rows_E: Tensor,
    words: RandomWords | None = None,
) -> Operand:
    """Quantize E tensors, stacked along the rows of `tensor`, each separately."""
    if form == GemmFormat.mxfp8:
        operand = mxfp8_operand(tensor, dim=dim)
        return Operand(operand.values, operand.scale.expand(len(rows_E)), 1.0)
    if form == GemmFormat.nvfp4 and attached.has_per_token_scales(role, dim):
        return attached.per_token_operand(tensor)
    if form == GemmFormat.nvfp4:
        return nvfp4.nvfp4_operand(
            tensor,
            block="2d" if role == "w" and attached.formats.weight_2d else "1d",
            dim=dim,
            random_words=words,
            reduce_amax=attached.amax_reduction(role),
            rows_per_tensor=rows_E,
        )
    values = tensor if form == GemmFormat.float32 else tensor.bfloat16()
    return Operand(values, torch.ones(len(rows_E), device=tensor.device), 1.0)


class _GroupedProducts(torch.autograd.Function):
    """y_e = x_e W_e^T for every expert e. Each of the three products has its own format."""

    @staticmethod
    def forward(ctx, x_PK, weight_ENK, attached: Attached, rows: Rows, weights):
        form = attached.formats.fprop
        x = _grouped_operand(attached, x_PK, form, "x", -1, rows.per_expert_E)
        w = _weight_operand(weights, weight_ENK, attached, "fprop")
        ctx.save_for_backward(x_PK, weight_ENK)
        ctx.attached = attached
        ctx.rows = rows
        ctx.weights = weights
        ctx.call = attached.next_call()
        if attached.observer is not None:
            attached.observer.forward(attached, x_PK, weight_ENK, rows.on_host())
        if form == GemmFormat.nvfp4 and attached.has_per_token_scales("x", -1):
            return grouped_product_per_token(x, w, rows, x_PK)
        return grouped_product(x, w, w.values.transpose(1, 2), rows, x_PK)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x_PK, weight_ENK = ctx.saved_tensors
        dy_PN = grads[0].contiguous()
        if ctx.attached.observer is not None:
            ctx.attached.observer.backward(ctx.attached, dy_PN, ctx.call, ctx.rows.on_host())
        dx_PK = _input_gradient(ctx, dy_PN, x_PK, weight_ENK)
        dw_ENK = _weight_gradient(ctx, dy_PN, x_PK, weight_ENK)
        return dx_PK, dw_ENK, None, None, None


def _input_gradient(ctx, dy_PN: Tensor, x_PK: Tensor, weight_ENK: Tensor) -> Tensor:
    attached: Attached = ctx.attached
    formats, words = attached.formats, None
    if formats.dgrad == GemmFormat.nvfp4 and formats.stochastic_rounding:
        words = attached.random_words(dy_PN.shape, "dgrad", ctx.call)
    rows_E = ctx.rows.per_expert_E
    dy = _grouped_operand(attached, dy_PN, formats.dgrad, "dy", -1, rows_E, words)
    w = _weight_operand(ctx.weights, weight_ENK, attached, "dgrad")
    return grouped_product(dy, w, w.values, ctx.rows, x_PK)


def _weight_gradient(ctx, dy_PN: Tensor, x_PK: Tensor, weight_ENK: Tensor) -> Tensor:
    attached: Attached = ctx.attached
    formats, words = attached.formats, None
    if formats.wgrad == GemmFormat.nvfp4 and formats.hadamard:
        dy_PN, x_PK = hadamard(dy_PN, dim=0), hadamard(x_PK, dim=0)
    if formats.wgrad == GemmFormat.nvfp4 and formats.stochastic_rounding:
        words = attached.random_words(dy_PN.shape, "wgrad", ctx.call)
    rows_E = ctx.rows.per_expert_E
    dy = _grouped_operand(attached, dy_PN, formats.wgrad, "dy", 0, rows_E, words)
    x = _grouped_operand(attached, x_PK, formats.wgrad, "x", 0, rows_E)
    return grouped_outer_product(dy, x, ctx.rows, weight_ENK)


def _weight_operand(
    weights: ExpertWeights, weight_ENK: Tensor, attached: Attached, product: str
) -> Operand:
    """Quantized weights [E, N, K] of all experts, cached until the weights change; see
    `linear.weight_operand`.

    16 x 16 blocks serve both fprop and dgrad. 1-D blocks run along K for fprop, along N for dgrad.
    """
    formats = attached.formats
    form = formats.fprop if product == "fprop" else formats.dgrad
    is_2d = form == GemmFormat.nvfp4 and formats.weight_2d
    dim: Dim = -1 if is_2d or product == "fprop" or not form.is_block_scaled else 0
    key = (form, dim, attached.clock.weights_version)
    cache: dict = weights.__dict__.setdefault("_quantized_weight", {})
    if key not in cache:
        for stale in [stale for stale in cache if stale[2] != key[2]]:
            del cache[stale]
        num_experts, num_outputs, _ = weight_ENK.shape
        padded_ENK = weight_ENK.detach()
        if num_outputs % ROW_MULTIPLE:  # a block must not span two experts
            padded_ENK = F.pad(padded_ENK, (0, 0, 0, -num_outputs % ROW_MULTIPLE))
        rows_E = torch.full((num_experts,), padded_ENK.shape[1], device=weight_ENK.device)
        stacked = _grouped_operand(attached, padded_ENK.flatten(0, 1), form, "w", dim, rows_E)
        values_ENK = stacked.values.view_as(padded_ENK)[:, :num_outputs]
        cache[key] = replace(stacked, values=values_ENK)
    return cache[key]


class _SquaredRelu(torch.autograd.Function):
    """relu(h)^2 times the routing weight, in FP32 and rounded once, as in unquantized experts."""

    @staticmethod
    def forward(ctx, hidden_PF: Tensor, probabilities_P: Tensor) -> Tensor:
        relu_PF = hidden_PF.clamp(min=0)
        ctx.save_for_backward(relu_PF, probabilities_P)
        active_PF = relu_PF.float().square_().mul_(probabilities_P.unsqueeze(1))
        return active_PF.to(hidden_PF.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        relu_PF, probabilities_P = ctx.saved_tensors
        relu_fp32_PF = relu_PF.float()
        # With a = p r^2: dp = sum over F of r^2 da, dh = 2 p r da; both share r da.
        grad_PF = relu_fp32_PF * grads[0]
        grad_p_P = relu_fp32_PF.mul_(grad_PF).sum(-1)
        grad_h_PF = grad_PF.mul_((2 * probabilities_P).unsqueeze(1))
        return grad_h_PF.to(relu_PF.dtype), grad_p_P.to(probabilities_P.dtype)


class EmulatedExperts(GroupedExperts):
    """Experts with Megatron's interface. Their grouped products are emulated once a plan is
    attached to `linear_fc1` and `linear_fc2`."""

    only_products = False

    def _emulates(self) -> bool:
        linears = (self.linear_fc1, self.linear_fc2)
        attached = [getattr(weights, "attached", None) for weights in linears]
        return any(a is not None and a.quantizes for a in attached)

    def _is_observed(self) -> bool:
        attached = getattr(self.linear_fc1, "attached", None)
        return attached is not None and attached.observer is not None

    def forward(
        self,
        tokens_TD: Tensor,
        tokens_per_expert_E: Tensor,
        probabilities_T: Tensor,
    ) -> tuple[Tensor, None]:
        """tokens_TD sorted by expert, with their routing weights -> ([T, D], no bias)."""
        if self._emulates():
            return self._products(tokens_TD, tokens_per_expert_E, probabilities_T), None
        y_TD, _ = super().forward(tokens_TD, tokens_per_expert_E, probabilities_T)
        if self._is_observed():
            _observe_unquantized(
                y_TD, self._products, tokens_TD, tokens_per_expert_E, probabilities_T
            )
        return y_TD, None

    def _products(
        self, tokens_TD: Tensor, tokens_per_expert_E: Tensor, probabilities_T: Tensor
    ) -> Tensor:
        rows, rows_T = padded_rows(tokens_per_expert_E, tokens_TD)
        x_PD = tokens_TD.new_zeros(rows.total, tokens_TD.shape[1])
        x_PD = x_PD.index_copy(0, rows_T, tokens_TD)
        p_P = probabilities_T.new_zeros(rows.total).index_copy(0, rows_T, probabilities_T)
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        hidden_PF = _GroupedProducts.apply(x_PD, fc1.weight, fc1.attached, rows, fc1)
        active_PF = _SquaredRelu.apply(hidden_PF, p_P)
        y_PD = _GroupedProducts.apply(active_PF, fc2.weight, fc2.attached, rows, fc2)
        return y_PD.index_select(0, rows_T)

    def routed(self, tokens_TD: Tensor, experts_TK: Tensor, probabilities_TK: Tensor) -> Tensor:
        """Weighted sum over each token's experts -> [T, D]. All experts are on this rank."""
        if self._emulates():
            return self._routed_products(tokens_TD, experts_TK, probabilities_TK)
        y_TD = super().routed(tokens_TD, experts_TK, probabilities_TK)
        if self._is_observed():
            _observe_unquantized(
                y_TD, self._routed_products, tokens_TD, experts_TK, probabilities_TK
            )
        return y_TD

    def _routed_products(
        self, tokens_TD: Tensor, experts_TK: Tensor, probabilities_TK: Tensor
    ) -> Tensor:
        is_grouped = available.can_use(tokens_TD)
        permutation = plan_permutation(experts_TK, self.num_local_experts, is_grouped=is_grouped)
        rows = self._products(
            permute(tokens_TD, permutation),
            permutation.tokens_per_expert_E,
            permute_probabilities(probabilities_TK, permutation),
        )
        return unpermute(rows, permutation)


def _observe_unquantized(y: Tensor, products: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compute unquantized experts a second time for their observer. Training uses only y.

    The plain computation exposes neither the hidden activations nor their gradients.
    """
    copies = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    if not y.requires_grad:
        products(*copies)
        return
    with torch.enable_grad():
        observed_y = products(*copies)
    differentiable = [copy for copy in copies if copy.requires_grad]

    def observe_gradients(dy: Tensor) -> None:
        torch.autograd.grad(observed_y, differentiable, dy)

    y.register_hook(observe_gradients)
