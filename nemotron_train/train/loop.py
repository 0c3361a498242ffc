"""The training loop: steps, then hooks, until enough tokens. Knows no model and no framework."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemotron_train.data.batches import DataState


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps taken, tokens trained on, and the data's cursor."""

    step: int
    tokens: int
    data: DataState


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step leaves behind.

    metrics: plain numbers of the step, or tensors on the device until a hook asks for them;
    hooks may add to it. seconds: time the step took, side jobs excluded.
    """

    progress: Progress
    metrics: dict[str, Any]
    seconds: float


class Hook(Protocol):
    """A side job that runs after the steps for which it is due, in the order `run.py` lists."""

    def due(self, progress: Progress) -> bool: ...

    def run(self, progress: Progress, result: StepResult) -> None: ...


class Stop(Protocol):
    """Answers whether the run should end early, the same on every rank."""

    def agreed(self, progress: Progress) -> bool: ...


def fit(
    step: Callable[[Progress], StepResult],
    *,
    until: int,
    progress: Progress,
    hooks: Sequence[Hook],
    stop: Stop,
) -> Progress:
    """Train until `progress.tokens` reaches `until`; returns where it ended."""
    while progress.tokens < until:
        result = step(progress)
        progress = result.progress
        for hook in hooks:
            if hook.due(progress):
                hook.run(progress, result)
        if stop.agreed(progress):  # COLLECTIVE: every rank gets the same answer
            break
    return progress
