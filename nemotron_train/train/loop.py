"""The training loop: steps, then hooks, until enough tokens. Knows no model and no framework."""

from collections.abc import Callable, Sequence
from typing import Protocol

from nemotron_train.run_folder.progress import Progress, StepResult


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
