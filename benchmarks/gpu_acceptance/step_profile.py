"""Stage 6: where the host waits in a training step, and what the GPU does in it.

On a GPU: torch's debug mode warns at each operation that makes the host wait, and its profiler
records the kernels. On a pretended device: the waits that it counts, and the CPU's operators.
"""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_acceptance.results import Fail, Report
from benchmarks.gpu_acceptance.training import Steps, configuration, runtime_of

MOST_WAITS = 12  # a step, without those of SCAN: the bound of tests/platform/test_pretended_cuda.py
# The chunked scan in torch asks the host a question a layer and micro-batch. No other scan does.
SCAN = "mamba/scan_operands.py"
_PACKAGES = ("nemotron_train/", "megatron/", "transformer_engine/", "mamba_ssm/")
_ROWS = 15  # of a table


def run(report: Report) -> None:
    """One step for the waits and one for the profile, after the first ones."""
    setting = report.setting
    config = configuration(setting, "proxy_100m")
    with runtime_of(config) as (runtime, groups):
        steps = Steps(setting, config, runtime, groups)
        for _ in range(setting.sizes.steps[0] + 1):
            seconds = steps.take()
        waits = _pretended_waits(steps) if setting.pretend else _waits(steps)
        of_scan = sum(count for line, count in waits.items() if SCAN in line)
        others = sum(waits.values()) - of_scan
        for line, count in waits.most_common(_ROWS):
            report.row("waits of the host in a step", count=count, where=line)
        report.figure = f"{others} waits a step and {of_scan} of the chunked scan"
        with profile(activities=_activities(setting.pretend)) as profiler:
            profiled = steps.take()
        if setting.pretend:
            _operators(report, profiler)
        else:
            _kernels(report, profiler, seconds, profiled)
    if others > MOST_WAITS:
        line, count = waits.most_common(1)[0]
        raise Fail(f"more than {MOST_WAITS} waits a step, most ({count}) at {line}")


def _activities(pretend: bool) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + ([] if pretend else [ProfilerActivity.CUDA])


def _waits(steps: Steps) -> Counter[str]:
    """Source lines of ours and of the libraries that we drive -> waits in one step."""
    with _counted() as found:
        steps.take()
    return found


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Counts the warnings that torch gives for each operation that waits."""
    found: Counter[str] = Counter()

    def note(message: Any, *rest: Any, **more: Any) -> None:
        if "synchronizing" in str(message):
            found[_caller()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _caller() -> str:
    """The innermost line of ours or of a library that we drive, and the innermost of ours."""
    lines = []
    for frame, number in traceback.walk_stack(sys._getframe(2)):
        name = frame.f_code.co_filename
        if any(package in name for package in _PACKAGES):
            is_ours = "nemotron_train/" in name
            if is_ours or not lines:
                lines.append(
                    f"{name.split('site-packages/')[-1].split('/nemotron_train/')[-1]}:{number}"
                )
            if is_ours:
                break
    return " < ".join(lines) or "outside"


def _pretended_waits(steps: Steps) -> Counter[str]:
    """The same as the pretended device counts them, without this stage's own."""
    from tests.platform.pretend.device import STATE

    STATE.clear()
    steps.take()
    found: Counter[str] = Counter()
    for line, count in STATE.by_line.items():
        kind, _, where = line.partition(" @ ")
        if kind in STATE.waits and where:
            found[f"{where} ({kind})"] += count
    return found


def _kernels(report: Report, profiler: Any, seconds: float, profiled: float) -> None:
    """Tables of the kernels by time and of the driver's calls that wait."""
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    spans = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            counts[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
        elif "Synchronize" in event.name or event.name == "cudaMemcpy":
            calls[event.name] += 1
    total = sum(times.values())
    for name, time in times.most_common(_ROWS):
        share = f"{time / max(total, 1e-9):.1%}"
        report.row(
            "kernels by time",
            kernel=name[:120],
            calls=counts[name],
            ms=round(time / 1e3, 2),
            share=share,
        )
    for name, count in calls.most_common():
        report.row("calls of the driver that wait", call=name, count=count)
    busy = covered(spans) / 1e6
    report.row("step", what="seconds", value=round(seconds, 4))
    report.row("step", what="seconds under the profiler", value=round(profiled, 4))
    report.row("step", what="seconds in which a kernel ran", value=round(busy, 4))
    share = f"{busy / seconds:.0%} of {seconds * 1e3:.0f} ms"
    report.figure += f"; {sum(counts.values()):,} kernels, which fill {share}"


def covered(spans: list[tuple[float, float]]) -> float:
    """The length that intervals cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _operators(report: Report, profiler: Any) -> None:
    """A table of the CPU's operators by time."""
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:_ROWS]:
        share = f"{row.self_cpu_time_total / max(total, 1e-9):.1%}"
        report.row(
            "operators by time (of this CPU)", operator=row.key, calls=row.count, share=share
        )
    report.figure += f"; {sum(row.count for row in rows):,} operators on this CPU"
