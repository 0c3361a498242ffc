"""The progress output during a run. Not covered: the look of a bar on a real terminal."""

import io

import pytest
from rich.console import Console

from nemotron_train.train.progress_bar import ProgressDisplay, format_numbers, format_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(num_steps: int, seconds_a_step: float, *, start_step: int = 0, terminal: bool = False):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=110)
    with ProgressDisplay(num_steps, console, start_step=start_step, clock=clock) as display:
        for step in range(start_step + 1, num_steps + 1):
            clock.now += seconds_a_step
            display.update({"step": step, "loss": 9.0 - step, "tokens_per_second": 2310.4})
        display.message("saved [bold] here")
    return out.getvalue()


def test_lines_come_at_a_readable_rate() -> None:
    """First and last step, and between them at most one line in two seconds."""
    lines = run(100, 0.5).splitlines()
    assert lines[0] == "step   1/100  loss 8.0000  2,310 tokens/s  0:50 left"
    assert lines[1].startswith("step   5/100")
    assert lines[-2].startswith("step 100/100") and lines[-2].endswith("0:00 left")
    assert lines[-1] == "saved [bold] here"
    assert len(lines) == 27


def test_a_long_run_prints_less() -> None:
    """A day of one-second steps: about one line in 30 s."""
    assert 86_400 / 30 <= len(run(86_400, 1.0).splitlines()) < 86_400 / 30 * 1.1


def test_time_left_counts_this_process_only() -> None:
    """Steps done before a resume do not count in this run's time."""
    first = run(100, 2.0, start_step=90).splitlines()[0]
    assert first.startswith("step  91/100") and first.endswith("0:18 left")


def test_a_terminal_gets_a_bar() -> None:
    shown = run(10, 1.0, terminal=True)
    assert "10/10" in shown and "━" in shown and "2,310 tokens/s" in shown and "0:00" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0:00"), (59.6, "1:00"), (725, "12:05"), (3 * 3600 + 130, "3:02:10")],
)
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_what_is_missing_is_not_shown() -> None:
    assert format_numbers({"step": 1}) == ""
    assert format_numbers({"loss": None, "validation_loss": 2.0}) == "validation 2.0000"
