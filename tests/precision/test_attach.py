"""Plans attached to a built model, and the three products of emulated linears and experts.

Second truth: the same products computed here, expert by expert, from packed codes
(`quantize_nvfp4`, which the golden vectors check). One rank only. Not covered: the amax reductions
between shards, any GPU.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemotron_train.assemble.build import build_model
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.schema import GemmFormat
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device
from nemotron_train.precision.attach import PrecisionControl, global_modules
from nemotron_train.precision.experts import EmulatedExperts
from nemotron_train.precision.gemm import block_scaled_matmul
from nemotron_train.precision.hadamard import hadamard
from nemotron_train.precision.linear import Attached, EmulatedColumnParallelLinear
from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.nvfp4 import quantize_nvfp4
from nemotron_train.precision.rounding import RandomWords

PLANS = ["nvfp4_nemotron3", "nvfp4_all", "mxfp8", "nvfp4_bf16_forward"]


def build(groups, *overrides: str):
    config = compose_config(list(overrides))
    model = build_model(config, resolve_plan(config), device.prepare(), groups)
    return config, model, PrecisionControl([model], config, resolve_plan(config), groups)


@pytest.mark.parametrize("plan", PLANS)
def test_modules_carry_the_plan(plan: str, groups) -> None:
    config, _model, control = build(groups, f"precision={plan}")
    wanted = resolve_plan(config).at(0).formats
    carried = control.attached()
    emulated = {path for path in wanted if path not in ("output_layer",) and "router" not in path}
    assert set(carried) == emulated
    assert all(carried[path] == wanted[path] for path in carried)


@pytest.mark.parametrize("plan", ["fp32", "bf16"])
def test_plain_plans_take_plain_layers(plan: str, groups) -> None:
    config, model, _ = build(groups, f"precision={plan}")
    assert not resolve_plan(config).is_quantized
    plain = (EmulatedColumnParallelLinear, EmulatedExperts)
    assert not any(isinstance(module, plain) for module in model.modules())


def linear_under(groups, **changes: object):
    """A column-parallel linear (Mamba's in_proj) with the formats changed, its control and its
    inputs."""
    _, model, control = build(groups, "precision=nvfp4_all")
    linear = global_modules(model)["decoder.layers.0.mixer.in_proj"]
    linear.attached.formats = replace(linear.attached.formats, **changes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 192, generator=generator).bfloat16().requires_grad_()
    return linear, control, x


def products(linear, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y, _ = linear(x)
    dx, dw = torch.autograd.grad(y, [x, linear.weight], dy)
    return [y.flatten(0, 1), dx.flatten(0, 1), dw]


def test_nvfp4_products_of_a_linear(groups) -> None:
    """Nearest rounding: fprop, dgrad and wgrad equal products of packed tensors bit for bit."""
    linear, _, x = linear_under(groups, stochastic_rounding=False)
    dy = torch.randn(40, 1, linear.weight.shape[0], generator=torch.Generator().manual_seed(1))
    dy = dy.bfloat16()
    y, dx, dw = products(linear, x, dy)
    x_TK, dy_TN, w = x.detach().flatten(0, 1), dy.flatten(0, 1), linear.weight.detach()
    w_op = quantize_nvfp4(w, block="2d").operand()
    assert torch.equal(y, block_scaled_matmul(quantize_nvfp4(x_TK).operand(), w_op))
    assert torch.equal(dx, block_scaled_matmul(quantize_nvfp4(dy_TN).operand(), w_op.t()))
    padded = [torch.nn.functional.pad(t, (0, 0, 0, 8)) for t in (dy_TN, x_TK)]
    rotated = [quantize_nvfp4(hadamard(t, dim=0).t().contiguous()).operand() for t in padded]
    assert torch.equal(dw, block_scaled_matmul(*rotated))


def test_mxfp8_and_mixed_products(groups) -> None:
    """BF16 forward with MXFP8 gradients: each product in its own format."""
    linear, _, x = linear_under(
        groups, fprop=GemmFormat.bf16, dgrad=GemmFormat.mxfp8, wgrad=GemmFormat.mxfp8
    )
    dy = torch.randn(40, 1, linear.weight.shape[0]).bfloat16()
    y, dx, dw = products(linear, x, dy)
    x_TK, dy_TN, w = x.detach().flatten(0, 1), dy.flatten(0, 1), linear.weight.detach()
    torch.testing.assert_close(y, x_TK @ w.t(), rtol=1e-2, atol=1e-4)
    blocks = mxfp8_operand(w, dim=0).t()
    assert torch.equal(dx, block_scaled_matmul(mxfp8_operand(dy_TN), blocks))
    sides = [mxfp8_operand(t, dim=0).t() for t in (dy_TN, x_TK)]
    assert torch.equal(dw, block_scaled_matmul(*sides))


def test_stochastic_rounding_follows_the_clock(groups) -> None:
    """The same step and call give the same gradients. Another step gives different gradients from
    the same forward pass."""
    linear, control, x = linear_under(groups)
    dy = torch.randn(40, 1, linear.weight.shape[0]).bfloat16()
    control.clock.step = 5
    first = products(linear, x, dy)
    linear.attached.calls.clear()
    again = products(linear, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    control.clock.step = 6
    other = products(linear, x, dy)
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_dgrad_and_wgrad_round_by_words_of_their_own(groups) -> None:
    """Shared random words would correlate the rounding errors of dx and dW."""
    linear, control, x = linear_under(groups)
    control.clock.step = 3
    shape = (256, 64)
    words = {product: linear.attached.random_words(shape, product, 0) for product in PRODUCTS}
    drawn = {product: source.draw(shape) for product, source in words.items()}
    assert words["dgrad"].stream != words["wgrad"].stream
    same = (drawn["dgrad"] == drawn["wgrad"]).float().mean()
    # Equal bytes by chance: 1 / 256, with a deviation of sqrt(1 / 256 / n) over n elements.
    assert abs(float(same) - 1 / 256) < 5 * (1 / 256 / (256 * 64)) ** 0.5
    # The products request their words under those names.
    seen: list[str] = []
    draw = type(linear.attached).random_words

    def recorded(attached, shape, product, call):
        seen.append(product)
        return draw(attached, shape, product, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(linear.attached), "random_words", recorded)
        products(linear, x, torch.randn(40, 1, linear.weight.shape[0]).bfloat16())
    assert sorted(seen) == ["dgrad", "wgrad"]


def test_no_two_roundings_of_a_step_share_words(groups) -> None:
    """Linears and experts, both gradient products of each, every prediction depth, two
    micro-batches. Words that two tensors share would correlate their rounding errors, and the sum
    of a gradient over micro-batches would not average them out. One rank; the positions of shards
    are in tests/distributed."""
    _, model, control = build(groups, "precision=nvfp4_all", "model.mtp.depths=2")
    control.clock.step = 4
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (1, 32), generator=generator)
    batch = {"labels_BS": tokens, "loss_mask_BS": torch.ones(1, 32)}
    batch["document_ids_BS"] = torch.zeros(1, 32, dtype=torch.int64)
    drawn: list[RandomWords] = []
    draw = Attached.random_words

    def recorded(attached: Attached, *arguments: Any) -> RandomWords:
        drawn.append(draw(attached, *arguments))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attached, "random_words", recorded)
        for _ in range(2):
            model(tokens, **batch).sum().backward()
    linears = control.attached()
    assert any(path.endswith("experts.linear_fc1") for path in linears)
    inside = sum(path.startswith("mtp.") for path in linears)
    # Two products of each linear and micro-batch; the prediction block runs once a depth.
    assert len(drawn) == 2 * 2 * (len(linears) + inside)
    assert {words.step for words in drawn} == {4}
    assert len({words.stream for words in drawn}) == len(drawn)


def test_weights_are_quantized_again_when_they_change(groups) -> None:
    linear, control, x = linear_under(groups)
    before, _ = linear(x)
    with torch.no_grad():
        linear.weight.mul_(2)
    control.weights_changed()
    after, _ = linear(x)
    assert torch.equal(after, 2 * before), "a power of two leaves the codes as they are"


PRODUCTS = ("dgrad", "wgrad")

EXPERT_OPERANDS = {
    # Operand of a tensor along its rows, of a weight for fprop, of a weight for dgrad.
    "nvfp4_all": (
        lambda t: quantize_nvfp4(t).operand(),
        lambda w: quantize_nvfp4(w, block="2d").operand(),
        lambda w: quantize_nvfp4(w, block="2d").operand().t(),
    ),
    "mxfp8": (mxfp8_operand, mxfp8_operand, lambda w: mxfp8_operand(w, dim=0).t()),
}


def same(ours: torch.Tensor, one: torch.Tensor) -> None:
    """Equal up to one step of BF16. On a processor without BF16 instructions products go through
    FP32, whose library may sum a group and a single matrix in different orders. A wrong block scale
    is off by a factor of 2 or more."""
    torch.testing.assert_close(ours, one, rtol=2.0**-7, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("plan", EXPERT_OPERANDS)
@pytest.mark.parametrize("width, hidden_width", [(64, 128), (24, 40)])
def test_experts_equal_one_linear_each(plan: str, width: int, hidden_width: int, groups) -> None:
    """Grouped products against each expert alone, an empty one included, with nearest rounding.
    Covers sizes that no block divides: a block must not reach into the next expert."""
    sizes = [f"model.moe.latent_size={width}", f"model.moe.expert_hidden_size={hidden_width}"]
    _, model, _ = build(groups, f"precision={plan}", *sizes)
    experts = global_modules(model)["decoder.layers.1.mlp.experts"]
    for weights in (experts.linear_fc1, experts.linear_fc2):
        weights.attached.formats = replace(weights.attached.formats, stochastic_rounding=False)
        with torch.no_grad():  # a block across two experts would flush one to zero
            weights.weight[::2] *= 2.0**-20
    counts = torch.tensor([5, 0, 37, 32] + [1] * 12)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(int(counts.sum()), width, generator=generator).bfloat16().requires_grad_()
    rows, weight, weight_dgrad = EXPERT_OPERANDS[plan]
    p = torch.rand(len(x), generator=generator)
    y, _ = experts(x, counts, p)
    dy = torch.randn(y.shape, generator=generator).bfloat16()
    (dx,) = torch.autograd.grad(y, x, dy)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        part = slice(start, start + count)
        start += count
        if not count:
            continue
        w1, w2 = (
            weights.weight.detach()[expert] for weights in (experts.linear_fc1, experts.linear_fc2)
        )
        hidden = block_scaled_matmul(rows(x.detach()[part]), weight(w1)).requires_grad_()
        active = (torch.relu(hidden).float().square() * p[part, None]).bfloat16()
        same(y[part], block_scaled_matmul(rows(active.detach()), weight(w2)))
        grad_active = block_scaled_matmul(rows(dy[part]), weight_dgrad(w2))
        (grad_hidden,) = torch.autograd.grad(active, hidden, grad_active)
        grad = block_scaled_matmul(rows(grad_hidden), weight_dgrad(w1))
        same(dx[part], grad)


def test_phase_begins_with_its_step(groups) -> None:
    phases = "precision.phases=[{from_tokens: 4096, at_least: {fprop: bf16}}]"
    _, _, control = build(groups, "precision=nvfp4_all", phases)
    path = "decoder.layers.0.mixer.in_proj"
    assert not control.before_step(0, 0)
    assert control.attached()[path].fprop == "nvfp4"
    assert control.before_step(2, 4096)
    assert control.attached()[path].fprop == "bf16"
    assert control.attached()[path].dgrad == "nvfp4"
    assert not control.before_step(3, 6144)
