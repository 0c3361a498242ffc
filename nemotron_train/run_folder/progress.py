"""Progress of a run (stored in checkpoints), and the result of a step.

Plain values shared by the training loop, its hooks and the checkpoints. No torch.
"""

from dataclasses import dataclass
from typing import Any

from nemotron_train.data.batches import DataState


@dataclass(frozen=True)
class Progress:
    """Position in a run: optimizer steps taken, tokens trained on, and the data cursor."""

    step: int
    tokens: int
    data: DataState


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step.

    metrics: plain numbers, or device tensors that a hook reads later; hooks may add entries.
    seconds: duration of the step, without the hooks.
    """

    progress: Progress
    metrics: dict[str, Any]
    seconds: float
