"""Memory, descriptors, threads and files stay flat over save and load cycles in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CYCLE = Path(__file__).with_name("cycle.py")


@pytest.mark.faults
@pytest.mark.parametrize("cycles", [75, 500])
def test_cycles_leave_nothing_behind(small_run, cycles: int) -> None:
    """The first 50 cycles warm up the allocator and caches. After them descriptors, threads,
    children and files stay constant, and the bytes in use on the heap grow by at most 16 KiB per
    cycle, a three-hundredth of the state. About 10 KiB were observed; their owner was not found (no
    Python object that the collector knows). The resident set is not checked: it follows the
    allocator."""
    folder, common = small_run
    done = subprocess.run(
        [sys.executable, str(CYCLE), str(cycles), *common, f"name=cycles_{cycles}"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows[-1]["cycle"] == cycles
    warm, last = rows[1], rows[-1]
    for name in ("descriptors", "threads", "children", "folder"):
        assert last[name] == warm[name], rows
    assert last["heap"] - warm["heap"] <= 16 * 1024 * (cycles - 50), rows
