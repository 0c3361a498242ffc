"""Stage 10: the peak of torch's allocator in a step, against the prediction of `plan`.

On a pretended device the tensors are the CPU allocator's, whose timeline torch's profiler records.
"""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.training import Steps, configuration, free_memory, runtime_of
from benchmarks.memory import timeline_of
from nemotron_train.plan.cost.memory import rank_memory
from nemotron_train.plan.cost.operators import GPU

BOUND = 0.15  # of the measured peak, in both directions
_MIB = 2.0**20


def run(report: Report) -> None:
    """The second step of the proxy in BF16, and under the emulated FP4 recipe."""
    setting, parts, wrong = report.setting, [], []
    for plan in ("bf16", "nvfp4_nemotron3"):
        config = configuration(setting, "proxy_100m", f"precision={plan}")
        with runtime_of(config) as (runtime, groups):

            def build() -> Steps:
                return Steps(setting, config, runtime, groups)  # noqa: B023

            steps, lasting, peak = (_recorded if setting.pretend else _measured)(build)
        predicted = rank_memory(config, steps.derived, GPU)[0]
        error = predicted.peak_bytes / peak - 1
        report.row(
            "bytes",
            precision=plan,
            predicted_peak_MiB=round(predicted.peak_bytes / _MIB, 1),
            measured_peak_MiB=round(peak / _MIB, 1),
            prediction=f"{error:+.1%}",
            predicted_between_steps_MiB=round(predicted.lasting_bytes / _MIB, 1),
            measured_between_steps_MiB=round(lasting / _MIB, 1),
            max_vio=round(steps.max_vio, 2),
        )
        parts.append(f"{plan} {error:+.1%} of {peak / _MIB:,.0f} MiB")
        report.figure = ", ".join(parts)
        if abs(error) > BOUND:
            wrong.append(f"{plan}: predicted {error:+.1%}, the bound is {BOUND:.0%}")
        del steps
        free_memory()
    if wrong:
        raise Fail("; ".join(wrong))


def _measured(build: Callable[[], Steps]) -> tuple[Steps, int, int]:
    """(steps, bytes between steps, peak bytes of the second step) of the GPU's allocator."""
    steps = build()
    steps.take()
    torch.cuda.reset_peak_memory_stats()
    steps.take()
    return steps, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def _recorded(build: Callable[[], Steps]) -> tuple[Steps, int, int]:
    """The same of the CPU's allocator."""

    def mark(name: str) -> None:
        with record_function(f"mark {name}"):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps = build()
        steps.take()
        mark("first")
        steps.take()
        mark("second")
    timeline = timeline_of(profiler)
    first, second = timeline.marks["first"], timeline.marks["second"]
    return steps, timeline.at(second), timeline.peak(first, second)
