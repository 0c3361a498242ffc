"""The Triton kernels on a GPU: GB/s against their floors, and their numbers against torch's.

    python -m benchmarks.triton_kernels [--tokens 16384] [--width 8192]

Needs a GPU; without one it says so and exits with 2. It has never run on one. For each kernel it
prints the time, the bytes that the kernel must move (its docstring derives them) per second, and
this rate relative to that of a large copy, which is what the memory gives at best: 100% is the
floor. Then the time of the torch form, and how far the results are from it: the number of unequal
elements for quantizers and gathers, which must be 0, else the largest difference relative to the
largest element. Times are medians over repetitions with a cold cache (triton.testing.do_bench).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nemotron_train.model.mamba.convolution import causal_conv
from nemotron_train.model.mamba.core import ssd
from nemotron_train.model.mamba.gated_norm import gated_rms_norm
from nemotron_train.model.moe import permutation
from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.nvfp4 import nvfp4_operand
from nemotron_train.precision.rounding import RandomWords

_GROUPS, _TAPS, _EXPERTS, _CHOICES, _DOCUMENT = 8, 4, 128, 6, 1000
_HEAD, _STATE, _CHUNK = 64, 128, 128


@dataclass(frozen=True)
class Case:
    """A kernel: its name, the bytes that it must move, the call, the torch form, and whether the
    two must be equal bit for bit."""

    name: str
    num_bytes: float
    ours: Callable[[], object]
    theirs: Callable[[], object]
    exact: bool = False


def main() -> int:
    """Prints one line a kernel. 0, or 1 if results differ from torch's, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description="Triton kernels against their floors; needs a GPU")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=8192, help="a multiple of 16 x groups (128)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.triton_kernels: needs a GPU, and torch finds none here", file=sys.stderr)
        return 2
    from nemotron_train.kernels.triton import available

    reason = available.failure(torch.device("cuda"))
    if reason:
        print(f"benchmarks.triton_kernels: Triton does not work here: {reason}", file=sys.stderr)
        return 2
    return _measure(arguments.tokens, arguments.width)


def _measure(tokens: int, width: int) -> int:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy_rate = 2 * source.numel() / _seconds(partial(source.clone().copy_, source))
    print(
        f"{torch.cuda.get_device_name()}, copy {copy_rate / 1e9:.0f} GB/s, {tokens} x {width} BF16"
    )
    del source
    print(f"{'kernel':32}{'us':>9}{'GB/s':>8}{'of copy':>9}{'torch us':>10}  difference")
    faults = 0
    for case in cases(tokens, width):
        found, is_right = difference(case)
        faults += not is_right
        seconds, theirs = _seconds(case.ours), _seconds(case.theirs)
        rate = case.num_bytes / seconds
        print(
            f"{case.name:32}{seconds * 1e6:9.1f}{rate / 1e9:8.0f}{rate / copy_rate:9.0%}"
            f"{theirs * 1e6:10.1f}  {found}{'' if is_right else '  WRONG'}"
        )
    return 1 if faults else 0


