"""Cores of this machine: how many this process may use, how many others use, and threads that leave
them free while they wait. No torch.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

_STAT = Path("/proc/stat")
_CGROUPS = Path("/sys/fs/cgroup")
_SPINS = "3000"  # iterations, about ten microseconds; libgomp's default is 300,000
_BUSY = (0, 1, 2, 5, 6, 7)  # columns of /proc/stat: user, nice, system, irq, softirq, steal


def wait_without_spinning() -> None:
    """Let waiting OpenMP threads sleep after a moment. Call before torch is imported; a user's own
    setting stays.

    A thread of libgomp that has no work spins for milliseconds by default. On cores that several
    processes share, the spinning threads take the time of the working ones. Threads that sleep at
    once (OMP_WAIT_POLICY=PASSIVE) cost a sixth of the speed on a machine of one's own, because
    waking one takes microseconds and a step has thousands of parallel loops. This count costs 7 %
    there and nothing on shared cores: docs/reliability.md has the figures.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def usable_cores(cgroups: Path = _CGROUPS) -> int:
    """The cores this process may use: those of its affinity mask, and no more than the CPU time
    that its container is given (cgroup version 2, `cpu.max` of any level)."""
    cores = len(os.sched_getaffinity(0))
    for folder in _levels(cgroups):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _levels(cgroups: Path) -> list[Path]:
    """The folder of this process's cgroup and those above it."""
    try:
        line = next(
            line
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
    except (OSError, StopIteration):
        return [cgroups]
    own = cgroups / line.removeprefix("0::/")
    return [own, *(parent for parent in own.parents if parent.is_relative_to(cgroups))]


@dataclass(frozen=True)
class CoreTimes:
    """CPU seconds since the machine's start, of the cores of this process's affinity mask and of
    this process alone, at one moment."""

    moment: float
    machine: float
    own: float


def core_times(stat: Path = _STAT) -> CoreTimes | None:
    """The CPU times now; None where the system does not tell them."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        rows = [line.split() for line in stat.read_text().splitlines()]
        ticks = sum(int(row[1 + i]) for row in rows if row and row[0] in names for i in _BUSY)
    except (OSError, ValueError, IndexError):
        return None
    own = os.times()
    return CoreTimes(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system)


# Taken at the first import of the package, so that the seconds in which torch is imported tell how
# busy the machine is.
PROCESS_START = core_times()


def cores_of_others(start: CoreTimes | None, end: CoreTimes | None, local_ranks: int = 1) -> float:
    """Mean number of cores that other processes used between two `core_times`; 0 if unknown.

    The other ranks of a launch on this machine count as this one: they do the same.
    """
    if start is None or end is None or end.moment <= start.moment:
        return 0.0
    own = (end.own - start.own) * local_ranks
    return max(0.0, (end.machine - start.machine - own) / (end.moment - start.moment))


def sharing_text(start: CoreTimes | None, local_ranks: int = 1) -> str:
    """Words for a run's first line if other processes have used a core or a tenth of the cores
    since `start`; else empty."""
    others = cores_of_others(start, core_times(), local_ranks)
    cores = usable_cores()
    if others < max(0.5, cores / 10):
        return ""
    return f"shared: other processes use {others:.1f} of {cores} cores"
