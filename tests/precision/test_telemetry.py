"""The counts of telemetry against quantization element by element from the formats' definitions.

Second truth: NumPy and tables of the E2M1 and E4M3 numbers, one block at a time. For a whole model,
the operands are built here. Not covered: several ranks (tests/distributed), a GPU.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_train.assemble.build import build_model, wrap_data_parallel
from nemotron_train.compose.compose import compose_config
from nemotron_train.config.errors import ConfigError
from nemotron_train.optim.gradients import count_zeros
from nemotron_train.plan.precision.resolve import resolve_plan
from nemotron_train.platform import device
from nemotron_train.precision.attach import PrecisionControl, global_modules
from nemotron_train.precision.experts import EmulatedExperts
from nemotron_train.precision.hadamard import hadamard_matrix
from nemotron_train.precision.linear import EmulatedColumnParallelLinear
from nemotron_train.precision.telemetry import Telemetry, measure_mxfp8, measure_nvfp4
from nemotron_train.precision.telemetry_record import NUM_COUNTS, OPERANDS, operand_numbers

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
)


def nearest(value: float, table: np.ndarray) -> float:
    """Ties go to the even code. Values beyond the table become its largest."""
    gaps = np.abs(table - min(value, table[-1]))
    best = np.flatnonzero(gaps == gaps.min())
    return float(table[next(i for i in best if len(best) == 1 or i % 2 == 0)])


def stochastic(value: float, word: int) -> float:
    step = 0.5 if value < 2 else 1.0 if value < 4 else 2.0
    return min(6.0, np.floor((value + step * word / 256) / step) * step)


def tiles(shape: tuple[int, int], tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for row, column in itertools.product(range(0, shape[0], tile[0]), range(0, shape[1], tile[1])):
        yield slice(row, row + tile[0]), slice(column, column + tile[1])


def brute_nvfp4(x: np.ndarray, tile: tuple[int, int], words: np.ndarray | None = None) -> list:
    """The sums of `measure_nvfp4`, with FP32 roundings where the format requires them."""
    one = np.float32
    amax = one(np.abs(x).max())
    encode_all = one(2688) / amax
    histogram = [0] * 18
    counts = np.zeros(NUM_COUNTS)
    for part in tiles(x.shape, tile):
        block = x[part]
        largest = one(np.abs(block).max())
        scale = nearest(float(largest * one(encode_all * one(one(1) / one(6)))), E4M3)
        if largest == 0:
            histogram[0] += 1
        elif scale == 0:
            histogram[1] += 1
        else:
            histogram[2 if scale < 2**-6 else int(np.floor(np.log2(scale))) + 9] += 1
        for place, value in np.ndenumerate(block):
            magnitude, rounded = abs(float(value)), 0.0
            if scale:
                z = float(one(magnitude) * one(one(1) / one(one(scale) * one(one(1) / encode_all))))
                if words is None:
                    code = nearest(z, E2M1)
                else:
                    code = stochastic(min(z, 6.0), int(words[part][place]))
                rounded = code * scale * float(amax) / 2688
                counts[2] += z > 6 * (1 + 1e-6)
            counts += [magnitude > 0, magnitude > 0 and rounded == 0, 0, magnitude**2, 0]
            counts[4] += (magnitude - rounded) ** 2
    return [*counts, *histogram]


def brute_mxfp8(x: np.ndarray) -> list:
    exponents, empty = [], 0
    counts = np.zeros(NUM_COUNTS)
    for part in tiles(x.shape, (1, 32)):
        block = np.abs(x[part])
        empty += block.max() == 0
        exponent = -127
        while block.max() / 448 > 2.0**exponent:
            exponent += 1
        if block.max() > 0:
            exponents.append(exponent)
        for magnitude in map(float, block.flatten()):
            rounded = nearest(magnitude / 2.0**exponent, E4M3) * 2.0**exponent
            counts += [magnitude > 0, magnitude > 0 and rounded == 0, 0, magnitude**2, 0]
            counts[4] += (magnitude - rounded) ** 2
    histogram = [empty] + [0] * 17
    for exponent in exponents:
        histogram[17 - min(16, max(exponents) - exponent)] += 1
    return [*counts, *histogram]


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """BF16 over many powers of two, a few tiny rows, some zero elements and one whole zero
    block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp(
        2 * torch.randn(*shape, generator=generator)
    )
    x[shape[0] // 2 :] *= 1e-4
    x[x.abs() < 1e-6] = 0
    x[:, :32] = torch.where(torch.arange(shape[0])[:, None] < 4, 0.0, x[:, :32])
    return x.bfloat16()


@pytest.mark.parametrize("block", ["1d", "2d"])
@pytest.mark.parametrize("shape", [(40, 96), (37, 50)])
def test_nvfp4_counts(block, shape: tuple[int, int]) -> None:
    x = heavy_tailed(*shape)
    sums, amax = measure_nvfp4(x, block=block)
    tile = (1, 16) if block == "1d" else (16, 16)
    expected = brute_nvfp4(x.float().numpy(), tile)
    assert expected[1] > 20 and expected[2] > 2 and sum(n > 0 for n in expected[5:]) > 5
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)
    assert amax == x.abs().max()


