"""Run by test_triton.py: the Triton kernels under Triton's interpreter.

The torch forms are the first truth: bit for bit for quantizers and gathers, within stated bounds
for the others. The second is float64: the torch form in FP64, or a search of the format's tables.
Bounds: FP32 results differ by the order of sums and the last digits of exp, at most 2e-6 of the
largest term; BF16 results are the FP32 ones rounded once, half a unit in the last place (2^-8)
more. Not covered: offsets beyond 32 bits (the interpreter's addresses always have 64).
"""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemotron_train.kernels import quantize as c_quantize
from nemotron_train.kernels.triton import available, elements
from nemotron_train.kernels.triton import convolution as triton_convolution
from nemotron_train.kernels.triton import gated_norm as triton_norm
from nemotron_train.kernels.triton import grouped as triton_grouped
from nemotron_train.kernels.triton import permutation as triton_permutation
from nemotron_train.model.mamba.convolution import causal_conv
from nemotron_train.model.mamba.gated_norm import gated_rms_norm
from nemotron_train.model.moe import permutation as torch_permutation
from nemotron_train.precision.gemm import Operand
from nemotron_train.precision.grouped import padded_rows
from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.nvfp4 import E2M1_VALUES, nvfp4_operand
from nemotron_train.precision.rounding import RandomWords

