"""Measures the rounding error of each operand of each linear on selected steps of a run.

Owns: which steps are measured, in which formats, the counts and their sum over ranks. Does not
own: the calls that pass operands in (`linear` and `experts`, which test one attribute when nothing
is measured), the arithmetic of the formats (`nvfp4`, `mxfp8`), the names and meaning of the numbers
(`telemetry_record`).

Telemetry quantizes an operand a second time, apart from training, with the same block scales,
random words and amax. The counts are therefore exactly what the product lost. If a product's format
differs from `precision.telemetry.probe`, telemetry measures it in the probe format too, with all
options of that format's recipe on. A BF16 run can thus measure what NVFP4 would cost.

Shapes: R rows and C columns of an operand. Its blocks lie along the columns.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemotron_train.config.schema import GemmFormat, ProbeFormat, TelemetryConfig
from nemotron_train.plan.precision.resolve import LinearFormats, PrecisionPlan
from nemotron_train.precision import mxfp8, nvfp4
from nemotron_train.precision.hadamard import hadamard
from nemotron_train.precision.linear import Attached, Role, pad_tokens
from nemotron_train.precision.telemetry_record import (
    FORMATS,
    NUM_BINS,
    NUM_SUMS,
    OPERANDS,
    OPERANDS_OF,
    operand_numbers,
)

_LIMIT_TOLERANCE = 1 + 2.0**-20  # the limit of a block is computed with two FP32 roundings
_OPERAND_ROLE: dict[str, Role] = {"activation": "x", "weight": "w", "gradient": "dy"}


def measure_nvfp4(
    x_RC: Tensor,
    *,
    block: nvfp4.Block = "1d",
    random_words: Tensor | None = None,
    reduce_amax: nvfp4.ReduceAmax | None = None,
) -> tuple[Tensor, Tensor]:
    """FP64 sums [NUM_SUMS] and FP32 amax of an operand in NVFP4. Arguments: see `quantize_nvfp4`.

    COLLECTIVE if `reduce_amax` is.
    """
    quantized = nvfp4.quantize_nvfp4(
        x_RC, block=block, random_words=random_words, reduce_amax=reduce_amax
    )
    operand = quantized.operand()
    scales = quantized.scales
    element_scales = scales.view(torch.float8_e4m3fn).float().repeat_interleave(nvfp4.BLOCK, dim=1)
    limit_RC = element_scales[: x_RC.shape[0], : x_RC.shape[1]] * (
        nvfp4.E2M1_MAX * quantized.amax / nvfp4.GLOBAL_DIVISOR
    )
    counts = _counts(x_RC, operand.dequantize(), limit_RC)
    # E4M3 bit patterns: 0, then 1 … 7 for the subnormals, then 8 per power of two from 2^-6 up.
    bins = torch.where(scales == 0, 1, scales.int() // 8 + 2)
    block_rows = nvfp4.BLOCK if block == "2d" else 1
    empty = _empty_blocks(x_RC, block_rows, nvfp4.BLOCK)
    return _with_histogram(counts, bins[::block_rows], empty), quantized.amax


def measure_mxfp8(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """FP64 sums [NUM_SUMS] and amax (in x's dtype) of an operand in MXFP8, blocks of 32."""
    quantized = mxfp8.quantize_mxfp8(x_RC)
    exponents = quantized.scales.int()
    element_scales = torch.exp2(exponents.float() - 127).repeat_interleave(mxfp8.BLOCK, dim=1)
    limit_RC = element_scales[:, : x_RC.shape[1]] * mxfp8.E4M3_MAX
    counts = _counts(x_RC, quantized.dequantize(), limit_RC)
    below = exponents.amax() - exponents if exponents.numel() else exponents
    bins = NUM_BINS - 1 - below.clamp(max=NUM_BINS - 2)
    return _with_histogram(counts, bins, _empty_blocks(x_RC, 1, mxfp8.BLOCK)), x_RC.abs().amax()


def _counts(x_RC: Tensor, rounded_RC: Tensor, limit_RC: Tensor) -> Tensor:
    """FP64 [NUM_COUNTS]. An element whose block scale is zero counts as flushed, not saturated."""
    nonzero = x_RC != 0
    saturated = (x_RC.abs().float() > limit_RC * _LIMIT_TOLERANCE) & (limit_RC > 0)
    exact = x_RC.double()
    errors = exact - rounded_RC.double()
    counts = [
        nonzero.sum(),
        (nonzero & (rounded_RC == 0)).sum(),
        saturated.sum(),
        exact.square().sum(),
        errors.square().sum(),
    ]
    return torch.stack([count.double() for count in counts])


def _empty_blocks(x_RC: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """Bool [blocks down, blocks across]: True for a block of zeros."""
    padding = (0, -x_RC.shape[1] % block_columns, 0, -x_RC.shape[0] % block_rows)
    blocks = F.pad(x_RC != 0, padding).unflatten(1, (-1, block_columns))
    return ~blocks.unflatten(0, (-1, block_rows)).any(3).any(1)


def _with_histogram(counts: Tensor, bins: Tensor, empty: Tensor) -> Tensor:
    histogram = torch.bincount(bins.masked_fill(empty, 0).flatten(), minlength=NUM_BINS)
    return torch.cat([counts, histogram.double()])


class Telemetry:
    """The `linear.Observer` of a run.

    It measures only the first micro-batch of a step on every rank, and only the first
    multi-token-prediction depth. So its cost does not grow with the number of micro-batches.

    All ranks get the same record: counts are summed over ranks. A tensor that several ranks hold
    whole counts once per rank. This changes no rate and no ratio.
    """

    def __init__(
        self, config: TelemetryConfig, plan: PrecisionPlan, last_step: int, device: str
    ) -> None:
        self._plan = plan
        self.last_step = last_step
        self._tokens = 0
        self._every = config.every
        no_probe = config.probe == ProbeFormat.none
        self._probe = None if no_probe else GemmFormat(config.probe.value)
        self._path_index = {path: i for i, path in enumerate(plan.at(0).formats)}
        shape = (len(self._path_index), len(FORMATS), len(OPERANDS))
        self._sums = torch.zeros(*shape, NUM_SUMS, dtype=torch.float64, device=device)
        self._amax = torch.zeros(shape, device=device)
        self._zeros = torch.zeros(len(self._path_index), 2, dtype=torch.float64, device=device)
        self._seen: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 1) is measured."""
        return self._every > 0 and (step % self._every == 0 or step == self.last_step)

    def begin(self, tokens: int) -> None:
        """Clear all counts. The step to measure starts after `tokens` trained tokens."""
        self._tokens = tokens
        for totals in (self._sums, self._amax, self._zeros):
            totals.zero_()
        self._seen.clear()

    def forward(
        self, attached: Attached, x: Tensor, weight: Tensor, rows: list[int] | None = None
    ) -> None:
        """Measure all operands of a linear except dy. COLLECTIVE if amax is reduced over ranks.

        x [T, K], weight [N, K]; for experts, x is stacked along the rows (`rows` of each expert)
        and weight is [E, N, K]. Later calls of the same linear in the step are ignored.
        """
        if attached.path in self._seen:
            return
        self._seen.add(attached.path)
        for form, options in self._measured_formats(attached.formats, "fprop"):
            self._measure(attached, form, "fprop_activation", _split_rows(x, rows))
            self._add_weight(attached, form, options, "fprop_weight", weight)
        for form, options in self._measured_formats(attached.formats, "dgrad"):
            self._add_weight(attached, form, options, "dgrad_weight", weight)
        for form, options in self._measured_formats(attached.formats, "wgrad"):
            x_wgrad = _transformed_for_wgrad(x, form, options)
            parts = [part.t() for part in _split_rows(x_wgrad, rows)]
            self._measure(attached, form, "wgrad_activation", parts)

    def backward(
        self, attached: Attached, dy: Tensor, call: int, rows: list[int] | None = None
    ) -> None:
        """Measure dy [T, N], rounded with the same random words as in the products.

        `call`: the number that `Attached.next_call` gave the forward call; only call 0 is measured.
        COLLECTIVE if amax is reduced over ranks.
        """
        if call > 0:
            return
        for form, options in self._measured_formats(attached.formats, "dgrad"):
            words = _random_words(attached, dy, form, options, "dgrad", call)
            self._measure(
                attached, form, "dgrad_gradient", _split_rows(dy, rows), _split_rows(words, rows)
            )
        for form, options in self._measured_formats(attached.formats, "wgrad"):
            dy_wgrad = _transformed_for_wgrad(dy, form, options)
            words = _random_words(attached, dy_wgrad, form, options, "wgrad", call)
            parts, words = (
                [part if part is None else part.t() for part in _split_rows(tensor, rows)]
                for tensor in (dy_wgrad, words)
            )
            self._measure(attached, form, "wgrad_gradient", parts, words)

    def add_zero_gradients(self, counts: Iterable[tuple[str, Tensor]]) -> None:
        """Add (path, counts) pairs: the zeros and the elements of this rank's part of the weight's
        gradient, FP64 [2]."""
        for path, zeros in counts:
            self._zeros[self._path_index[path]] += zeros

    def modules(self) -> dict[str, dict]:
        """The numbers of the measured step by module path, as docs/metrics.md describes them.

        COLLECTIVE. SYNC: reads all counts from the device.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._zeros)
            dist.all_reduce(self._amax, op=dist.ReduceOp.MAX)
        sums = self._sums.tolist()
        amax = self._amax.tolist()
        zeros = self._zeros.tolist()
        modules: dict[str, dict] = {}
        formats = self._plan.at(self._tokens).formats
        for path, index in self._path_index.items():
            module: dict[str, object] = {}
            for i, form in enumerate(FORMATS):
                measured = {
                    name: operand_numbers(sums[index][i][j], amax[index][i][j])
                    for j, name in enumerate(OPERANDS)
                    if any(sums[index][i][j][-NUM_BINS:])
                }
                if measured:
                    module[form] = measured
            if module:
                num_zeros, num_elements = zeros[index]
                module["zero_weight_gradients"] = num_zeros / max(num_elements, 1)
                module["formats"] = {
                    product: getattr(formats[path], product) for product in OPERANDS_OF
                }
                modules[path] = module
        return modules

    def _measured_formats(
        self, formats: LinearFormats, product: str
    ) -> list[tuple[GemmFormat, LinearFormats]]:
        """(format, options) pairs to measure a product in: its own if block-scaled, the probe's."""
        product_format, probe = getattr(formats, product), self._probe
        measured = [(product_format, formats)] if product_format.is_block_scaled else []
        if probe is not None and probe != product_format:
            measured.append((probe, LinearFormats(probe, probe, probe, True, True, True)))
        return measured

    def _add_weight(
        self,
        attached: Attached,
        form: GemmFormat,
        options: LinearFormats,
        operand: str,
        weight: Tensor,
    ) -> None:
        matrices = [weight] if weight.ndim == 2 else list(weight)
        is_2d = form == GemmFormat.nvfp4 and options.weight_2d
        if operand == "dgrad_weight" and not is_2d:
            matrices = [matrix.t() for matrix in matrices]
        self._measure(attached, form, operand, matrices, block="2d" if is_2d else "1d")

    @torch.no_grad()
    def _measure(
        self,
        attached: Attached,
        form: GemmFormat,
        operand: str,
        parts: list[Tensor],
        words: list[Tensor | None] | None = None,
        block: nvfp4.Block = "1d",
    ) -> None:
        index = self._index(attached.path, form, operand)
        role = _OPERAND_ROLE[operand.partition("_")[2]]
        reduce_amax = attached.amax_reduction(role)
        for part, part_words in zip(parts, words or [None] * len(parts), strict=True):
            if not part.numel():
                continue
            if form == GemmFormat.mxfp8:
                sums, amax = measure_mxfp8(part)
            else:
                sums, amax = measure_nvfp4(
                    part, block=block, random_words=part_words, reduce_amax=reduce_amax
                )
            self._sums[index] += sums
            self._amax[index] = torch.maximum(self._amax[index], amax.float())

    def _index(self, path: str, form: GemmFormat, operand: str) -> tuple[int, int, int]:
        return self._path_index[path], FORMATS.index(form), OPERANDS.index(operand)


def _split_rows(tensor: Tensor | None, rows: list[int] | None) -> list:
    """[operand] of a dense linear, or one operand per expert: each is quantized separately."""
    if tensor is None:
        return [None] * (1 if rows is None else len(rows))
    return [tensor] if rows is None else list(tensor.split(rows))


def _transformed_for_wgrad(tensor_TC: Tensor, form: GemmFormat, options: LinearFormats) -> Tensor:
    if form == GemmFormat.nvfp4 and options.hadamard:
        return hadamard(pad_tokens(tensor_TC), dim=0)
    return tensor_TC


def _random_words(
    attached: Attached,
    dy: Tensor,
    form: GemmFormat,
    options: LinearFormats,
    product: str,
    call: int,
) -> Tensor | None:
    if form != GemmFormat.nvfp4 or not options.stochastic_rounding:
        return None
    return attached.words(dy.shape, product, call, dy.device)