def _seconds(function: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(function, return_mode="median") / 1e3  # pyright: ignore


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return list(result) if isinstance(result, tuple) else [result.values, result.scale]  # pyright: ignore


def difference(case: Case) -> tuple[str, bool]:
    """The difference in words, and whether it is within what BF16 roundings explain."""
    pairs = list(zip(_tensors(case.ours()), _tensors(case.theirs()), strict=True))
    if case.exact:
        unequal = sum(int((one != other).sum()) for one, other in pairs)
        return f"{unequal} unequal", unequal == 0
    sizes = [
        float((one.float() - other.float()).abs().max() / other.float().abs().max())
        for one, other in pairs
    ]
    return f"{max(sizes):.1e}", max(sizes) < 2.0**-6


def cases(tokens: int, width: int, device: str = "cuda") -> list[Case]:
    """All kernels, on noise of [tokens, width] in BF16."""
    x = torch.randn(tokens, width, device=device).bfloat16()
    return [
        *_quantizer_cases(x),
        *_layer_cases(x.unsqueeze(0)),
        *_permutation_cases(x),
        *_scan_cases(x.unsqueeze(0)),
    ]


def _in_torch(function: Callable[[], object]) -> Callable[[], object]:
    """The call with the Triton forms switched off."""
    from nemotron_train.kernels.triton import available

    def call() -> object:
        can_use = available.can_use
        available.can_use = lambda *tensors: False
        try:
            return function()
        finally:
            available.can_use = can_use

    return call


def _quantizer_cases(x: Tensor) -> list[Case]:
    words = RandomWords(seed=1, stream=2, step=3)
    calls = {
        "NVFP4 1x16": partial(nvfp4_operand, x),
        "NVFP4 1x16 stochastic": partial(nvfp4_operand, x, random_words=words),
        "NVFP4 16x1": partial(nvfp4_operand, x, dim=0),
        "NVFP4 16x1 stochastic": partial(nvfp4_operand, x, dim=0, random_words=words),
        "NVFP4 16x16": partial(nvfp4_operand, x, block="2d"),
        "MXFP8 1x32": partial(mxfp8_operand, x),
        "MXFP8 32x1": partial(mxfp8_operand, x, dim=0),
    }
    # Two bytes for the tensor's maximum, two to read and two to write.
    return [Case(n, 6 * x.numel(), call, _in_torch(call), exact=True) for n, call in calls.items()]


def _layer_cases(x: Tensor) -> list[Case]:
    channels, device = x.shape[2], x.device
    weight, bias = torch.randn(channels, _TAPS + 1, device=device).split([_TAPS, 1], dim=1)
    ids = (torch.arange(x.shape[1], device=device) // _DOCUMENT).unsqueeze(0)
    gate, scale = torch.randn_like(x), torch.ones(channels, device=device)
    norm = partial(gated_rms_norm, group_size=channels // _GROUPS, epsilon=1e-5)
    conv = partial(causal_conv, document_ids_BS=ids)
    found = []
    for name, layer, inputs, forward_bytes, backward_bytes in (
        ("convolution", conv, (x, weight, bias[:, 0]), 4, 6),
        ("gated norm", norm, (x, gate, scale), 6, 10),
    ):
        forward = partial(layer, *inputs)
        found.append(
            Case(
                name,
                forward_bytes * x.numel(),
                _without_gradients(forward),
                _without_gradients(_in_torch(forward)),
            )
        )
        leaves = [t.clone().requires_grad_() for t in inputs]
        ours, theirs = layer(*leaves), layer(*leaves, force_torch=True)
        found.append(
            Case(
                f"{name}, backward",
                backward_bytes * x.numel(),
                partial(torch.autograd.grad, ours, leaves, gate, retain_graph=True),
                partial(torch.autograd.grad, theirs, leaves, gate, retain_graph=True),
            )
        )
    return found


def _without_gradients(function: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(function)


def _permutation_cases(x: Tensor) -> list[Case]:
    experts = torch.rand(len(x), _EXPERTS, device=x.device).topk(_CHOICES).indices
    plan = permutation.plan_permutation(experts, _EXPERTS, is_grouped=x.is_cuda)
    rows = permutation.permute(x, plan)
    calls = {
        "gather rows": (partial(permutation.permute, x, plan), True),
        "sum rows": (partial(permutation.unpermute, rows, plan), False),
    }
    both = 2 * (x.numel() + rows.numel())
    return [
        Case(name, both, call, _in_torch(call), is_exact)
        for name, (call, is_exact) in calls.items()
    ]


def _scan_cases(x: Tensor) -> list[Case]:
    """Our scan with Nemotron 3 Nano's head, group and state sizes; scan.py derives the bytes. The
    other form is torch's chunked one, also where mamba_ssm is installed."""
    num_tokens, heads = x.shape[1], x.shape[2] // _HEAD
    values = x.unflatten(2, (heads, _HEAD))
    groups = min(_GROUPS, heads)
    B, C = (x.new_empty(1, num_tokens, groups, _STATE).normal_(std=1 / 8) for _ in range(2))
    dt = torch.rand(1, num_tokens, heads, device=x.device) / 16
    inputs = (
        values,
        dt,
        -torch.rand(heads, device=x.device),
        B,
        C,
        torch.ones(heads, device=x.device),
    )
    ids = (torch.arange(num_tokens, device=x.device) // _DOCUMENT).unsqueeze(0)
    states, scores = 16 * x.shape[2] * _STATE // _CHUNK, 4 * groups * _CHUNK
    forward = 4 * x.shape[2] + 4 * groups * _STATE + states + scores + 40 * heads
    backward = 10 * x.shape[2] + 8 * groups * _STATE + 2 * states + 2 * scores + 80 * heads

    def ours(*tensors: Tensor) -> Tensor:
        from nemotron_train.model.mamba.triton_scan import TritonSsd

        return TritonSsd.apply(*tensors, None, ids, _CHUNK)[0]  # pyright: ignore

    def theirs(*tensors: Tensor) -> Tensor:
        return ssd(*tensors, chunk_size=_CHUNK, document_ids_BS=ids, force_torch=True)

    one, other = (_without_gradients(partial(form, *inputs)) for form in (ours, theirs))
    leaves = [t.clone().requires_grad_() for t in inputs]
    gradients, their_gradients = (
        partial(torch.autograd.grad, form(*leaves), leaves, values, retain_graph=True)
        for form in (ours, theirs)
    )
    return [
        Case("scan", forward * num_tokens, one, other),
        Case("scan, backward", backward * num_tokens, gradients, their_gradients),
    ]


if __name__ == "__main__":
    sys.exit(main())
