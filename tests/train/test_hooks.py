"""What the log's lines say of the steps between them.

Not covered: the other hooks, which runs exercise (tests/run_folder, tests/faults).
"""

from typing import Any

import pytest

from nemotron_train.data.blend import DataState
from nemotron_train.run_folder.progress import Progress, StepResult
from nemotron_train.train.hooks import Log
from nemotron_train.train.step_clock import StepClock


class Lines:
    """Takes what a MetricsWriter would write."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, numbers: dict[str, Any]) -> None:
        self.rows.append(numbers)


def test_a_line_holds_the_mean_step_since_the_line_before() -> None:
    """Steps of 1 to 7 seconds, a line every three. By hand: the first step has a line, too; then
    2 and 3; then 4, 5, 6; the last step alone."""
    lines, clock = Lines(), StepClock()
    log = Log(
        lines,  # type: ignore[arg-type]
        None,
        every_steps=3,
        also_every_steps=0,
        last_step=7,
        tokens_per_step=600,
        flops_per_token=10.0,
        peak_flops=5000.0,
        clock=clock,
    )
    data = DataState("train", 64, 0, "")
    for step in range(1, 8):
        clock.begin()
        clock.lap("data")
        log.run(Progress(step, 600 * step, data), StepResult(Progress(step, 0, data), {}, step))
    assert [row["step"] for row in lines.rows] == [1, 3, 6, 7]
    seconds = [1.0, 2.5, 5.0, 7.0]
    assert [row["step_seconds"] for row in lines.rows] == pytest.approx(seconds)
    speeds = [600 / mean for mean in seconds]
    assert [row["tokens_per_second"] for row in lines.rows] == pytest.approx(speeds)
    utilization = [10 * speed / 5000 for speed in speeds]
    assert [row["model_flops_utilization"] for row in lines.rows] == pytest.approx(utilization)
