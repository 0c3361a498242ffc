"""Progress display of a run: a bar on a terminal, plain lines elsewhere.

Owns: the display of metrics, and the estimate of the time left. Does not own: the metrics. Only one
rank creates a display.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.text import Text

from nemotron_train.config.visible import visible
from nemotron_train.platform.terminal import open_console, text_column

# Interval of the plain lines: 1/50 of the elapsed time, within these limits. This keeps logs small.
SECONDS_BETWEEN_LINES = 2.0
SLOWEST_SECONDS_BETWEEN_LINES = 30.0


class ProgressDisplay:
    """Displays a run of `total_steps` steps, `start_step` of which are already done.

    with ProgressDisplay(total_steps, console) as display:
        display.update({"step": 1, "loss": 8.3, "tokens_per_second": 2300.0, ...})

    `update` takes an object of metrics.jsonl (docs/metrics.md). Missing metrics are not shown.
    """

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        *,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or open_console()
        self._total_steps = total_steps
        self._clock = clock
        self._start_step = self._step = start_step
        self._start_time = clock()
        self._next_line_time = self._start_time
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                text_column("step", "bold"),
                MofNCompleteColumn(),
                BarColumn(),
                text_column("{task.fields[numbers]}"),
                text_column("{task.fields[left]} left", "cyan"),
                console=self._console,
                transient=False,
            )
            self._task = self._bar.add_task(
                "", total=total_steps, completed=start_step, numbers="", left="?"
            )

    def __enter__(self) -> Self:
        self._start_time = self._clock()
        self._next_line_time = self._start_time
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a step.

        Without a terminal: print the first and the last step, and a line every 2 to 30 s between.
        """
        self._step = metrics["step"]
        now = self._clock()
        numbers, time_left = format_numbers(metrics), format_seconds(self._seconds_left(now))
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, numbers=numbers, left=time_left)
            return
        if now < self._next_line_time and self._step < self._total_steps:
            return
        elapsed = now - self._start_time
        self._next_line_time = now + min(
            max(SECONDS_BETWEEN_LINES, elapsed / 50), SLOWEST_SECONDS_BETWEEN_LINES
        )
        width = len(str(self._total_steps))
        self._print(f"step {self._step:{width}}/{self._total_steps}  {numbers}  {time_left} left")

    def message(self, text: str) -> None:
        """Print a separate line, above the bar if there is one."""
        self._print(text)

    def _print(self, text: str) -> None:
        # Text: no markup, whatever the console. soft_wrap: a line stays one line in a log.
        self._console.print(Text(visible(text)), soft_wrap=True)

    def _seconds_left(self, now: float) -> float | None:
        done = self._step - self._start_step
        if done <= 0:
            return None
        return (now - self._start_time) / done * max(self._total_steps - self._step, 0)


def format_numbers(metrics: Mapping[str, Any]) -> str:
    """`loss 3.2140  validation 3.3021  2,310 tokens/s`, of reinforcement learning `reward 0.412
    passed 38.3 %  21 rollouts/s`; missing metrics are left out."""
    parts = []
    if metrics.get("reward") is not None:
        parts.append(f"reward {metrics['reward']:.3f}  passed {100 * metrics['pass']:.1f} %")
        if metrics.get("rollouts_per_second") is not None:
            parts.append(f"{metrics['rollouts_per_second']:,.0f} rollouts/s")
        return "  ".join(parts)
    if metrics.get("loss") is not None:
        parts.append(f"loss {metrics['loss']:.4f}")
    if metrics.get("validation_loss") is not None:
        parts.append(f"validation {metrics['validation_loss']:.4f}")
    if metrics.get("tokens_per_second") is not None:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def format_seconds(seconds: float | None) -> str:
    """`0:42`, `12:05` or `3:02:10`; `?` for None."""
    if seconds is None:
        return "?"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
