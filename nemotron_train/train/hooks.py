"""Side jobs of the loop, in the order `run.py` lists them: validate, log, save.

Each says when it is due and does one thing. The last step is due for all of them.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemotron_train.precision.telemetry import Telemetry
from nemotron_train.precision.telemetry_record import flush_rates
from nemotron_train.run_folder.metrics import MetricsWriter
from nemotron_train.run_folder.progress import Progress, StepResult
from nemotron_train.train.checkpoint.checkpoints import Checkpoints
from nemotron_train.train.progress_bar import ProgressDisplay
from nemotron_train.train.step_clock import StepClock


def _due(progress: Progress, every_steps: int, last_step: int) -> bool:
    return progress.step == last_step or (every_steps > 0 and progress.step % every_steps == 0)


class Validate:
    """Adds `validation_loss` (and one a depth) to the step's metrics."""

    def __init__(
        self,
        losses: Callable[[], list[float]],
        every_steps: int,
        last_step: int,
        clock: StepClock,
    ) -> None:
        self._losses, self._every, self._last = losses, every_steps, last_step
        self._clock = clock
        self.latest: float = math.nan

    def due(self, progress: Progress) -> bool:
        return _due(progress, self._every, self._last)

    def run(self, progress: Progress, result: StepResult) -> None:
        self._clock.begin()
        main, *depths = self._losses()
        self._clock.lap("validation")
        self.latest = main
        result.metrics["validation_loss"] = main
        for depth, loss in enumerate(depths, start=1):
            result.metrics[f"validation_mtp_loss_{depth}"] = loss


class Log:
    """Turns the step's metrics into plain numbers and hands them on; only the rank that has a
    writer writes."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        display: ProgressDisplay | None,
        every_steps: int,
        also_every_steps: int,
        last_step: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
        clock: StepClock,
    ) -> None:
        self._writer, self._display = writer, display
        self._every, self._also_every, self._last = every_steps, also_every_steps, last_step
        self._tokens_per_step = tokens_per_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._clock, self._seconds, self._steps = clock, 0.0, 0
        self.latest: Mapping[str, Any] = {}

    def due(self, progress: Progress) -> bool:
        return True  # every step's time counts

    def run(self, progress: Progress, result: StepResult) -> None:
        self._seconds += result.seconds
        self._steps += 1
        is_due = any(_due(progress, n, self._last) for n in (self._every, self._also_every))
        if is_due or progress.step == 1:
            self._log(progress, result)

    def _log(self, progress: Progress, result: StepResult) -> None:
        numbers: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        numbers["time"] = round(time.time(), 3)
        for name, value in result.metrics.items():  # SYNC: the device's numbers are read here
            numbers[name] = value.tolist() if isinstance(value, torch.Tensor) else value
        for name, seconds in self._clock.take().items():
            numbers[f"step_time/{name}"] = seconds / self._steps
        seconds = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        numbers["tokens_per_second"] = self._tokens_per_step / seconds
        numbers["step_seconds"] = seconds
        if self._peak_flops > 0:
            rate = numbers["tokens_per_second"] * self._flops_per_token
            numbers["model_flops_utilization"] = rate / self._peak_flops
        self.latest = numbers
        if self._writer is not None:
            self._writer.write(numbers)
        if self._display is not None:
            self._display.update(numbers)


class TelemetryRecord:
    """Writes what precision telemetry measured in the step, as a line of its own; COLLECTIVE."""

    def __init__(self, telemetry: Telemetry, writer: MetricsWriter | None) -> None:
        self._telemetry, self._writer = telemetry, writer

    def due(self, progress: Progress) -> bool:
        return self._telemetry.is_due(progress.step)

    def run(self, progress: Progress, result: StepResult) -> None:
        modules = self._telemetry.modules()
        if self._writer is not None:
            about = {"kind": "precision", "step": progress.step, "tokens": progress.tokens}
            self._writer.write(about | flush_rates(modules) | {"precision_telemetry": modules})


class Save:
    """Saves a checkpoint, beside the training if it `is_async`; COLLECTIVE.

    While a save is in flight the hook is due at every step: it learns there of the end of it, or of
    the error. Raises SaveFailed.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        every_steps: int,
        last_step: int,
        is_async: bool,
        say: Callable[[str], None],
        clock: StepClock,
    ) -> None:
        self._checkpoints, self._every, self._last = checkpoints, every_steps, last_step
        self._is_async, self._say, self._clock = is_async, say, clock
        self._started_step = -1

    def due(self, progress: Progress) -> bool:
        return _due(progress, self._every, self._last) or self._checkpoints.in_flight

    def run(self, progress: Progress, result: StepResult) -> None:
        self._clock.begin()
        self._tell(wait=False)
        if _due(progress, self._every, self._last):
            self._start(progress)
        self._clock.lap("save")

    def save(self, progress: Progress) -> None:
        """Save unless this very step was saved already; the checkpoint is there on return."""
        self._start(progress)
        self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if there is one."""
        self._tell(wait=True)

    def forget(self) -> None:
        """The run went back to an earlier checkpoint: the same step may have to be saved again."""
        self._started_step = -1

    def _start(self, progress: Progress) -> None:
        if progress.step == self._started_step:
            return
        self._tell(wait=True)  # one at a time
        self._checkpoints.start(progress, is_copied=self._is_async)
        self._started_step = progress.step
        if not self._is_async:
            self.finish()

    def _tell(self, *, wait: bool) -> None:
        path = self._checkpoints.poll(wait=wait)
        if path is not None:
            self._say(f"saved {path}")
