"""Routed experts on this CPU: the fastest form of the grouped product, and the cost of permuting
tokens to their experts, ours against Megatron-Core's.

    python -m benchmarks.moe [--threads 2] [--cpu-seconds]

Prints milliseconds of forward and backward, median of runs in turn. `--cpu-seconds` counts this
thread's CPU time instead, with one thread: it varies less on a shared machine and leaves out the
cost of starting threads, which slows down many small products.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nemotron_train.platform.allocator import keep_freed_memory
from nemotron_train.platform.runtime import usable_platform

# Tokens, experts per token, experts, expert input width, expert hidden width.
SHAPES = (
    (2048, 4, 32, 64, 128),  # the step benchmark's
    (2048, 4, 16, 64, 128),
    (2048, 4, 128, 64, 128),
    (2048, 4, 32, 256, 256),
)


def medians(
    functions: dict[str, Callable[[], object]], clock: Callable[[], float], num_runs: int = 15
) -> dict[str, float]:
    """Median milliseconds of each function, run in turn, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(num_runs + 2):
        for name, function in functions.items():
            start = clock()
            function()
            if run >= 2:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def _gradients(function: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function().sum(), inputs)


def measure(shape: tuple[int, ...], dtype: torch.dtype, clock: Callable[[], float]) -> dict:
    """Median milliseconds for one shape of SHAPES: experts packed and padded (with permutation),
    `routed_mlp`, and the permutation alone, ours and Megatron's."""
    from megatron.core.transformer.moe import moe_utils

    from nemotron_train.model.moe import core as ours
    from nemotron_train.model.moe import permutation as rows_by_expert

    num_tokens, num_choices, num_experts, width, hidden = shape
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    experts = scores.topk(num_choices, dim=-1).indices
    x = torch.randn(num_tokens, width, generator=generator).to(dtype).requires_grad_()
    probabilities = torch.rand(num_tokens, num_choices, generator=generator).requires_grad_()
    weight1 = torch.randn(num_experts, hidden, width).to(dtype).requires_grad_()
    weight2 = torch.randn(num_experts, width, hidden).to(dtype).requires_grad_()
    inputs = (x, probabilities, weight1, weight2)

    def routed(max_padding: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            plan = rows_by_expert.plan_permutation(experts, num_experts, max_padding)
            rows = rows_by_expert.permute(x, plan)
            weights = rows_by_expert.permute_probabilities(probabilities, plan)
            y = ours._GroupedMlp.apply(rows, weight1, weight2, weights, plan.rows_per_expert)
            return rows_by_expert.unpermute(y, plan)  # pyright: ignore[reportArgumentType]

        return run

    def move_ours() -> Tensor:
        plan = rows_by_expert.plan_permutation(experts, num_experts, num_tokens)
        weights = rows_by_expert.permute_probabilities(probabilities, plan)
        return rows_by_expert.unpermute(
            rows_by_expert.permute(x, plan) * weights.to(dtype).unsqueeze(1), plan
        )

    def move_megatron() -> Tensor:
        empty = torch.zeros(num_tokens, num_experts)
        chosen = empty.bool().scatter(1, experts, True)
        rows, weights, order, _, _ = moe_utils.permute(
            x,
            chosen,
            probs=empty.scatter(1, experts, probabilities),
            num_out_tokens=experts.numel(),
        )
        assert weights is not None
        return moe_utils.unpermute(rows * weights.to(dtype).unsqueeze(1), order, x.shape)

    return medians(
        {
            "experts packed": _gradients(routed(0), inputs),
            "experts padded": _gradients(routed(num_tokens), inputs),
            "routed_mlp": _gradients(
                lambda: ours.routed_mlp(x, experts, probabilities, weight1, weight2)[0], inputs
            ),
            "moving, ours": _gradients(move_ours, (x, probabilities)),
            "moving, Megatron": _gradients(move_megatron, (x, probabilities)),
        },
        clock,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-seconds", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    usable_platform(1 if options.cpu_seconds else options.threads)
    clock = time.thread_time if options.cpu_seconds else time.perf_counter
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            print("tokens {} top-{} of {} experts {}x{}".format(*shape), dtype)
            for name, milliseconds in measure(shape, dtype, clock).items():
                print(f"  {name:18s} {milliseconds:7.2f} ms")


if __name__ == "__main__":
    main()
