"""Stage 8: the scan and the kernels against what the memory allows.

The floor is the bytes that must be moved, at the rate of a large copy on the same device. For the
scan also the FLOPs of its products at the peak of the table; the larger of the two counts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import triton_kernels
from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.scan import operands
from benchmarks.gpu_acceptance.setting import first_line, joined
from nemotron_train.model.mamba.core import ssd
from nemotron_train.plan.switches import MAMBA_SSM
from nemotron_train.platform import packages
from nemotron_train.platform.device import peak_flops

# Times the floor. Guesses: no earlier figure exists.
QUANTIZER_BOUND, SCAN_BOUND = 4.0, 25.0
_COPIED_BYTES = 1 << 30


def run(report: Report) -> None:
    """Fails if a quantizer, or mamba_ssm's scan, is further from its floor than its bound."""
    setting, slow = report.setting, []
    rate = copy_rate(report)
    worst = {"quantizers": 0.0, "other kernels": 0.0, "scan": 0.0}
    cases: list[tuple[str, str, float, Callable[[], object]]] = [
        (
            "quantizers" if "FP" in case.name else "other kernels",
            case.name,
            case.num_bytes / rate,
            case.ours,
        )
        for case in triton_kernels.cases(setting.sizes.tokens, setting.sizes.width)
    ]
    for kind, name, floor, call in [*cases, *scan_cases(report, rate)]:
        try:
            seconds = setting.seconds(call)
        except Exception as error:
            slow.append(f"{name}: {first_line(error)}")
            continue
        ratio = seconds / floor
        report.row(
            "against the floor",
            kernel=name,
            us=round(seconds * 1e6, 1),
            floor_us=round(floor * 1e6, 1),
            times_the_floor=round(ratio, 2),
        )
        worst[kind] = max(worst[kind], ratio)
        report.figure = f"copy {rate / 1e12:.2f} TB/s; times the floor, at most: " + ", ".join(
            f"{key} {value:.1f}" for key, value in worst.items()
        )
        bound = _bound(kind)
        if not setting.pretend and bound and ratio > bound:
            slow.append(f"{name}: {ratio:.1f} times its floor, the bound is {bound:.0f}")
    if slow:
        raise Fail(joined(slow))


def _bound(kind: str) -> float:
    """0: none. Only mamba_ssm's scan has one: torch's operators are no kernel."""
    if kind == "quantizers":
        return QUANTIZER_BOUND
    return SCAN_BOUND if kind == "scan" and packages.is_usable(MAMBA_SSM) else 0.0


def copy_rate(report: Report) -> float:
    """Bytes read and written a second by a copy much larger than the caches."""
    size = 1 << 20 if report.setting.pretend else _COPIED_BYTES
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    rate = 2 * size / report.setting.seconds(partial(source.clone().copy_, source))
    report.row("rates", what="copy, read and written", GB_per_second=round(rate / 1e9))
    return rate


def scan_cases(report: Report, rate: float) -> list[tuple[str, str, float, Callable[[], object]]]:
    """The scan forward, and forward and backward, in BF16."""
    shape = report.setting.sizes.scan
    chunk = shape[-1]
    *inputs, _ = operands(shape, torch.bfloat16)
    leaves = [t.requires_grad_() for t in inputs]
    scan: Callable[..., Any] = partial(ssd, chunk_size=chunk)

    @torch.no_grad()
    def forward() -> object:
        return scan(*leaves)

    def both() -> object:
        y = scan(*leaves)
        return torch.autograd.grad(y, leaves, y.detach())

    moved, flops = scan_bytes(shape), scan_flops(shape)
    peak = peak_flops()

    def floor(share: float, multiple: int) -> float:
        return max(share / rate, multiple * flops / peak if peak else 0.0)

    name = MAMBA_SSM if packages.is_usable(MAMBA_SSM) else "ours"
    return [
        ("scan", f"scan forward, {name}", floor(moved, 1), forward),
        ("scan", f"scan forward and backward, {name}", floor(3 * moved, 3), both),
    ]


def scan_bytes(shape: tuple[int, int, int, int, int, int, int]) -> float:
    """Bytes that the forward pass must move: x, B and C in BF16 and dt in FP32 are read, y is
    written. The backward pass reads these and the output's gradient and writes the operands'
    gradients: twice as many again."""
    batch, length, heads, width, groups, state, _ = shape
    return batch * length * (2 * 2 * heads * width + 2 * 2 * groups * state + 4 * heads)


def scan_flops(shape: tuple[int, int, int, int, int, int, int]) -> float:
    """FLOPs of the forward pass's products (arXiv 2405.21060, section 6): C B^T and its product
    with x inside half of each chunk, and a state made and read a chunk."""
    batch, length, heads, width, groups, state, chunk = shape
    within = chunk * (groups * state + heads * width)
    return batch * length * (within + 4 * heads * width * state)
