"""`plan`'s peak memory against the measured one: live tensor bytes of a step, rank by rank.

Second truth: torch's profiler, which sees every allocation (benchmarks/memory.py). Covers the rows
of the table in docs/parallelism.md: the quick ones here, the others under `make test-layouts`. Not
covered: GPUs, the C library's own memory, expert loads far from the assumed one.
"""

import pytest

from benchmarks.memory import CASES, on_ranks

QUICK = ("FP32, two MTP depths", "tensor 2 + sequence, MTP")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in QUICK else pytest.mark.layouts) for c in CASES],
)
def test_predicted_peak_is_within_ten_percent(case: str) -> None:
    """The persistent state between steps is arithmetic and agrees to 1 %."""
    for row in on_ranks(case):
        assert row["predicted"] == pytest.approx(row["measured"], rel=0.10), (case, row)
        states = row["memory"]
        held = sum(states[f"{name}_bytes"] for name in ("parameter", "gradient", "optimizer"))
        assert held == pytest.approx(row["measured_built"], rel=0.01), (case, row)