def test_nvfp4_counts_of_stochastic_rounding() -> None:
    x = heavy_tailed(24, 64, seed=1)
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=generator)
    sums, _ = measure_nvfp4(x, random_words=words)
    expected = brute_nvfp4(x.float().numpy(), (1, 16), words.numpy())
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(24, 96), (11, 50)])
def test_mxfp8_counts(shape: tuple[int, int]) -> None:
    x = heavy_tailed(*shape)
    x[0, 33] = 3e4  # the other blocks are far below this one
    sums, amax = measure_mxfp8(x)
    assert sums.tolist() == pytest.approx(brute_mxfp8(x.float().numpy()), rel=1e-9)
    assert amax == x.abs().max()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(["1d", "2d", "mxfp8"]))
def test_histogram_holds_every_block_once(rows: int, columns: int, kind) -> None:
    x = heavy_tailed(rows, columns)
    sums, _ = measure_mxfp8(x) if kind == "mxfp8" else measure_nvfp4(x, block=kind)
    tall, wide = {"1d": (1, 16), "2d": (16, 16), "mxfp8": (1, 32)}[kind]
    assert sum(sums[NUM_COUNTS:]) == -(-rows // tall) * -(-columns // wide)


def test_numbers_of_zeros_are_finite_where_they_mean_something() -> None:
    numbers = operand_numbers([0.0] * 5 + [3.0] + [0.0] * 17, 0.0)
    assert numbers["flush_to_zero"] == numbers["relative_error"] == 0
    half = operand_numbers([4, 1, 0, 100.0, 1.0] + [0.0] * 18, 1.0)
    assert half["flush_to_zero"] == 0.25
    assert half["snr_db"] == 20 and half["relative_error"] == 0.1


# On a model -------------------------------------------------------------------------------


def build(groups, *overrides: str):
    config = compose_config(list(overrides))
    model = build_model(config, resolve_plan(config), device.prepare(), groups)
    telemetry = Telemetry(
        config.precision.telemetry, resolve_plan(config), last_step=100, device="cpu"
    )
    control = PrecisionControl([model], config, resolve_plan(config), groups, telemetry)
    return config, model, telemetry, control


def run_linear(model, path: str, dy_seed: int = 1) -> tuple[torch.Tensor, ...]:
    """One forward and backward pass of a linear: x [T,K], w [N,K], dy [T,N]."""
    linear = global_modules(model)[path]
    generator = torch.Generator().manual_seed(dy_seed)
    w = linear.weight
    x = (torch.randn(48, w.shape[1], generator=generator) ** 3).to(w.dtype)
    y, _ = linear(x[:, None].requires_grad_())
    dy = torch.randn(y.shape, generator=generator).to(w.dtype)
    torch.autograd.grad(y, w, dy)
    return x.detach(), w.detach(), dy.flatten(0, 1)


def expected_operands(x, w, dy) -> dict[str, tuple[torch.Tensor, tuple[int, int]]]:
    """Operand -> the matrix with blocks along its rows, and its block layout. Nearest rounding."""
    rotate = torch.block_diag(*[hadamard_matrix(torch.float64)] * (len(x) // 16)).t()

    def rotated(tensor: torch.Tensor) -> torch.Tensor:
        return (rotate @ tensor.double()).to(tensor.dtype).t()

    return {
        "fprop_activation": (x, (1, 16)),
        "fprop_weight": (w, (16, 16)),
        "dgrad_gradient": (dy, (1, 16)),
        "dgrad_weight": (w, (16, 16)),
        "wgrad_gradient": (rotated(dy), (1, 16)),
        "wgrad_activation": (rotated(x), (1, 16)),
    }


@pytest.mark.parametrize("plan", ["nvfp4_all", "bf16"])
def test_every_operand_of_a_linear(plan: str, groups) -> None:
    """In training and as a probe. Rounding is to nearest, so no random word is involved."""
    probe = [] if plan == "nvfp4_all" else ["precision.telemetry.probe=nvfp4"]
    if plan == "nvfp4_all":
        probe = ["precision.default.stochastic_rounding=false"]
    _, model, telemetry, control = build(
        groups, f"precision={plan}", "precision.telemetry.every=1", *probe
    )
    control.before_step(0, 0)
    path = "decoder.layers.3.self_attention.linear_proj"
    x, w, dy = run_linear(model, path)
    measured = telemetry.modules()[path]["nvfp4"]
    assert set(measured) == set(OPERANDS)
    for operand, (matrix, tile) in expected_operands(x, w, dy).items():
        if plan == "bf16" and "gradient" in operand:
            continue  # a probe rounds gradients stochastically, as the recipe does
        sums = brute_nvfp4(matrix.float().numpy(), tile)
        expected = operand_numbers(sums, float(matrix.abs().max()))
        assert measured[operand]["flush_to_zero"] == pytest.approx(
            expected["flush_to_zero"], abs=5e-4
        ), operand
        assert measured[operand]["snr_db"] == pytest.approx(expected["snr_db"], abs=0.02)
        assert sum(measured[operand]["scale_histogram"]) == sum(expected["scale_histogram"])


def test_gradients_are_looked_at_as_they_were_rounded(groups) -> None:
    """The noise of dgrad in telemetry equals that of the product's own operand, random words
    included: dx against the exact gradient, through an identity weight."""
    _, model, telemetry, control = build(
        groups, "precision=nvfp4_all", "precision.telemetry.every=1"
    )
    path = "decoder.layers.3.self_attention.linear_proj"
    linear = global_modules(model)[path]
    with torch.no_grad():
        linear.weight.copy_(torch.eye(len(linear.weight)))
    control.before_step(0, 0)
    x = torch.ones(32, 1, len(linear.weight)).bfloat16().requires_grad_()
    y, _ = linear(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    (dx,) = torch.autograd.grad(y, x, dy)
    seen = telemetry.modules()[path]["nvfp4"]["dgrad_gradient"]
    assert seen["flush_to_zero"] == pytest.approx(float((dx == 0).float().mean()), rel=1e-5)
    error = (dx.double() - dy.double()).norm() / dy.double().norm()
    assert seen["relative_error"] == pytest.approx(float(error), rel=1e-3)  # dx is rounded to BF16


def test_probed_experts_see_their_hidden_activations(groups) -> None:
    """Plain BF16 experts with a probe. The counts of fc2's input and fc1's output gradient equal
    those of the same arithmetic written out for each expert. The output equals that of the plain
    experts."""
    _, model, telemetry, control = build(
        groups,
        "precision=bf16",
        "precision.telemetry.every=1",
        "precision.telemetry.probe=mxfp8",
    )
    experts = global_modules(model)["decoder.layers.1.mlp.experts"]
    assert isinstance(experts, EmulatedExperts)
    counts = torch.tensor([5, 0, 37, 32] + [1] * 12)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(int(counts.sum()), 64, generator=generator).bfloat16().requires_grad_()
    p = torch.rand(len(x), generator=generator)
    plain, _ = experts(x, counts, p)
    dy = torch.randn(plain.shape, generator=generator).bfloat16()
    (dx_plain,) = torch.autograd.grad(plain, x, dy)
    control.before_step(0, 0)
    y, _ = experts(x, counts, p)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, plain) and torch.equal(dx, dx_plain)
    assert experts.linear_fc1.weight.grad is None

    sums = {"fprop_activation": np.zeros(23), "dgrad_gradient": np.zeros(23)}
    for expert, part in enumerate(torch.arange(len(x)).split(counts.tolist())):
        if not len(part):
            continue
        w1 = experts.linear_fc1.weight.detach()[expert]
        w2 = experts.linear_fc2.weight.detach()[expert]
        hidden = x.detach()[part] @ w1.t()
        relu = torch.relu(hidden)
        active = (relu.square() * p[part, None]).bfloat16()
        grad = (dy[part] @ w2) * p[part, None] * 2 * relu
        sums["fprop_activation"] += brute_mxfp8(active.float().numpy())
        sums["dgrad_gradient"] += brute_mxfp8(grad.bfloat16().float().numpy())
    modules = telemetry.modules()
    for operand, which in (("fprop_activation", "fc2"), ("dgrad_gradient", "fc1")):
        measured = modules[f"decoder.layers.1.mlp.experts.linear_{which}"]["mxfp8"][operand]
        expected = operand_numbers(sums[operand].tolist(), 0.0)
        assert measured["relative_error"] == pytest.approx(expected["relative_error"], rel=0.02)
        # The zero blocks differ because the experts' tokens are padded.
        assert sum(measured["scale_histogram"][1:]) == sum(expected["scale_histogram"][1:])


def test_off_costs_nothing(groups) -> None:
    """Without telemetry no linear has an observer, and a BF16 plan uses Megatron's plain linears.
    With telemetry no linear has an observer on steps that are not due."""
    config = compose_config(["precision=bf16"])
    model = build_model(config, resolve_plan(config), device.prepare(), groups)
    assert not any(isinstance(m, EmulatedColumnParallelLinear) for m in model.modules())
    _, model, _, control = build(groups, "precision=nvfp4_all", "precision.telemetry.every=3")
    linears = [m for m in model.modules() if getattr(m, "attached", None) is not None]
    watched = []
    for step in range(6):
        control.before_step(step, 2048 * step)
        watched.append({module.attached.observer is not None for module in linears})
        control.gradients_ready([wrap_data_parallel(model, config, groups)])
        assert not any(module.attached.observer for module in linears)
    assert watched == [{False}, {False}, {True}, {False}, {False}, {True}]


@pytest.mark.parametrize("optimizer", ["true", "false"])
def test_zero_gradients_are_counted(optimizer: str, groups) -> None:
    config, model, telemetry, control = build(
        groups,
        "precision=nvfp4_all",
        "precision.telemetry.every=1",
        f"parallel.distributed_optimizer={optimizer}",
    )
    wrapped = wrap_data_parallel(model, config, groups)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.main_grad.copy_(torch.where(gradient < -0.5, 0.0, gradient))
    control.before_step(0, 0)
    run_linear(model, "decoder.layers.0.mixer.out_proj")
    control.gradients_ready([wrapped])
    weight = global_modules(model)["decoder.layers.0.mixer.out_proj"].weight
    zeros = int((weight.main_grad == 0).sum())
    assert count_zeros([wrapped], weight).tolist() == [zeros, weight.numel()]
    module = telemetry.modules()["decoder.layers.0.mixer.out_proj"]
    assert module["zero_weight_gradients"] == zeros / weight.numel()


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    good = compose_config(["precision=bf16"])
    for changes, name in (
        ({"every": -1}, "every=-1"),
        ({"every": 5}, "quantizes nothing"),
        ({"probe": type(good.precision.telemetry.probe).nvfp4}, "has no effect"),
    ):
        telemetry = replace(good.precision.telemetry, **changes)
        config = replace(good, precision=replace(good.precision, telemetry=telemetry))
        with pytest.raises(ConfigError, match=name):
            resolve_plan(config)
