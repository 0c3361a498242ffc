"""Hooks of the training loop, in the order of `Trainer.fit`: validate, log, save.

Each hook does one job and decides for which steps it is due. Every hook is due at the last step.
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
    """Adds `validation_loss`, and one validation loss per MTP depth, to the step's metrics.

    losses: computes the mean validation losses, main head first. COLLECTIVE.
    """

    def __init__(
        self,
        losses: Callable[[], list[float]],
        every_steps: int,
        last_step: int,
        clock: StepClock,
    ) -> None:
        self._losses = losses
        self._every = every_steps
        self._last = last_step
        self._clock = clock
        self.latest: float = math.nan

    def due(self, progress: Progress) -> bool:
        """Every `every_steps` steps (0: never) and at the last step."""
        return _due(progress, self._every, self._last)

    def run(self, progress: Progress, result: StepResult) -> None:
        """Validate, and write the losses to `result.metrics`."""
        self._clock.begin()
        main_loss, *depth_losses = self._losses()
        self._clock.lap("validation")
        self.latest = main_loss
        result.metrics["validation_loss"] = main_loss
        for depth, loss in enumerate(depth_losses, start=1):
            result.metrics[f"validation_mtp_loss_{depth}"] = loss


class Log:
    """Converts the step's metrics to plain numbers and passes them to the writer and the display.

    Only the rank that has a writer writes. Logs every `every_steps` and every `also_every_steps`
    steps (0: never), and at the first and the last step. peak_flops: of all ranks together; 0 if
    not known.
    """

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
        self._writer = writer
        self._display = display
        self._every = every_steps
        self._also_every = also_every_steps
        self._last = last_step
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self._seconds, self._steps = 0.0, 0  # since the last log step
        self.latest: Mapping[str, Any] = {}

    def due(self, progress: Progress) -> bool:
        """Always: the time of every step is counted."""
        return True

    def run(self, progress: Progress, result: StepResult) -> None:
        """Count the step's time, and log if this is a log step."""
        self._seconds += result.seconds
        self._steps += 1
        is_due = any(_due(progress, n, self._last) for n in (self._every, self._also_every))
        if is_due or progress.step == 1:
            self._log(progress, result)

    def _log(self, progress: Progress, result: StepResult) -> None:
        numbers: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        numbers["time"] = round(time.time(), 3)
        numbers |= _on_host(result.metrics)
        for name, seconds in self._clock.take().items():
            numbers[f"step_time/{name}"] = seconds / self._steps
        seconds = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        numbers["tokens_per_second"] = self._tokens_per_step / seconds
        numbers["step_seconds"] = seconds
        if self._peak_flops > 0:
            flops_per_second = numbers["tokens_per_second"] * self._flops_per_token
            numbers["model_flops_utilization"] = flops_per_second / self._peak_flops
        self.latest = numbers
        if self._writer is not None:
            self._writer.write(numbers)
        if self._display is not None:
            self._display.update(numbers)


class TelemetryRecord:
    """Writes the step's precision telemetry as a separate line of metrics.jsonl. COLLECTIVE."""

    def __init__(self, telemetry: Telemetry, writer: MetricsWriter | None) -> None:
        self._telemetry, self._writer = telemetry, writer

    def due(self, progress: Progress) -> bool:
        """At the steps that telemetry measures."""
        return self._telemetry.is_due(progress.step)

    def run(self, progress: Progress, result: StepResult) -> None:
        """Gather the measurements of all ranks and write them. COLLECTIVE."""
        modules = self._telemetry.modules()
        if self._writer is not None:
            header = {"kind": "precision", "step": progress.step, "tokens": progress.tokens}
            self._writer.write(header | flush_rates(modules) | {"precision_telemetry": modules})


class Save:
    """Saves checkpoints, in the background if `is_async`. Every method is COLLECTIVE.

    While a save is in flight, the hook is due at every step, to notice its end or its error. Its
    methods raise SaveFailed if a checkpoint cannot be written.
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
        self._checkpoints = checkpoints
        self._every = every_steps
        self._last = last_step
        self._is_async = is_async
        self._say = say
        self._clock = clock
        self._started_step = -1  # step of the last save that was started

    def due(self, progress: Progress) -> bool:
        """Every `every_steps` steps, at the last step, and while a save is in flight."""
        return _due(progress, self._every, self._last) or self._checkpoints.in_flight

    def run(self, progress: Progress, result: StepResult) -> None:
        """Check the save in flight, and start a new one if this step is to be saved."""
        self._clock.begin()
        self._poll(wait=False)
        if _due(progress, self._every, self._last):
            self._start(progress)
        self._clock.lap("save")

    def save(self, progress: Progress) -> None:
        """Save this step, unless it was saved before. The checkpoint is complete on return."""
        self._start(progress)
        self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if any."""
        self._poll(wait=True)

    def forget(self) -> None:
        """Allow a step to be saved again. Call it after a roll-back."""
        self._started_step = -1

    def _start(self, progress: Progress) -> None:
        if progress.step == self._started_step:
            return
        self._poll(wait=True)  # only one save at a time
        self._checkpoints.start(progress, is_copied=self._is_async)
        self._started_step = progress.step
        if not self._is_async:
            self.finish()

    def _poll(self, *, wait: bool) -> None:
        """Report the save in flight if it is complete; with `wait`, wait for it first."""
        path = self._checkpoints.poll(wait=wait)
        if path is not None:
            self._say(f"saved {path}")


def _on_host(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics as numbers and lists. SYNC: one copy from the device for all of them."""
    tensors = {name: v for name, v in metrics.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        return dict(metrics)
    flat = torch.cat([value.reshape(-1).double() for value in tensors.values()]).cpu()
    numbers = dict(metrics)
    for (name, value), part in zip(
        tensors.items(), flat.split([value.numel() for value in tensors.values()]), strict=True
    ):
        numbers[name] = part.view(value.shape).to(value.dtype).tolist()
    return numbers
