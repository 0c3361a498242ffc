"""Run by test_triton.py: the Triton kernels through Triton's compiler and NVIDIA's assembler, for
Hopper (sm_90), on a machine that needs no GPU. Nothing is run.

A stand-in for the driver names the target; every launch compiles and stops there. Quantizers must
contain no fused multiply-add and no flush of subnormals to zero, since both change bits.
"""

import re

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import triton_kernels as benchmark
from nemotron_train.kernels.triton import (
    available,
    convolution,
    elements,
    gated_norm,
    grouped,
    permutation,
    quantize,
    scan,
    scan_backward,
)
from nemotron_train.precision.rounding import RandomWords


class _Hopper:
    """What a launch asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        """The first device."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Compute capability 9.0, warps of 32 threads."""
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list:
    """The compiled form of each kernel that is launched."""
    found, launch = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        found.append(launch(self, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", _Hopper(), raising=False)
    return found


def test_quantizers(compiled: list) -> None:
    x, amax = torch.zeros(64, 128, dtype=torch.bfloat16), torch.ones(())
    quantize.nvfp4_operand(x, 0, amax, None)
    quantize.nvfp4_operand(x, 2, amax, RandomWords(2**63, 1, 2))
    quantize.mxfp8_operand(x.float(), 1, amax)
    quantize.strip_amax(x, 16)
    assert len(compiled) == 4 and all(kernel.asm["cubin"] for kernel in compiled)
    for kernel in compiled:
        assert "fma" not in kernel.asm["ptx"] and ".ftz" not in kernel.asm["ptx"]
        assert ".v4.b32" in kernel.asm["ptx"], "16 bytes are read at a time"


def test_layers(compiled: list) -> None:
    x, taps = torch.zeros(2, 64, 256, dtype=torch.bfloat16), torch.zeros(3, 256)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    convolution.causal_conv(x, taps, taps[0], ids)
    convolution.causal_conv_backward(x, x, taps, taps[0], ids)
    _, scale = gated_norm.rms_norm(x, x, taps[0], 256, 1e-5)
    gated_norm.rms_norm_backward(x, x, x, taps[0], scale)
    choices = torch.zeros(64, 2, dtype=torch.int32)
    permutation.gather_rows(x[0], choices.view(-1))
    permutation.sum_rows(x[0], choices)
    assert len(compiled) == 6 and all(kernel.asm["cubin"] for kernel in compiled)


def test_grouped_products(compiled: list) -> None:
    rows, x = torch.tensor([64, 64]), torch.zeros(128, 256, dtype=torch.bfloat16)
    weights, factors = torch.zeros(2, 256, 256, dtype=torch.bfloat16), torch.ones(128)
    grouped.grouped_product(x, weights.mT, factors, rows, torch.bfloat16)
    grouped.grouped_outer_product(x, x, factors[:2], rows, torch.float32)
    assert len(compiled) == 2 and all(kernel.asm["cubin"] for kernel in compiled)
    assert all("wgmma" in kernel.asm["ptx"] for kernel in compiled)


def test_scan(compiled: list) -> None:
    """Nano's head and state sizes. Offsets: a product of two 32-bit numbers that are known only at
    run time, such as a token and its stride, could overflow, so there is none. Not covered: FP32,
    whose products without tensor cores take minutes to compile."""
    x = torch.zeros(1, 256, 8, 64, dtype=torch.bfloat16)
    B = torch.zeros(1, 256, 2, 128, dtype=torch.bfloat16)
    dt, A = torch.zeros(1, 256, 8), torch.zeros(8)
    arguments = (x, dt, A, B, B, A, None, None, 128)
    scan.scan(*arguments)
    scan_backward.scan_backward(x, None, *arguments)
    assert len(compiled) == 13 and all(kernel.asm["cubin"] for kernel in compiled)
    for kernel in compiled:
        text = kernel.asm["ttir"]
        constants = set(re.findall(r"(%\w+) = arith\.constant", text))
        products = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:i32|tensor<.*xi32>)", text)
        assert all(constants & set(operands) for operands in products), products
    uses_tensor_cores = ["wgmma" in kernel.asm["ptx"] for kernel in compiled]
    assert uses_tensor_cores.count(False) == 3, "all but the passes over the states"


def test_steps_and_seeds_do_not_compile_again(compiled: list) -> None:
    """The counter of random words changes at every call, and must not be part of the key."""
    x = torch.zeros(64, 128, dtype=torch.bfloat16)
    for step, seed in enumerate((0, 1, 16, 2**31, 2**32 - 1, 2**63, 2**64 - 1)):
        quantize.nvfp4_operand(x, 0, torch.ones(()), RandomWords(seed, step, seed & 0xFFFFFFFF))
    assert len({id(kernel) for kernel in compiled}) == 1


def test_without_a_gpu_the_reason_is_given() -> None:
    """No stand-in here. On a machine with a GPU, the reason is that the tensor is on the CPU."""
    assert available.failure(torch.device("cpu"))
    assert elements.as_int32(2**63 + 2**31) == -(2**31)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the benchmark would run")
def test_the_benchmark_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["triton_kernels"])
    assert benchmark.main() == 2
    assert "needs a GPU" in capsys.readouterr().err
