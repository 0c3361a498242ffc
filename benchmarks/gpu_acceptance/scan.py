"""Stage 3: the state-space scan that runs take and torch's chunked form, against float64.

A run takes mamba_ssm's where it can be used, else ours.

Shape suffixes as in model/mamba/core.py.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_acceptance.results import Fail, Report, Skip
from nemotron_train.model.mamba.core import ssd
from nemotron_train.plan.switches import MAMBA_SSM
from nemotron_train.platform import packages

# Largest difference over the largest element. mamba_ssm's FP32 products are TF32 (10 mantissa
# bits); BF16 results were within 1.7e-2 of each other under Triton's interpreter.
BOUNDS = {torch.float32: 5e-3, torch.bfloat16: 4e-2}
NAMES = ("y", "final state", "dx", "ddt", "dA", "dB", "dC", "dD", "d initial state")


def run(report: Report) -> None:
    """Compares both; skipped at the end where mamba_ssm's is not among them."""
    problem = packages.problem(MAMBA_SSM)
    wrong, largest = [], 0.0
    for dtype in BOUNDS:
        inputs = operands(report.setting.sizes.compared_scan, dtype)
        truth = _results([t.double() for t in inputs], report, force_torch=True)
        sides = {"chunked torch": True, "ours" if problem else MAMBA_SSM: False}
        for side, force_torch in sides.items():
            found = _results(inputs, report, force_torch=force_torch)
            for name, one, other in zip(NAMES, found, truth, strict=True):
                error = float((one.double() - other).abs().max() / other.abs().max())
                kind = str(dtype).removeprefix("torch.")
                report.row(
                    "against float64", scan=side, dtype=kind, what=name, error=f"{error:.1e}"
                )
                if not error <= BOUNDS[dtype]:
                    wrong.append(f"{side}, {kind}, {name}: {error:.1e} of {BOUNDS[dtype]:.0e}")
                largest = max(largest, error)
        report.figure = f"{' and '.join(sides)}: at most {largest:.1e} from float64"
    if wrong:
        raise Fail("; ".join(wrong[:3]))
    if problem:
        raise Skip(f"mamba_ssm: {problem}; only ours was compared")


def operands(shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, dt, A, B, C, D and the initial state, as an untrained model has them."""
    batch, length, heads, width, groups, state, _ = shape
    draws = torch.Generator().manual_seed(5)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=draws)

    dt = 0.001 * 100.0 ** torch.rand(batch, length, heads, generator=draws)
    A = -(1 + 15 * torch.rand(heads, generator=draws))
    found = [
        noise(batch, length, heads, width).to(dtype),
        dt,
        A,
        noise(batch, length, groups, state).to(dtype),
        noise(batch, length, groups, state).to(dtype),
        noise(heads),
        noise(batch, heads, width, state),
    ]
    return [t.to("cuda") for t in found]


def documents(batch: int, length: int, chunk: int) -> Tensor:
    """Document ids [B, S] that change on a border of a chunk and inside one."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    ids[:, chunk:] += 1
    ids[:, chunk + chunk // 3 :] += 1
    return ids.to("cuda")


def _results(inputs: list[Tensor], report: Report, *, force_torch: bool) -> list[Tensor]:
    """y, the final state and the gradient of each operand."""
    batch, length, _, _, _, _, chunk = report.setting.sizes.compared_scan
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    initial = leaves[-1]
    y, final = ssd(
        *leaves[:-1],
        chunk_size=chunk,
        document_ids_BS=documents(batch, length, chunk),
        initial_state_BHPN=initial,
        return_final_state=True,
        force_torch=force_torch,
    )
    draws = torch.Generator().manual_seed(6)
    outputs: list[Any] = [y, final]
    noises = [torch.randn(t.shape, generator=draws).to("cuda").to(t.dtype) for t in outputs]
    gradients = torch.autograd.grad(outputs, leaves, noises)
    return [y.detach(), final.detach(), *gradients]
