"""Roll-back to a checkpoint during a run, and the record of the guard's decisions.

Owns: the data cursor after the skipped batches, the lines of metrics.jsonl that are removed, the
lines that report the guard's events. Does not own: the decision (`guard`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemotron_train.config.errors import TrainingFailed
from nemotron_train.run_folder.metrics import MetricsWriter
from nemotron_train.run_folder.progress import Progress, StepResult
from nemotron_train.train.guard.guard import Guard, RollBack


class GuardedStep:
    """A train step that returns to the last checkpoint if the guard asks for it. COLLECTIVE.

    The data cursor does not go back: the batches since that checkpoint are not trained on again
    (the restart of arXiv 2204.02311, section 5.1). restore: loads the newest checkpoint and returns
    its path and progress; None if the run has no checkpoint.
    """

    def __init__(
        self,
        step: Callable[[Progress], StepResult],
        guard: Guard,
        restore: Callable[[], tuple[Path, Progress] | None],
        forget_saved: Callable[[], None],
        writer: MetricsWriter | None,
        say: Callable[[str], None],
    ) -> None:
        self._step = step
        self._guard = guard
        self._restore = restore
        self._forget_saved = forget_saved
        self._writer = writer
        self._say = say

    def __call__(self, progress: Progress) -> StepResult:
        """Take one step; after a roll-back, retry from the checkpoint with the next batch.

        Raises TrainingFailed.
        """
        while True:
            try:
                return self._step(progress)
            except RollBack as request:
                progress = self._roll_back(request)
            finally:
                self._report_events()

    def _roll_back(self, request: RollBack) -> Progress:
        """Load the last checkpoint; return its progress with the data cursor of `request`."""
        restored = self._restore()
        if restored is None:
            raise TrainingFailed(
                f"step {request.step}: {request.reason}; there is no checkpoint to roll back to "
                "(train.save_every_steps)"
            )
        path, progress = restored
        self._forget_saved()
        if self._writer is not None:
            self._writer.rewind(progress.step)
        skipped = request.data.samples - progress.data.samples
        self._say(
            f"step {request.step}: {request.reason}; rolled back to {path}, past {skipped} "
            "sequences"
        )
        # A later resume drops lines of later steps. With the checkpoint's step, the event remains.
        for event in self._guard.events:
            event |= {"rolled_back_from": event["step"], "step": progress.step}
            event["skipped_sequences"] = skipped
        return replace(progress, data=request.data)

    def _report_events(self) -> None:
        """Write the guard's events to metrics.jsonl, and to the terminal; then clear them.

        Roll-backs and failures print their own lines on the terminal.
        """
        for event in self._guard.events:
            if self._writer is not None:
                self._writer.write(event)
            if event["policy"] in ("report", "skip"):
                outcome = "update skipped" if event["policy"] == "skip" else "reported only"
                self._say(f"step {event['step']}: {event['reason']}; {outcome}")
        self._guard.events.clear()