# The interpreter computes with NumPy, which reports what the kernels expect: 2688 / 0 = infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WORDS = RandomWords(seed=2**63 + 5, stream=2**32 - 3, step=7, row_offset=1000003, column_offset=9)
NVFP4_FORMS = [
    {"block": block, "dim": dim, "random_words": words}
    for block, dim in (("1d", -1), ("1d", 0), ("2d", -1))
    for words in (None, WORDS)
]
KINDS = ("plain", "tailed", "wide", "ties", "subnormal", "zeros", "largest", "infinite", "nan")


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chooses the Triton forms (for CPU tensors, which the interpreter takes) or torch's operators,
    never the C kernels."""

    def choose(use: bool) -> None:
        types = (torch.bfloat16, torch.float32)
        monkeypatch.setattr(
            available, "can_use", lambda *t: use and all(x.dtype in types for x in t)
        )
        monkeypatch.setattr(c_quantize, "quantize_library", lambda: None)

    return choose


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _matrix(kind: str, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Sizes on both sides of a block and a tile."""
    x = _noise(3, rows, columns)
    if kind == "tailed":
        x = x * (6 * _noise(4, rows, columns)).exp()
    elif kind == "wide":  # blocks so far below the largest that MXFP8 makes them zero
        x = x * torch.logspace(-120, 120, rows, base=2.0)[:, None]
    elif kind == "ties":
        x = (x * 8).round() / 2
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).smallest_normal
    elif kind == "zeros":
        x[:, ::2] = -0.0
        x[: rows // 2] = 0
    elif kind == "largest":
        x = (x * torch.finfo(dtype).max).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    elif kind in ("infinite", "nan"):
        x[rows // 2, columns // 2] = math.inf if kind == "infinite" else math.nan
    return x.to(dtype)


def _assert_same(ours: Operand, theirs: Operand) -> None:
    """Equal bits, except for the payload of a NaN."""
    for one, other in ((ours.values, theirs.values), (ours.scale, theirs.scale)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))
        assert torch.equal(one.signbit()[~one.isnan()], other.signbit()[~other.isnan()])


# ---------------------------------------------------------------------------------- quantizers
@pytest.mark.parametrize("kind", KINDS)
def test_quantizers_equal_torch(kind: str, on_triton) -> None:
    """Every kind of numbers in every layout to nearest, and in one or all layouts at random; sizes
    on both sides of a block, for one kind also of a tile."""
    place, columns = KINDS.index(kind), 140 if kind == "nan" else 44
    forms = NVFP4_FORMS[::2] + (
        NVFP4_FORMS[1::2] if kind == "plain" else [NVFP4_FORMS[place % 3 * 2 + 1]]
    )
    for number, form in enumerate(forms):
        dtype = (torch.float32, torch.bfloat16)[(number + place) % 2]
        _assert_equals_torch(nvfp4_operand, _matrix(kind, dtype, 18, columns), on_triton, **form)
    for dim in (-1, 0):
        dtype = (torch.float32, torch.bfloat16)[(dim + place) % 2]
        _assert_equals_torch(mxfp8_operand, _matrix(kind, dtype, 35, columns), on_triton, dim=dim)


def _assert_equals_torch(quantize, x: Tensor, on_triton, **options) -> None:
    on_triton(False)
    theirs = quantize(x, **options)
    on_triton(True)
    _assert_same(quantize(x, **options), theirs)


@pytest.mark.parametrize("form", NVFP4_FORMS[::2])
def test_stacked_experts_equal_torch(form: dict, on_triton) -> None:
    """Experts of several sizes, one without tokens, each with another magnitude."""
    rows = torch.tensor([32, 0, 16] if form != NVFP4_FORMS[0] else [31, 0, 17])
    x = _noise(1, 48, 40) * torch.tensor([1e-3, 1.0, 1e4]).repeat_interleave(rows)[:, None]
    _assert_equals_torch(nvfp4_operand, x.bfloat16(), on_triton, **form, rows_per_tensor=rows)


def _nearest(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry of a sorted table, and how clear the choice is: the difference of the
    distances to the two nearest, relative to the value. FP64."""
    near = (values[..., None] - table).abs().topk(2, largest=False)
    gap = (near.values[..., 1] - near.values[..., 0]) / values.abs().clamp(min=1e-30)
    return table[near.indices[..., 0]], gap


def test_quantizers_against_tables_in_float64(on_triton) -> None:
    """Codes and block scales by search, wherever the choice is no tie within FP32's precision."""
    on_triton(True)
    x = (_noise(5, 8, 64) * torch.logspace(-2, 2, 8)[:, None]).float()
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    blocks = x.double().view(8, 4, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / 6 * (2688 / x.double().abs().max())
    scale, clear = _nearest(scale, e4m3)
    assert clear.min() > 1e-5
    code, gap = _nearest(
        (blocks / (scale / 2688 * x.double().abs().max())).abs(), torch.tensor(E2M1_VALUES).double()
    )
    ours = nvfp4_operand(x).values.double().view(8, 4, 16).abs()
    is_clear = (gap > 1e-5) & (scale > 0)
    assert is_clear.double().mean() > 0.5
    assert torch.equal(ours[is_clear], (code * scale)[is_clear])

    blocks = x.double().view(8, 2, 32)
    power = (blocks.abs().amax(-1, keepdim=True) / 448).log2().ceil()
    code, gap = _nearest((blocks / 2**power).abs(), e4m3)
    operand = mxfp8_operand(x)
    ours = (operand.values.double() * operand.scale).view(8, 2, 32)
    expected = torch.copysign(code * 2**power, blocks)
    assert (gap > 1e-5).double().mean() > 0.9
    assert torch.equal(ours[gap > 1e-5], expected[gap > 1e-5])


# ------------------------------------------------------------------------ layers with gradients
def _results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradient of each input for an output gradient of fixed noise whose
    strides are not those of the output."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    noise = _noise(1, *reversed(out.shape)).to(torch.bfloat16).to(out.dtype)
    noise = noise.permute(*reversed(range(out.ndim)))
    return [out.detach(), *torch.autograd.grad(out, leaves, noise)]


def _assert_near(ours: list[Tensor], truth: list[Tensor]) -> None:
    for one, other in zip(ours, truth, strict=True):
        scale = max(1.0, float(other.abs().max()))
        half_unit = 2.0**-8 if one.dtype == torch.bfloat16 else 0.0
        bound = half_unit * other.double().abs() + 2e-6 * scale
        error = (one.double() - other.double()).abs()
        assert (error <= bound).all(), float((error - bound).max())


def _activations(seed: int, shape: tuple[int, int, int], dtype: torch.dtype, order: str) -> Tensor:
    """[B, S, C] noise, in one of the memory orders that occur."""
    batch, length, channels = shape
    if order == "sequence first":
        return _noise(seed, length, batch, channels).to(dtype).transpose(0, 1)
    if order == "part of a wider row":  # strides that are no multiples of 8
        wide = _noise(seed, length, batch, channels + 9).to(dtype)
        return wide.transpose(0, 1)[..., 5 : 5 + channels]
    if order == "channels first":
        return _noise(seed, batch, channels, length).to(dtype).mT
    return _noise(seed, batch, length, channels).to(dtype)


LAYER_CASES = [
    # dtype, shape, memory order, taps, with documents
    (torch.float32, (1, 40, 130), "rows", 3, True),
    (torch.bfloat16, (2, 33, 7), "part of a wider row", 4, True),
    (torch.bfloat16, (2, 20, 16), "sequence first", 4, False),
    (torch.float32, (3, 2, 8), "part of a wider row", 3, True),
    (torch.bfloat16, (2, 20, 12), "channels first", 2, True),
    (torch.float32, (1, 1, 5), "rows", 2, False),
]


@pytest.mark.parametrize(("dtype", "shape", "order", "taps", "with_documents"), LAYER_CASES)
def test_convolution(dtype, shape, order, taps, with_documents, on_triton, monkeypatch) -> None:
    x = _activations(2, shape, dtype, order)
    weight, bias = _noise(3, shape[2], taps), _noise(4, shape[2])
    ids = (_noise(5, *shape[:2]) > 1.0).cumsum(1) if with_documents else None
    calls = _count_calls(monkeypatch, triton_convolution, "causal_conv", "causal_conv_backward")

    def run(*inputs: Tensor) -> list[Tensor]:
        return _results(lambda *t: causal_conv(*t, document_ids_BS=ids), *inputs)

    on_triton(False)
    truth = run(x.double(), weight.double(), bias.double())
    assert calls == []
    on_triton(True)
    ours = run(x, weight, bias)
    assert calls == ["causal_conv", "causal_conv_backward"]
    assert ours[0].stride() == torch.empty_like(x).stride()
    _assert_near(ours, truth)
    theirs = causal_conv(x, weight, bias, document_ids_BS=ids, force_torch=True)
    assert len(calls) == 2, "force_torch does not use Triton"
    _assert_near([theirs], truth[:1])


def test_convolution_with_a_stored_window(on_triton) -> None:
    x, weight, bias = _noise(1, 2, 10, 6), _noise(2, 6, 4), _noise(3, 6)
    on_triton(True)
    whole = causal_conv(x, weight, bias)
    rest = causal_conv(x[:, 4:], weight, bias, initial_BKC=x[:, 1:4])
    assert torch.equal(rest, whole[:, 4:])


@pytest.mark.parametrize(
    ("dtype", "shape", "order", "groups", "weight_dtype"),
    [
        (torch.float32, (2, 40, 96), "rows", 2, torch.float32),
        (torch.bfloat16, (2, 33, 200), "part of a wider row", 1, torch.float32),
        (torch.bfloat16, (1, 64, 128), "sequence first", 4, torch.bfloat16),
        (torch.float32, (3, 1, 8), "channels first", 8, torch.float32),
    ],
)
def test_gated_norm(dtype, shape, order, groups, weight_dtype, on_triton, monkeypatch) -> None:
    y = _activations(2, shape, dtype, "rows")
    gate = _activations(3, shape, dtype, order)
    weight = (1 + 0.1 * _noise(4, shape[2])).to(weight_dtype)
    options = {"group_size": shape[2] // groups, "epsilon": 1e-5}
    calls = _count_calls(monkeypatch, triton_norm, "rms_norm", "rms_norm_backward")
    on_triton(False)
    truth = _results(
        lambda *t: gated_rms_norm(*t, **options), y.double(), gate.double(), weight.double()
    )
    assert calls == []
    on_triton(True)
    ours = _results(lambda *t: gated_rms_norm(*t, **options), y, gate, weight)
    assert calls == ["rms_norm", "rms_norm_backward"]
    _assert_near(ours, truth)
    with torch.no_grad():
        assert torch.equal(gated_rms_norm(y, gate, weight, **options), ours[0])
        gated_rms_norm(y, gate, weight, **options, force_torch=True)
    assert len(calls) == 3


def _count_calls(monkeypatch: pytest.MonkeyPatch, module, *names: str) -> list[str]:
    """A list that gets the name of each of these functions when it is called."""
    calls: list[str] = []
    for name in names:
        function = getattr(module, name)

        def counted(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)
    return calls


# -------------------------------------------------------------------------------- permutation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_padding", [0, 10**6])
def test_permutation(dtype: torch.dtype, max_padding: int, on_triton, monkeypatch) -> None:
    """Both directions with their gradients, with and without padding rows; expert 2 gets no
    token."""
    width = 20 if max_padding else 520  # on both sides of a tile
    scores = _noise(1, 13, 5)
    scores[:, 2] = -9
    experts = scores.topk(3).indices
    plan = torch_permutation.plan_permutation(experts, 5, max_padding)
    assert plan.padded == (max_padding > 0) and plan.tokens_per_expert_E[2] == 0
    x, rows = _noise(2, 13, width).to(dtype), _noise(3, len(plan.token_of_row_T), width).to(dtype)
    calls = _count_calls(monkeypatch, triton_permutation, "gather_rows", "sum_rows")

    def both(x: Tensor, rows: Tensor) -> list[Tensor]:
        return [
            *_results(lambda t: torch_permutation.permute(t, plan), x),
            *_results(lambda t: torch_permutation.unpermute(t, plan), rows),
        ]

    on_triton(False)
    theirs, truth = both(x, rows), both(x.double(), rows.double())
    assert calls == []
    on_triton(True)
    ours = both(x, rows)
    assert calls == ["gather_rows", "sum_rows", "sum_rows", "gather_rows"]
    _assert_near(ours, truth)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[3], theirs[3])
    if dtype == torch.float32:  # torch's BF16 sum rounds some ties away from the even neighbour
        assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


# ---------------------------------------------------------------------------- grouped products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[32, 0, 96], [0, 5, 0, 70, 1]])
def test_grouped_products(dtype: torch.dtype, rows: list[int]) -> None:
    """Both products against one product a group in float64. Groups without rows, first and inside;
    sizes on both sides of a tile; a transposed right side."""
    rows_E = torch.tensor(rows)
    a, b = _noise(1, sum(rows), 40).to(dtype), _noise(2, len(rows), 130, 40).to(dtype).mT
    factors_E = torch.rand(len(rows))
    of_row = factors_E.repeat_interleave(rows_E)
    ours = triton_grouped.grouped_product(a, b, of_row, rows_E, dtype)
    groups = zip(a.split(rows), b, factors_E, strict=True)
    truth = torch.cat([part.double() @ of.double() * factor for part, of, factor in groups])
    _assert_near([ours], [truth])
    other = _noise(3, sum(rows), 70).to(dtype)
    ours = triton_grouped.grouped_outer_product(a, other, factors_E, rows_E, dtype)
    groups = zip(a.split(rows), other.split(rows), factors_E, strict=True)
    truth = torch.stack([p.double().T @ q.double() * factor for p, q, factor in groups])
    _assert_near([ours], [truth])


@pytest.mark.parametrize("counts", [[5, 0, 40], [0, 0, 33], [64, 32, 0]])
def test_rows_that_stay_on_the_device_change_no_operand(counts: list[int], on_triton) -> None:
    """The padded rows of experts whose numbers the host does not know: the same place for each
    token, and the same operand, random words included. What is left over is zero."""
    tokens = _noise(1, sum(counts), 48).bfloat16()
    operands, places = [], []
    for stays in (False, True):
        on_triton(stays)
        rows, rows_T = padded_rows(torch.tensor(counts), tokens)
        assert (rows.lengths is None) == stays and sum(rows.on_host()) == rows.total
        x = tokens.new_zeros(rows.total, 48).index_copy(0, rows_T, tokens)
        places.append(rows_T)
        operands += [nvfp4_operand(x, dim=0, random_words=WORDS, rows_per_tensor=rows.per_expert_E)]
    assert torch.equal(*places)
    host, device = operands
    assert torch.equal(host.scale, device.scale)
    assert torch.equal(host.values, device.values[: len(host.values)])
    assert not device.values[len(host.values) :].any()


# --------------------------------------------------------------------------------- the choice
def test_only_tensors_on_cuda_use_triton() -> None:
    assert not available.can_use(torch.zeros(4))
    assert available.failure(torch.device("cpu")) == "", "the interpreter computes"


@pytest.mark.parametrize("fault", ["raises", "computes wrong numbers"])
def test_a_fault_is_said_once_and_torch_computes(fault: str, monkeypatch) -> None:
    def twice(numbers: Tensor) -> Tensor:
        if fault == "raises":
            raise RuntimeError("\nno C compiler was found\nsee https://example.com")
        return numbers

    monkeypatch.setattr(elements, "twice", twice)
    available._works.cache_clear()
    reason = "no C compiler was found" if fault == "raises" else "wrong numbers"
    with pytest.warns(UserWarning, match=f"{reason}.*install triton"):
        assert not available._works(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not available._works(torch.device("cpu"))
    available._works.cache_clear()


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Ties, carries, subnormals, NaN: the interpreter's own conversion fails on these."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3FFFFFFF, 0x7F7FFFFF, 0x00018000, -1]
    )
    x = bits.to(torch.int32).view(torch.float32)
    rows = torch.cat([x, -x]).unsqueeze(1)
    out = torch.empty(rows.shape, dtype=torch.bfloat16)
    one = torch.arange(len(rows)).unsqueeze(1)
    triton_permutation._sum_rows[(2,)](
        rows,
        elements.as_bits(out),
        one,
        *rows.shape,
        1,  # pyright: ignore[reportCallIssue]
        K=1,
        ROWS=8,
        COLUMNS=8,
    )
    expected = rows.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0), expected.nan_to_num(0))
