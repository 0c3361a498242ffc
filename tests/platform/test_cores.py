"""Cores that are shared: threads that sleep while they wait, quotas of containers, what others use.

Second truths: OpenMP's own report of its settings; a process that burns a core. Not covered: cgroup
version 1, kernels other than Linux.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_train.platform import cores

SHOW = "import nemotron_train, torch; torch.ones(3).sum()"


@pytest.mark.parametrize(
    "setting, spins",
    [
        ({}, 3000),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 0),
        ({"GOMP_SPINCOUNT": "77"}, 77),
    ],
)
def test_waiting_threads_sleep(setting: dict[str, str], spins: int) -> None:
    """libgomp prints the settings it took when it was loaded with torch."""
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"} | setting,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.parametrize(
    "quota, expected",
    [("max 100000", 64), ("250000 100000", 3), ("50000 100000", 1), ("torn", 64), (None, 64)],
)
def test_a_containers_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores.usable_cores(tmp_path) == expected


def test_what_others_use() -> None:
    """A process that burns a core shows as about one core more; this one's own work does not. A
    machine whose cores are all busy already cannot give it one: then both figures are high."""
    idle = cores.core_times()
    time.sleep(0.3)
    before = cores.cores_of_others(idle, cores.core_times())
    burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        start = cores.core_times()
        while (now := cores.core_times()) and start and now.moment < start.moment + 0.5:
            pass  # its own work
        with_other = cores.cores_of_others(start, now)
    finally:
        burn.kill()
        burn.wait()
    assert 0 <= before <= len(os.sched_getaffinity(0)) + 0.2
    assert with_other >= min(before + 0.2, 0.5)


def test_ranks_of_the_same_launch_are_not_others() -> None:
    start, end = cores.CoreTimes(0, 100, 1), cores.CoreTimes(10, 120, 11)
    assert cores.cores_of_others(start, end, local_ranks=2) == 0
    assert cores.cores_of_others(start, end) == 1
    assert cores.cores_of_others(None, end) == 0


def test_the_first_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    start = cores.CoreTimes(0, 100, 1)
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    monkeypatch.setattr(cores, "core_times", lambda: cores.CoreTimes(10, 126, 11))
    assert cores.sharing_text(start) == "shared: other processes use 1.6 of 4 cores"
    monkeypatch.setattr(cores, "core_times", lambda: cores.CoreTimes(10, 112, 11))
    assert cores.sharing_text(start) == ""
