"""Stage 5: emulated NVFP4 and MXFP8 on the device and on the CPU, bit for bit."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.setting import first_line, joined
from nemotron_train.kernels.triton import available
from nemotron_train.precision import mxfp8, nvfp4
from nemotron_train.precision.rounding import RandomWords

WORDS = RandomWords(seed=2**63 + 5, stream=2**32 - 3, step=7, row_offset=1000003, column_offset=9)
KINDS = ("normal", "tailed", "ties", "subnormal", "large", "not finite")


def run(report: Report) -> None:
    """Compares each format of each kind of numbers, computed by Triton (where it works) and by
    torch's operators, with the CPU's."""
    sizes, wrong = report.setting.sizes, []
    forms, total, unequal = ["torch"], 0, 0
    if not available.failure(torch.device("cuda")):
        forms.append("triton")
    can_use = available.can_use
    for kind in KINDS:
        dtype = torch.float32 if kind == "subnormal" else torch.bfloat16
        host = matrix(kind, sizes.code_rows, sizes.code_columns).to(dtype)
        there = host.to("cuda")
        for name, quantize in CASES.items():
            truth = quantize(host)
            for form in forms:
                available.can_use = can_use if form == "triton" else lambda *tensors: False
                try:
                    found = sum(map(differing, quantize(there), truth))
                except Exception as error:  # a kernel that does not compile stops no other form
                    wrong.append(f"{name} of {kind} numbers by {form}: {first_line(error)}")
                    continue
                finally:
                    available.can_use = can_use
                total += sum(t.numel() for t in truth)
                unequal += found
                if found:
                    wrong.append(f"{name} of {kind} numbers by {form}: {found}")
                report.row("numbers", of=kind, format=name, by=form, unequal=found)
        report.figure = f"{unequal:,} of {total:,} numbers differ, by {' and '.join(forms)}"
    if wrong:
        raise Fail(f"not the CPU's bits: {joined(wrong)}")


def matrix(kind: str, rows: int, columns: int) -> Tensor:
    """FP32 numbers of a kind, on the CPU."""
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(rows, columns, generator=draws)
    if kind == "tailed":
        x = x * (6 * torch.randn(rows, columns, generator=draws)).exp()
    elif kind == "ties":
        x = (x * 8).round() / 2
    elif kind == "subnormal":
        x = x * torch.finfo(torch.float32).smallest_normal
    elif kind == "large":
        x = (x * 1e38).clamp(-3e38, 3e38)
    elif kind == "not finite":
        x[0, 0] = math.inf
        x[rows // 2, columns // 2] = math.nan
    return x


def differing(ours: Tensor, theirs: Tensor) -> int:
    """The number of elements with other bits. All NaN are equal."""
    ours = ours.cpu()
    same = ours.view(_BITS[ours.element_size()]) == theirs.view(_BITS[theirs.element_size()])
    if ours.is_floating_point():
        same |= ours.isnan() & theirs.isnan()
    return int((~same).sum())


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _codes(x: Tensor, **options: Any) -> list[Tensor]:
    packed = nvfp4.quantize_nvfp4(x, **options)
    return [packed.codes, packed.scales, packed.amax]


def _operand(quantize: Callable[..., Any], **options: Any) -> Callable[[Tensor], list[Tensor]]:
    def call(x: Tensor) -> list[Tensor]:
        operand = quantize(x, **options)
        return [operand.values, operand.scale]

    return call


CASES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "NVFP4 codes and scales": _codes,
    "NVFP4 codes, 16 x 16": lambda x: _codes(x, block="2d"),
    "NVFP4 1 x 16": _operand(nvfp4.nvfp4_operand),
    "NVFP4 1 x 16 at random": _operand(nvfp4.nvfp4_operand, random_words=WORDS),
    "NVFP4 16 x 1 at random": _operand(nvfp4.nvfp4_operand, dim=0, random_words=WORDS),
    "NVFP4 16 x 16": _operand(nvfp4.nvfp4_operand, block="2d"),
    "MXFP8 1 x 32": _operand(mxfp8.mxfp8_operand),
    "MXFP8 32 x 1": _operand(mxfp8.mxfp8_operand, dim=0),
}
