"""Cost of emulated quantization, against a plain copy, the matrix product it feeds, and torchao.

    python -m benchmarks.nvfp4 [--rows 2048] [--columns 1024] [--threads 2] [--device cpu]

Times all kinds in turn for many rounds in one process. Each is given as the median ratio to a copy
in the same round, so other load on the machine affects both. The floor is the minimal memory
traffic (x read twice, once for the tensor's maximum, and the BF16 operand written once) divided by
the copy's bandwidth. The block-scaled product is compared with the plain BF16 product. Quantization
to packed codes is compared with torchao's NVFP4 on the same tensor
(`pip install nemotron-train[benchmark]`), eager and with torch.compile, after a check that codes
and scales agree.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from nemotron_train.precision.gemm import block_scaled_matmul
from nemotron_train.precision.hadamard import hadamard
from nemotron_train.precision.mxfp8 import mxfp8_operand
from nemotron_train.precision.nvfp4 import nvfp4_operand, quantize_nvfp4
from nemotron_train.precision.rounding import RandomWords, random_words

COPY = "copy (BF16)"


def kinds(rows: int, columns: int, device: str) -> dict[str, tuple[Callable[[], object], float]]:
    """Name -> (function to time, minimal memory traffic in bytes per element)."""
    x = torch.randn(rows, columns, device=device).bfloat16()
    target = torch.empty_like(x)
    words = RandomWords(seed=1, stream=1)
    return {
        COPY: (lambda: target.copy_(x), 4),
        "torch.rand": (lambda: torch.rand(rows, columns, device=device), 4),
        "random words": (
            lambda: random_words((rows, columns), seed=1, stream=1, device=device),
            1,
        ),
        "NVFP4 1x16": (lambda: nvfp4_operand(x), 6),
        "NVFP4 16x1": (lambda: nvfp4_operand(x, dim=0), 6),
        "NVFP4 16x16": (lambda: nvfp4_operand(x, block="2d"), 6),
        "NVFP4 1x16 stochastic": (lambda: nvfp4_operand(x, random_words=words), 6),
        "NVFP4 16x1 stochastic": (lambda: nvfp4_operand(x, dim=0, random_words=words), 6),
        "NVFP4 1x16 packed": (lambda: quantize_nvfp4(x), 4.5),
        "Hadamard along rows": (lambda: hadamard(x, dim=0), 4),
        "MXFP8 1x32": (lambda: mxfp8_operand(x), 6),
        "MXFP8 32x1": (lambda: mxfp8_operand(x, dim=0), 6),
    }


def products(rows: int, columns: int, device: str) -> dict[str, Callable[[], object]]:
    """Name -> product [rows, columns] x [columns, columns]. Operands are quantized beforehand,
    except in the last entry."""
    x = torch.randn(rows, columns, device=device).bfloat16()
    w = torch.randn(columns, columns, device=device).bfloat16()
    a, b = nvfp4_operand(x), nvfp4_operand(w, block="2d")
    return {
        "BF16 product": lambda: x @ w.t(),
        "block-scaled, BF16 result": lambda: block_scaled_matmul(a, b),
        "block-scaled, FP32 result": lambda: block_scaled_matmul(a, b, out_dtype=torch.float32),
        "quantize x and w, then product": lambda: block_scaled_matmul(
            nvfp4_operand(x), nvfp4_operand(w, block="2d")
        ),
    }


def against_torchao(rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """Name -> quantization of one tensor to packed codes, ours first; {} without torchao."""
    if find_spec("torchao") is None:
        return {}
    from torchao.prototype.mx_formats.nvfp4_tensor import (  # pyright: ignore[reportMissingImports]
        nvfp4_quantize,
        per_tensor_amax_to_scale,
    )

    def theirs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = per_tensor_amax_to_scale(x.abs().amax().float())
        return nvfp4_quantize(x, per_tensor_scale=scale)

    x = torch.randn(rows, columns).bfloat16()
    ours, (their_scales, their_codes) = quantize_nvfp4(x), theirs(x)
    # Their block scales are rounded differently: for some amax, a few in a thousand differ.
    for our_part, their_part in ((ours.codes, their_codes), (ours.scales, their_scales)):
        assert (our_part == their_part.view(torch.uint8).view_as(our_part)).float().mean() > 0.98
    compiled = torch.compile(theirs)
    return {
        "ours": lambda: quantize_nvfp4(x),
        "torchao, torch.compile": lambda: compiled(x),
        "torchao": lambda: theirs(x),
    }


def time_in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What emulated quantization costs")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, columns = arguments.rows, arguments.columns
    num_elements = rows * columns

    table = kinds(rows, columns, arguments.device)
    seconds = time_in_turn({name: timed for name, (timed, _) in table.items()}, arguments.rounds)
    print(f"{rows} x {columns} BF16, {arguments.device}, {arguments.threads} threads, medians")
    print(f"{'kind':32}{'ns/element':>12}{'GB/s':>8}{'x copy':>8}{'x floor':>9}")
    for name, (_, num_bytes) in table.items():
        nanoseconds = statistics.median(seconds[name]) / num_elements * 1e9
        ratio = statistics.median(
            mine / copy for mine, copy in zip(seconds[name], seconds[COPY], strict=True)
        )
        of_floor = ratio * table[COPY][1] / num_bytes
        print(
            f"{name:32}{nanoseconds:12.3f}{num_bytes / nanoseconds:8.1f}{ratio:8.1f}{of_floor:9.1f}"
        )
    _compare("product", "x BF16", products(rows, columns, arguments.device), arguments.rounds)
    if arguments.device != "cpu":
        return
    contest = against_torchao(rows, columns)
    if not contest:
        print("\ntorchao is not installed: not compared with it")
        return
    _compare("to packed codes", "x ours", contest, max(3, arguments.rounds // 3))


def _compare(
    title: str, ratio_title: str, functions: dict[str, Callable[[], object]], rounds: int
) -> None:
    """Prints each function's median and the median of its ratios to the first function."""
    print(f"\n{title:32}{'ms':>12}{ratio_title:>8}")
    seconds = time_in_turn(functions, rounds)
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(
            value / reference for value, reference in zip(values, first, strict=True)
        )
        print(f"{name:32}{statistics.median(values) * 1e3:12.2f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
