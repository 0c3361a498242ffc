"""The way back to a checkpoint while a run goes on, and the record of what the guard decided.

Owns: which checkpoint, the cursor past the batches that are skipped, the lines of metrics.jsonl
that are taken back. Does not own: the decision (`guard`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemotron_train.config.errors import TrainingFailed
from nemotron_train.run_folder.metrics import MetricsWriter
from nemotron_train.run_folder.progress import Progress, StepResult
from nemotron_train.train.guard.guard import Guard, RollBack


class GuardedStep:
    """A step of the loop that goes back to the last checkpoint where the guard asks for it.

    The data's cursor stays behind the batches since that checkpoint: they are not trained on
    again (the restart of arXiv 2204.02311, section 5.1). `restore` loads the newest checkpoint and
    returns where it stands, None where there is none. COLLECTIVE.
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
        self._step, self._guard = step, guard
        self._restore, self._forget_saved = restore, forget_saved
        self._writer, self._say = writer, say

    def __call__(self, progress: Progress) -> StepResult:
        while True:
            try:
                return self._step(progress)
            except RollBack as request:
                progress = self._go_back(request)
            finally:
                self._tell()

    def _go_back(self, request: RollBack) -> Progress:
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
        for event in self._guard.events:  # it stays with the step that training goes on from
            event |= {"rolled_back_from": event["step"], "step": progress.step}
            event["skipped_sequences"] = skipped
        return replace(progress, data=request.data)

    def _tell(self) -> None:
        """Hands the guard's events on: a line each in metrics.jsonl and, but for roll-backs and
        failures, which have lines of their own, on the terminal."""
        for event in self._guard.events:
            if self._writer is not None:
                self._writer.write(event)
            if event["policy"] in ("report", "skip"):
                done = "update skipped" if event["policy"] == "skip" else "reported only"
                self._say(f"step {event['step']}: {event['reason']}; {done}")
        self._guard.events.clear()
