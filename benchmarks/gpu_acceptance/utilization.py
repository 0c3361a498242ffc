"""Stage 7: model FLOPs utilization of whole training steps in BF16."""

import math
import statistics

import torch

from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.training import Steps, configuration, free_memory, runtime_of
from nemotron_train.platform.device import peak_flops


def run(report: Report) -> None:
    """Each shape in turn, with the step's median. FLOPs a token are the plan's, the peak is that of
    the table in plan/hardware.py."""
    setting, parts = report.setting, []
    warm_up, measured = setting.sizes.steps
    for shape in setting.sizes.shapes:
        config = configuration(setting, shape)
        with runtime_of(config) as (runtime, groups):
            steps = Steps(setting, config, runtime, groups)
            first = [steps.take() for _ in range(warm_up)]
            torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(steps.take() for _ in range(measured))
        derived, peak = steps.derived, peak_flops()
        rate = derived.tokens_per_step / seconds
        flops = rate * derived.training_flops_per_token
        utilization = flops / peak if peak else math.nan
        report.row(
            "steps",
            shape=shape,
            parameters=f"{derived.parameters / 1e6:.0f} M",
            active=f"{derived.active_parameters / 1e6:.0f} M",
            tokens_a_step=derived.tokens_per_step,
            first_step_s=round(first[0], 2),
            step_ms=round(seconds * 1e3, 1),
            tokens_per_second=round(rate),
            TFLOP_per_second=round(flops / 1e12, 2),
            MFU=f"{utilization:.2%}",
            peak_GiB=round(torch.cuda.max_memory_allocated() / 2**30, 2),
            losses=f"{steps.losses[0]:.3f} to {steps.losses[-1]:.3f}",
        )
        parts.append(f"{shape} {utilization:.2%} ({rate:,.0f} tokens/s)")
        report.figure = ", ".join(parts)
        if not all(map(math.isfinite, steps.losses)):
            raise Fail(f"{shape}: the loss is not finite: {steps.losses}")
        del steps
        free_memory()
