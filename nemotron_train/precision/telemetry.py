"""What rounding costs each operand of each linear, counted on some steps of a run.

Owns: when to look, in which formats, the counts and their sum over ranks. Does not own: who shows
the operands (`linear` and `experts`, which test one attribute where nothing is measured), the
formats' arithmetic (`nvfp4`, `mxfp8`), names and meaning of the numbers (`telemetry_record`).

An operand is quantized a second time, apart from training, with the same block scales, random
words and amax, so what is counted is what the product lost. A product in another format than
`precision.telemetry.probe` is looked at in that format too, with all of its recipe's options:
that is how a run in BF16 tells what NVFP4 would cost it.

Shapes: R rows, C columns of an operand whose blocks lie along its columns; S sums of it.
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

_ROUNDING_OF_LIMIT = 1 + 2.0**-20  # the largest number of a block is computed with two roundings
_OPERAND_ROLE: dict[str, Role] = {"activation": "x", "weight": "w", "gradient": "dy"}


def measure_nvfp4(
    x_RC: Tensor,
    *,
    block: nvfp4.Block = "1d",
    random_words: Tensor | None = None,
    reduce_amax: nvfp4.ReduceAmax | None = None,
) -> tuple[Tensor, Tensor]:
    """FP64 sums [NUM_SUMS] and FP32 amax of an operand in NVFP4; arguments of `quantize_nvfp4`."""
    quantized = nvfp4.quantize_nvfp4(
        x_RC, block=block, random_words=random_words, reduce_amax=reduce_amax
    )
    operand = quantized.operand()
    scales = quantized.scales
    wide = scales.view(torch.float8_e4m3fn).float().repeat_interleave(nvfp4.BLOCK, dim=1)
    largest = wide[: x_RC.shape[0], : x_RC.shape[1]] * (
        nvfp4.E2M1_MAX * quantized.amax / nvfp4.GLOBAL_DIVISOR
    )
    counts = _counts(x_RC, operand.dequantize(), largest)
    # E4M3 bits: 0, then 1 … 7 for the subnormals, then 8 for each power of two from 2^-6.
    bins = torch.where(scales == 0, 1, scales.int() // 8 + 2)
    rows = nvfp4.BLOCK if block == "2d" else 1
    empty = _empty_blocks(x_RC, rows, nvfp4.BLOCK)
    return _with_histogram(counts, bins[::rows], empty), quantized.amax


def measure_mxfp8(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """The same in MXFP8, blocks of 32."""
    quantized = mxfp8.quantize_mxfp8(x_RC)
    exponents = quantized.scales.int()
    wide = torch.exp2(exponents.float() - 127).repeat_interleave(mxfp8.BLOCK, dim=1)
    largest = wide[:, : x_RC.shape[1]] * mxfp8.E4M3_MAX
    counts = _counts(x_RC, quantized.dequantize(), largest)
    below = exponents.amax() - exponents if exponents.numel() else exponents
    bins = NUM_BINS - 1 - below.clamp(max=NUM_BINS - 2)
    return _with_histogram(counts, bins, _empty_blocks(x_RC, 1, mxfp8.BLOCK)), x_RC.abs().amax()


def _counts(x_RC: Tensor, rounded_RC: Tensor, largest_RC: Tensor) -> Tensor:
    """FP64 [NUM_COUNTS]; where the scale itself is zero an element is flushed, not saturated."""
    nonzero = x_RC != 0
    saturated = (x_RC.abs().float() > largest_RC * _ROUNDING_OF_LIMIT) & (largest_RC > 0)
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
    """Which blocks hold zeros only."""
    padding = (0, -x_RC.shape[1] % block_columns, 0, -x_RC.shape[0] % block_rows)
    blocks = F.pad(x_RC != 0, padding).unflatten(1, (-1, block_columns))
    return ~blocks.unflatten(0, (-1, block_rows)).any(3).any(1)


def _with_histogram(counts: Tensor, bins: Tensor, empty: Tensor) -> Tensor:
    histogram = torch.bincount(bins.masked_fill(empty, 0).flatten(), minlength=NUM_BINS)
    return torch.cat([counts, histogram.double()])


class Telemetry:
    """The `linear.Observer` of a run. It counts over the first micro-batch of a step on every rank,
    and the first multi-token-prediction depth: in a step of many, looking costs no more.

    The record is the same on every rank: counts are summed over all of them. A tensor that several
    ranks hold whole is counted once a rank, which changes no rate and no ratio.
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
        self._places = {path: i for i, path in enumerate(plan.at(0).formats)}
        shape = (len(self._places), len(FORMATS), len(OPERANDS))
        self._sums = torch.zeros(*shape, NUM_SUMS, dtype=torch.float64, device=device)
        self._amax = torch.zeros(shape, device=device)
        self._zeros = torch.zeros(len(self._places), 2, dtype=torch.float64, device=device)
        self._seen: set[str] = set()

    def is_due(self, step: int) -> bool:
        """Whether the optimizer step that completes step number `step` (from 1) is measured."""
        return self._every > 0 and (step % self._every == 0 or step == self.last_step)

    def begin(self, tokens: int) -> None:
        """Forget the last measured step; the one to measure starts after `tokens` tokens."""
        self._tokens = tokens
        for counted in (self._sums, self._amax, self._zeros):
            counted.zero_()
        self._seen.clear()

    def forward(
        self, attached: Attached, x: Tensor, weight: Tensor, rows: list[int] | None = None
    ) -> None:
        """Of a linear's forward pass: everything but dy. COLLECTIVE where amax is."""
        if attached.path in self._seen:
            return
        self._seen.add(attached.path)
        for form, options in self._looks(attached.formats, "fprop"):
            self._add(attached, form, "fprop_activation", _parts(x, rows))
            self._add_weight(attached, form, options, "fprop_weight", weight)
        for form, options in self._looks(attached.formats, "dgrad"):
            self._add_weight(attached, form, options, "dgrad_weight", weight)
        for form, options in self._looks(attached.formats, "wgrad"):
            x_wgrad = _wgrad_operand(x, form, options)
            parts = [part.t() for part in _parts(x_wgrad, rows)]
            self._add(attached, form, "wgrad_activation", parts)

    def backward(
        self, attached: Attached, dy: Tensor, call: int, rows: list[int] | None = None
    ) -> None:
        """Of its backward pass: dy, rounded with the very words that the products draw."""
        if call > 0:
            return
        for form, options in self._looks(attached.formats, "dgrad"):
            words = _words(attached, dy, form, options, "dgrad", call)
            self._add(attached, form, "dgrad_gradient", _parts(dy, rows), _parts(words, rows))
        for form, options in self._looks(attached.formats, "wgrad"):
            dy_wgrad = _wgrad_operand(dy, form, options)
            words = _words(attached, dy_wgrad, form, options, "wgrad", call)
            parts, words = (
                [part if part is None else part.t() for part in _parts(tensor, rows)]
                for tensor in (dy_wgrad, words)
            )
            self._add(attached, form, "wgrad_gradient", parts, words)

    def add_zero_gradients(self, counts: Iterable[tuple[str, Tensor]]) -> None:
        """Of each path: zeros and elements of this rank's part of the weight's gradient, [2]."""
        for path, zeros in counts:
            self._zeros[self._places[path]] += zeros

    def modules(self) -> dict[str, dict]:
        """The measured step's numbers of each linear, as docs/metrics.md has them.

        COLLECTIVE; SYNC: everything counted is read here.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._zeros)
            dist.all_reduce(self._amax, op=dist.ReduceOp.MAX)
        sums, amax, zeros = self._sums.tolist(), self._amax.tolist(), self._zeros.tolist()
        modules: dict[str, dict] = {}
        formats = self._plan.at(self._tokens).formats
        for path, place in self._places.items():
            module: dict[str, object] = {}
            for i, form in enumerate(FORMATS):
                measured = {
                    name: operand_numbers(sums[place][i][j], amax[place][i][j])
                    for j, name in enumerate(OPERANDS)
                    if any(sums[place][i][j][-NUM_BINS:])
                }
                if measured:
                    module[form] = measured
            if module:
                num_zeros, num_elements = zeros[place]
                module["zero_weight_gradients"] = num_zeros / max(num_elements, 1)
                module["formats"] = {
                    product: getattr(formats[path], product) for product in OPERANDS_OF
                }
                modules[path] = module
        return modules

    def _looks(
        self, formats: LinearFormats, product: str
    ) -> list[tuple[GemmFormat, LinearFormats]]:
        """Formats in which to look at a product, each with its options."""
        own, probe = getattr(formats, product), self._probe
        looks = [(own, formats)] if own.is_block_scaled else []
        if probe is not None and probe != own:
            looks.append((probe, LinearFormats(probe, probe, probe, True, True, True)))
        return looks

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
        self._add(attached, form, operand, matrices, block="2d" if is_2d else "1d")

    @torch.no_grad()
    def _add(
        self,
        attached: Attached,
        form: GemmFormat,
        operand: str,
        parts: list[Tensor],
        words: list[Tensor | None] | None = None,
        block: nvfp4.Block = "1d",
    ) -> None:
        place = self._place(attached.path, form, operand)
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
            self._sums[place] += sums
            self._amax[place] = torch.maximum(self._amax[place], amax.float())

    def _place(self, path: str, form: GemmFormat, operand: str) -> tuple[int, int, int]:
        return self._places[path], FORMATS.index(form), OPERANDS.index(operand)


def _parts(tensor: Tensor | None, rows: list[int] | None) -> list:
    """A dense linear's operand, or each expert's: tensors of their own in every format."""
    if tensor is None:
        return [None] * (1 if rows is None else len(rows))
    return [tensor] if rows is None else list(tensor.split(rows))


def _wgrad_operand(tensor_TC: Tensor, form: GemmFormat, options: LinearFormats) -> Tensor:
    if form == GemmFormat.nvfp4 and options.hadamard:
        return hadamard(pad_tokens(tensor_TC), dim=0)
    return tensor_TC


def _words(
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
