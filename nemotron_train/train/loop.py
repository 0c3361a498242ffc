"""The training loop: run a step, then the hooks, until the token budget is reached.

It does not depend on a model or a framework.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from nemotron_train.run_folder.progress import Progress, StepResult


class Hook(Protocol):
    """A job that runs after each step for which it is due. `Trainer.fit` sets the order."""

    def due(self, progress: Progress) -> bool: ...

    def run(self, progress: Progress, result: StepResult) -> None: ...


class Stop(Protocol):
    """Decides whether the run ends early. The answer is the same on every rank."""

    def agreed(self, progress: Progress) -> bool: ...


def fit(
    step: Callable[[Progress], StepResult],
    *,
    until: int,
    progress: Progress,
    hooks: Sequence[Hook],
    stop: Stop,
) -> Progress:
    """Train until `progress.tokens` reaches `until` or `stop` agrees; return the final progress."""
    while progress.tokens < until:
        result = step(progress)
        progress = result.progress
        for hook in hooks:
            if hook.due(progress):
                hook.run(progress, result)
        if stop.agreed(progress):  # COLLECTIVE: every rank gets the same answer
            break
    return progress
